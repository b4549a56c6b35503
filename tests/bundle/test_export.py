"""A version's weights in other programs' forms do what the trained ones do."""

import os
import stat
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from data_world import DataWorld
from diffusers import DDPMScheduler, UNet2DConditionModel
from moved_bundles import moved_bundle, run_of
from releases import deepfloyd
from small_disk import PAGE, small_disk

from deepfloyd_core.adapters.files import LORA_FILE, product_name
from deepfloyd_core.adapters.lora_file import weights_file
from deepfloyd_core.adapters.method import load_product
from deepfloyd_core.adapters.mixed import MixedLora, misfit
from deepfloyd_core.adapters.mixing import load_loras
from deepfloyd_core.bundle.export import Form, export_version
from deepfloyd_core.config.stages import STAGES, Stage
from deepfloyd_core.errors import ArtifactError, ConfigError, StorageError
from deepfloyd_core.models.same_output import output_change
from deepfloyd_core.models.unet import load_scheduler, load_unet, stock_pipeline
from deepfloyd_core.store.artifacts import Artifact
from deepfloyd_core.store.pinned import pinned

FAST = {"mixed_precision": "no", "lora_rank": 4}


def tuned(bundle: Artifact, stage: Stage, base: Path) -> UNet2DConditionModel:
    """The base with what was trained, by the stock pipeline."""
    unet = load_unet(base, torch.float32)
    load_product(stock_pipeline(base, stage, unet, load_scheduler(base)), bundle.path / STAGES[stage].table)
    return unet.eval()


def difference(one: UNet2DConditionModel, other: UNet2DConditionModel, base: Path) -> float:
    change = output_change(one, base, torch.float32)
    one.unload_lora() if getattr(one, "peft_config", None) else None
    one.load_state_dict(other.float().state_dict())
    return change()


STAGE1, STAGE2 = {"model_flavour": "tiny-i", **FAST}, {"model_flavour": "tiny-ii", **FAST}


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ({**STAGE1, "lora_alpha": 2.0}, {**STAGE2, "use_dora": True}),
        (
            {"model_flavour": "tiny-i", "mixed_precision": "no", "use_bitfit": True},
            {"model_flavour": "tiny-ii", "mixed_precision": "no", "model_type": "full"},
        ),
    ],
)
def test_merged_unets_are_loaded_by_diffusers_and_do_what_was_trained(
    world: DataWorld, one: dict[str, Any], two: dict[str, Any]
) -> None:
    run, bundle, bases = moved_bundle(world, stage1=one, stage2=two)
    out = world.folder / "out"
    files = export_version(run, bundle, bases, "merged", out)
    assert {str(file.relative_to(out)) for file in files} == {
        "SHA256SUMS", *(f"stage{stage}/{name}" for stage in (1, 2) for name in (
            "unet/config.json", "unet/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json",
        )),
    }  # fmt: skip
    assert subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=out, capture_output=True).returncode == 0
    for stage, base in bases.items():
        merged = UNet2DConditionModel.from_pretrained(out / f"stage{stage}", subfolder="unet", use_safetensors=True)
        assert difference(tuned(bundle, stage, base), merged, base) < 1e-5
        assert difference(load_unet(base, torch.float32), merged, base) > 1e-4, "it was trained"
        assert (
            DDPMScheduler.from_pretrained(out / f"stage{stage}", subfolder="scheduler").config.variance_type
            == "fixed_small"
        )


def test_kohyas_files_are_the_lora_whole(world: DataWorld) -> None:
    run, bundle, bases = moved_bundle(world, stage1={**STAGE1, "lora_alpha": 2.0}, stage2=STAGE2)
    out = world.folder / "out"
    export_version(run, bundle, bases, "kohya", out)
    for stage, base in bases.items():
        file = out / f"stage{stage}.safetensors"
        assert weights_file(file, "") == file and misfit(file, base, "") == ""
        read = SimpleNamespace(unet=load_unet(base, torch.float32))
        lora = MixedLora(stage=stage, name="", weight=1.0, file=pinned(file), settings=None, learned_variance=False)
        load_loras(read, [lora])
        change = output_change(read.unet, base, torch.float32)
        read.unet.unload_lora()
        load_product(stock_pipeline(base, stage, read.unet, load_scheduler(base)), bundle.path / f"stage{stage}")
        assert change() < 1e-6


def test_what_has_no_such_form_is_refused_and_nothing_is_written(world: DataWorld) -> None:
    out = world.folder / "out"
    run, bundle, bases = moved_bundle(world, stage1=STAGE1, stage2={**STAGE2, "use_dora": True})
    assert product_name(bundle.path / "stage2").startswith("pytorch_lora")
    with pytest.raises(ConfigError, match="Stage II has a LoRA with DoRA, which kohya's programs compute otherwise"):
        export_version(run, bundle, bases, "kohya", out)
    assert not out.exists()
    only_one, _, _ = run_of(world, stage1=STAGE1)
    with pytest.raises(ConfigError, match="The version has Stage II, and the run file does not"):
        export_version(only_one, bundle, bases, "merged", out)
    out.mkdir()
    (out / "mine.txt").touch()
    with pytest.raises(ConfigError, match="holds files"):
        export_version(run, bundle, bases, "merged", out)
    with pytest.raises(ConfigError, match=r"mine\.txt is no folder"):
        export_version(run, bundle, bases, "merged", out / "mine.txt")


def test_the_command_refuses_a_full_folder_before_it_loads_anything(
    world: DataWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_of(world, stage1=STAGE1)
    monkeypatch.setattr("deepfloyd_core.models.folders.resolve", lambda *_: pytest.fail("a model is looked for"))
    done = deepfloyd("export", str(world.folder / "run.json"), "1", str(world.folder))
    assert str(done.exception) == f"{world.folder} holds files. Name an empty folder, or a new one."


def test_exported_files_have_the_modes_that_the_umask_gives(world: DataWorld) -> None:
    run, bundle, bases = moved_bundle(world, stage1=STAGE1)
    forms: tuple[Form, ...] = ("merged", "kohya")
    before = os.umask(0o027)
    try:
        files = [
            file for form in forms
            for file in export_version(run, bundle, bases, form, world.folder / form)
        ]  # fmt: skip
    finally:
        os.umask(before)
    assert {file.suffix for file in files} > {".safetensors", ".json"}
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o640}


def test_a_damaged_version_is_not_exported(world: DataWorld) -> None:
    run, bundle, bases = moved_bundle(world, stage1=STAGE1)
    file = bundle.path / "stage1" / LORA_FILE
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.chmod(0o644)
    file.write_bytes(data)
    with pytest.raises(ArtifactError, match="The version is not exported: "):
        export_version(run, bundle, bases, "kohya", world.folder / "out")


def test_half_the_bytes_are_rounded_weights(world: DataWorld) -> None:
    run, bundle, bases = moved_bundle(world, stage1=STAGE1)
    sizes = {}
    for name, bf16 in (("whole", False), ("half", True)):
        export_version(run, bundle, bases, "merged", world.folder / name, bf16)
        file = world.folder / name / "stage1" / "unet" / "diffusion_pytorch_model.safetensors"
        sizes[name] = file.stat().st_size
    assert sizes["half"] < 0.52 * sizes["whole"]


@pytest.mark.parametrize("form", ["merged", "kohya"])
def test_a_full_disk_is_told_with_what_is_needed_and_leaves_nothing(world: DataWorld, form: Form) -> None:
    run, bundle, bases = moved_bundle(world, stage1=STAGE1, stage2=STAGE2)
    with small_disk(world.folder / "small", 30 * PAGE) as disk:
        out = disk.folder / "out"
        with pytest.raises(
            StorageError, match=r"safetensors takes \d.* [kM]B, and .* has less room \(tmpfs at .* free\)"
        ):
            export_version(run, bundle, bases, form, out)
        assert not list(out.iterdir()), "so the same command goes again"
        disk.resize(30 << 20)
        assert export_version(run, bundle, bases, form, out)
