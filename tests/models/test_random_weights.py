"""`random:<flavour>`: published sizes to the parameter, stock folders, the same bytes always, no trust in half a build."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from small_run import NewSmallRun

from deepfloyd_core.config.flavours import FLAVOURS, PUBLISHED
from deepfloyd_core.errors import ModelError, StorageError
from deepfloyd_core.models import random_files, random_stage3
from deepfloyd_core.models import random_weights as random_models
from deepfloyd_core.models.folders import resolve
from deepfloyd_core.models.random_weights import design_of, random_folder, write_folder
from deepfloyd_core.models.text_encoders import T5_XXL
from deepfloyd_core.store.artifacts import Artifact
from deepfloyd_core.text.embeds import Embeds

if TYPE_CHECKING:
    import torch
    from diffusers import IFPipeline

ABSENT = {"safety_checker": None, "feature_extractor": None, "watermarker": None, "requires_safety_checker": False}
COUNTS = {
    "i-medium-400m": 371_605_830,
    "i-large-900m": 935_365_830,
    "i-xlarge-4.3b": 4_304_695_110,
    "ii-medium-450m": 442_303_750,
    "ii-large-1.2b": 1_244_597_446,
}


def write(cache: Path, name: str = "tiny-i", seed: int = 0, text: bool = True) -> Path:
    cache.mkdir(exist_ok=True)
    return write_folder((f"random:{name}", design_of(FLAVOURS[name], seed), text, cache))


def digests(folder: Path) -> dict[str, str]:
    files = [
        path for part in sorted(folder.iterdir()) for path in ([part] if part.is_file() else sorted(part.iterdir()))
    ]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with both tiny folders."""
    cache = tmp_path_factory.mktemp("cache")
    write(cache, "tiny-i")
    write(cache, "tiny-ii")
    return cache


@pytest.mark.parametrize("name", COUNTS)
def test_a_real_flavour_has_its_number_of_parameters(name: str) -> None:
    import torch
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(design_of(FLAVOURS[name]).unet)
    assert sum(param.numel() for param in unet.parameters()) == COUNTS[name]
    assert unet.config.in_channels == 3 * FLAVOURS[name].stage
    assert unet.config.sample_size == FLAVOURS[name].kind.size_px


def test_stage_iii_has_its_number_of_parameters() -> None:
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        text = CLIPTextModel(CLIPTextConfig(**random_stage3.TEXT))
        models = (
            UNet2DConditionModel.from_config(random_stage3.UNET),
            AutoencoderKL.from_config(random_stage3.VAE),
            text,
        )
    counts = [sum(param.numel() for param in model.parameters()) for model in models]
    assert counts == [473_398_020, 55_325_927, 340_387_840]


def test_the_text_encoder_of_the_real_flavours_is_t5_xxl_and_one_for_all() -> None:
    import torch
    from transformers import T5Config, T5EncoderModel

    with torch.device("meta"):
        encoder = T5EncoderModel(T5Config(**T5_XXL))
    assert sum(param.numel() for param in encoder.parameters()) == 4_762_310_656
    assert len({design_of(FLAVOURS[name]).text_id for name in COUNTS}) == 1
    assert set(COUNTS) | {"tiny-i", "tiny-ii"} == set(PUBLISHED)


def pictures(pipe: "IFPipeline", rows: "torch.Tensor", negative: "torch.Tensor") -> "torch.Tensor":
    """What a stock pipeline makes of rows, in [0, 1]."""
    import torch

    size: dict[str, Any] = {}
    if "SuperResolution" in type(pipe).__name__:
        generator = torch.Generator().manual_seed(1)
        size = {"image": torch.rand((1, 3, 16, 16), generator=generator) * 2 - 1, "height": 64, "width": 64}
    pipe.set_progress_bar_config(disable=True)
    made: torch.Tensor = pipe(
        prompt_embeds=rows, negative_prompt_embeds=negative, num_inference_steps=2, output_type="pt",
        generator=torch.Generator().manual_seed(0), **size,
    ).images  # fmt: skip
    return made


@pytest.mark.parametrize("name", ["tiny-i", "tiny-ii"])
def test_stock_pipelines_load_a_folder_and_make_finite_pictures(cache: Path, name: str) -> None:
    import torch
    from diffusers import IFPipeline, IFSuperResolutionPipeline

    pipe = {1: IFPipeline, 2: IFSuperResolutionPipeline}[FLAVOURS[name].stage].from_pretrained(
        random_folder(f"random:{name}", True, cache), **ABSENT
    )
    shipped = type(pipe).from_pretrained(PUBLISHED[name].repo, **ABSENT)
    assert pipe.unet.config.block_out_channels == shipped.unet.config.block_out_channels
    assert not torch.equal(pipe.unet.conv_in.weight, shipped.unet.conv_in.weight)
    assert pipe.unet.dtype == torch.float32
    rows, negative = pipe.encode_prompt("a purple star")
    other, _ = pipe.encode_prompt("a blue square")
    assert 0.5 < rows.std() < 2, "neither vanishing nor growing"
    assert (rows - other).abs().mean() > 0.05, "captions must differ"
    made = pictures(pipe, rows, negative)
    assert torch.isfinite(made).all()
    assert made.std() > 0.02


def test_a_folder_has_the_same_bytes_when_written_again_and_others_with_another_seed(
    cache: Path, tmp_path: Path
) -> None:
    first, again = random_folder("random:tiny-i", True, cache), write(tmp_path)
    assert digests(first) == digests(again)
    other = digests(write(tmp_path, seed=1))
    assert {name for name in other if other[name] != digests(first)[name]} == {
        "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors",
    }  # fmt: skip


def test_large_weights_are_cut_into_shards_that_give_the_same_model(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from transformers import T5EncoderModel

    from deepfloyd_core.models.unet import load_unet

    monkeypatch.setattr(random_files, "SHARD_BYTES", 200_000)
    whole, cut = random_folder("random:tiny-i", True, cache), write(tmp_path)
    for part in ("unet", "text_encoder"):
        files = sorted((cut / part).glob("*.safetensors"))
        assert len(files) > 2
        index = json.loads(next((cut / part).glob("*.index.json")).read_bytes())
        assert set(index["weight_map"].values()) == {file.name for file in files}
    for load in (load_unet, lambda folder, dtype: T5EncoderModel.from_pretrained(folder / "text_encoder", dtype=dtype)):
        one, other = load(whole, torch.float32).state_dict(), load(cut, torch.float32).state_dict()
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_text_encoder_is_written_when_it_is_asked_for_and_shared(tmp_path: Path) -> None:
    folder = write(tmp_path, "tiny-i", text=False)
    assert not list(tmp_path.glob("text-*"))
    before = (folder / "unet/diffusion_pytorch_model.safetensors").stat().st_mtime_ns
    write(tmp_path, "tiny-i")
    second = write(tmp_path, "tiny-ii")
    assert (folder / "unet/diffusion_pytorch_model.safetensors").stat().st_mtime_ns == before
    assert len(list(tmp_path.glob("text-*"))) == 1
    assert (folder / "text_encoder").resolve() == (second / "text_encoder").resolve()


@pytest.mark.slow
def test_what_a_killed_build_leaves_is_not_trusted(tmp_path: Path, cache: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from deepfloyd_core.config.flavours import FLAVOURS\n"
        "from deepfloyd_core.models.random_weights import design_of, write_folder\n"
        "write_folder(('random:i-medium-400m', design_of(FLAVOURS['i-medium-400m']), False, Path(sys.argv[1])))"
    )
    child = subprocess.Popen([sys.executable, "-P", "-c", code, str(tmp_path)])
    deadline = time.monotonic() + 120
    while not any(path.stat().st_size > 1_000_000 for path in tmp_path.rglob("*.safetensors")):
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    (half,) = tmp_path.glob("i-medium-400m-*")
    assert not (half / "unet").exists()
    # The same left-overs where a small build comes next: they are removed, and its bytes are those of an unbroken one.
    folder = tmp_path / random_folder("random:tiny-i", True, cache).name
    half.rename(folder)
    assert digests(write(tmp_path)) == digests(random_folder("random:tiny-i", True, cache))
    assert not list(tmp_path.rglob(".tmp-*"))


@pytest.mark.slow
def test_two_processes_write_one_folder_together(tmp_path: Path, cache: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from deepfloyd_core.models.random_weights import random_folder\n"
        "print(random_folder('random:tiny-i', True, Path(sys.argv[1])))"
    )
    runs = [
        subprocess.Popen([sys.executable, "-P", "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    folders = {run.communicate(timeout=300)[0].strip() for run in runs}
    assert [run.returncode for run in runs] == [0, 0]
    (folder,) = folders
    assert digests(Path(folder)) == digests(random_folder("random:tiny-i", True, cache))


def test_a_disk_without_room_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 10**12 - 10**8, 10**8))
    with pytest.raises(
        ModelError, match=r"need 0\.3 GB in .*, where 0\.1 GB are free\. Make room there, or point HF_HOME"
    ):
        write(tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_an_error_in_the_child_is_the_same_error_here(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(StorageError, match="cache"):
        random_folder("random:tiny-i", False, tmp_path / "cache")


def test_resolve_knows_the_name_and_checks_what_it_got(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_models, "default_cache", lambda: cache)
    assert resolve("random:tiny-i", 1, text=True) == random_folder("random:tiny-i", True, cache)
    assert resolve(FLAVOURS["random:tiny-ii"].repo, 2).name.startswith("tiny-ii-")
    with pytest.raises(ModelError, match="not a directory"):
        resolve("random:tiny", 1)


@pytest.mark.slow
def test_a_run_file_with_a_random_flavour_embeds_its_captions(
    server: str, tmp_path: Path, new_small_run: NewSmallRun
) -> None:
    run = new_small_run(tmp_path / "run", pictures=3)
    run.config.write_text(run.config.read_text().replace('"tiny-i"', '"random:tiny-i"'))
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        run.command("embed", str(run.config)), capture_output=True, text=True, env=environment, timeout=600
    )
    assert done.returncode == 0, done.stderr
    (made,) = (run.workspace / "text_embeds").iterdir()
    artifact = Artifact("text_embeds", made.name, made)
    assert artifact.manifest.summary["width"] == 64
    assert Embeds(artifact).of("a purple star").shape == (77, 64)
    assert list((tmp_path / "home").rglob("text_encoder"))
