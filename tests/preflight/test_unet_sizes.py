"""Sizes against the UNet that would be loaded, and LoRAs against the stage they are given to: all before anything is."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from artifact_rows import sealed_manifest
from small_run import SmallRun

from deepfloyd_core.config.flavours import FLAVOURS
from deepfloyd_core.config.stages import Stage
from deepfloyd_core.errors import ConfigError, ModelError
from deepfloyd_core.files import write_sealed
from deepfloyd_core.models.identity import model_fingerprint
from deepfloyd_core.preflight.check import check_run
from deepfloyd_core.preflight.generate import GenerateOptions

TINY = {1: Path(FLAVOURS["tiny-i"].repo), 2: Path(FLAVOURS["tiny-ii"].repo)}


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffusers.ModelMixin.from_pretrained", lambda *_, **__: pytest.fail("a model is loaded"))


@pytest.fixture
def deeper(tmp_path: Path) -> Callable[[Stage, int], Path]:
    """Copies a tiny model, and says in its configuration that it halves so many times."""

    def copied(stage: Stage, halved: int) -> Path:
        folder = tmp_path / f"model-{stage}"
        shutil.copytree(TINY[stage], folder)
        config = json.loads((folder / "unet/config.json").read_bytes())
        config["block_out_channels"] = [32] * (halved + 1)
        (folder / "unet/config.json").write_text(json.dumps(config))
        return folder

    return copied


def check(small_run: SmallRun, stage: Stage, folder: Path, *keys: str) -> None:
    """As before a training of a stage on the model in a folder."""
    named = f'stage{stage}.pretrained_model_name_or_path="{folder}"'
    check_run(small_run.config, (named, *keys), stage)


def refusal(small_run: SmallRun, stage: Stage, folder: Path, *keys: str) -> str:
    with pytest.raises(ConfigError) as caught:
        check(small_run, stage, folder, *keys)
    return str(caught.value)


@pytest.mark.parametrize(
    ("stage", "halved", "keys", "says"),
    [
        (1, 4, (), "aspect_bucket_alignment is 8, 8 px at stage 1; stage1: the UNet in "),
        (1, 4, (), "halves 4 times, so every edge must divide by 16. Set aspect_bucket_alignment = 16."),
        (2, 6, (), "aspect_bucket_alignment is 8, 32 px at stage 2; "),
        (2, 6, (), "halves 6 times, so every edge must divide by 64. Set aspect_bucket_alignment = 16."),
        (2, 9, (), "every edge must divide by 512. No alignment can serve this UNet."),
        (1, 4, ("aspect_bucket_alignment=16", "validation_resolution=72x64"),
         "validation_resolution is '72x64', 72 px at stage 1; "),
        (1, 4, ("aspect_bucket_alignment=16", "validation_resolution=72x64"), "Use for example 80 in place of 72."),
        (2, 6, ("aspect_bucket_alignment=64", 'validation_resolution="64,88x64"'),
         "validation_resolution is '64,88x64', 352 px at stage 2; "),
    ],
)  # fmt: skip
def test_sizes_that_the_levels_of_the_unet_cannot_halve_are_refused(
    small_run: SmallRun,
    deeper: Callable[[Stage, int], Path],
    stage: Stage,
    halved: int,
    keys: tuple[str, ...],
    says: str,
) -> None:
    message = refusal(small_run, stage, deeper(stage, halved), *keys)
    assert says in message and str(small_run.folder / f"model-{stage}") in message


def test_a_resolution_that_the_levels_cannot_halve_is_refused(
    small_run: SmallRun, deeper: Callable[[Stage, int], Path]
) -> None:
    data = json.loads((small_run.folder / "data.json").read_bytes())
    data[0] |= {"resolution": 72, "minimum_image_size": 72, "maximum_image_size": 72, "target_downsample_size": 72}
    (small_run.folder / "data.json").write_text(json.dumps(data))
    message = refusal(small_run, 1, deeper(1, 4), "aspect_bucket_alignment=16")
    assert message.startswith("stars: resolution is 72, 72 px at stage 1; ")
    assert message.endswith("Use for example 80 in place of 72.")
    check_run(small_run.config, (), "lora_bundle")


@pytest.mark.parametrize(("stage", "halved", "alignment"), [(1, 4, 16), (2, 5, 8), (2, 6, 16)])
def test_sizes_that_the_levels_halve_pass(
    small_run: SmallRun, deeper: Callable[[Stage, int], Path], stage: Stage, halved: int, alignment: int
) -> None:
    check(small_run, stage, deeper(stage, halved), f"aspect_bucket_alignment={alignment}")


@pytest.mark.parametrize(
    ("stage", "says"),
    [(1, "has 6 input channels; one of Stage I has 3."), (2, "has 3 input channels; one of Stage II has 6.")],
)
def test_the_other_stages_model_is_refused(small_run: SmallRun, tmp_path: Path, stage: Stage, says: str) -> None:
    folder = shutil.copytree(TINY[2], tmp_path / "model")  # with the scheduler that Stage II needs
    shutil.copytree(TINY[3 - stage] / "unet", folder / "unet", dirs_exist_ok=True)
    assert says in refusal(small_run, stage, folder)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"in_channels": 3}', '{"in_channels": 3, "block_out_channels": 4}'])
def test_a_damaged_configuration_is_a_model_error(
    small_run: SmallRun, deeper: Callable[[Stage, int], Path], text: str
) -> None:
    folder = deeper(1, 3)
    (folder / "unet/config.json").write_text(text)
    with pytest.raises(ModelError, match=r"unet/config\.json is no UNet's configuration"):
        check(small_run, 1, folder)


def publish_lora(small_run: SmallRun, stage: Stage, base: Stage) -> None:
    """A version with a LoRA that claims a stage, and was trained on a stage's base model."""
    model = model_fingerprint(TINY[base], ("unet", "scheduler", "image_noising_scheduler")[: base + 1])
    bundle = small_run.workspace / "lora_bundle" / ("0" * 16)
    bundle.mkdir(parents=True)
    write_sealed(
        bundle / "manifest.json", sealed_manifest(**{f"stage{stage}_lora": "any", f"stage{stage}_model": model})
    )
    (small_run.workspace / "versions").mkdir()
    version = {"number": 1, "bundle": "0" * 16, "image_index": "0" * 16, "data": "", "lineage": {}}
    write_sealed(small_run.workspace / "versions" / "0001.json", version)


@pytest.mark.parametrize(("stage", "base"), [(1, 2), (2, 1)])
def test_generate_refuses_the_lora_of_the_other_stage(small_run: SmallRun, stage: Stage, base: Stage) -> None:
    publish_lora(small_run, stage, base)
    with pytest.raises(ConfigError) as caught:
        check_run(small_run.config, (), GenerateOptions(("a purple star",), "1"))
    said = f"lora_bundle {'0' * 16} was trained on other weights of stage {stage} than those in {TINY[stage]}"
    assert said in str(caught.value)


def test_generate_refuses_a_size_that_the_levels_cannot_halve(
    small_run: SmallRun, deeper: Callable[[Stage, int], Path]
) -> None:
    """The run's crops do not matter to it."""
    model = f'stage1.pretrained_model_name_or_path="{deeper(1, 4)}"'
    options = GenerateOptions(("a purple star",), "base")
    with pytest.raises(ConfigError, match="size is 72x64, 72 px at stage 1; "):
        check_run(small_run.config, (model, "validation_resolution=72x64"), options)
    check_run(small_run.config, (model,), options)
