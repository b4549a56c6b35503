"""Stage III on the tiny cascade: diffusers' pipeline called by hand, Lanczos in its place, a stop, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import StableDiffusionUpscalePipeline
from drawn_here import drawn_here, job_here, pixels, texts_here
from PIL import Image
from safetensors.torch import load_file
from small_run import SmallRun

from deepfloyd_core.config.flavours import STAGE3_REPOS
from deepfloyd_core.config.run import Run
from deepfloyd_core.config.run_machine import Machine
from deepfloyd_core.errors import ConfigError, DeepFloydError
from deepfloyd_core.models.unet import order_channels_last
from deepfloyd_core.preflight.check import check_run, draws_stage3
from deepfloyd_core.preflight.drawn_again import recorded_options
from deepfloyd_core.preflight.generate import GenerateOptions
from deepfloyd_core.preflight.load import load_run
from deepfloyd_core.preflight.upscale import UpscaleOptions
from deepfloyd_core.processes.jobs import Job
from deepfloyd_core.sampling.drawn_picture import drawn_picture
from deepfloyd_core.sampling.generate import generate_pictures
from deepfloyd_core.sampling.own_pictures import own_pictures, upscaled_files
from deepfloyd_core.sampling.stage3 import make_enlarger, stage3_pipeline
from deepfloyd_core.sampling.stage3_jobs import stage3_of
from deepfloyd_core.sampling.upscale import enlarge_pictures
from deepfloyd_core.sampling.upscale_jobs import enlarge_job
from deepfloyd_core.types import no_report

KEYS = (
    "stage3.model_flavour=tiny-iii", "stage3.mixed_precision=no", "stage3.validation_num_inference_steps=3",
    "stage3.validation_guidance=2",
)  # fmt: skip
ASKED = GenerateOptions(("a purple star",), "base", seeds="3,4", sizes="16x24", stages="1-3")


@pytest.fixture
def with_stage3(small_run: SmallRun) -> Run:
    return load_run(small_run.config, KEYS)


def _stock(picture: torch.Tensor, seed: int, prompt: str = "a purple star") -> np.ndarray:
    """A picture (1, 3, H, W) in [0, 1] by diffusers' pipeline, channels_last as ours."""
    pipeline = StableDiffusionUpscalePipeline.from_pretrained(STAGE3_REPOS["tiny-iii"], dtype=torch.float32)
    order_channels_last(pipeline.unet.requires_grad_(False))
    made = pipeline(
        prompt=prompt, negative_prompt="", image=picture, num_inference_steps=3, guidance_scale=2.0,
        noise_level=100, generator=torch.Generator().manual_seed(seed),
    ).images[0]  # fmt: skip
    return np.asarray(made).astype(int)


def test_its_pictures_are_those_of_diffusers(with_stage3: Run, models: dict[Any, Path], tmp_path: Path) -> None:
    drawn_here(with_stage3, models, tmp_path / "out", ASKED)
    for number, seed in enumerate((3, 4)):
        small = load_file(tmp_path / "out" / ".drawn" / f"stage2-{number}.safetensors")[""][None]
        ours = tmp_path / "out" / f"picture-00{number}-seed-{seed}-256x384.png"
        assert np.array_equal(pixels(ours), _stock(small / 2 + 0.5, seed))
    rows = pq.read_table(tmp_path / "out" / "index.parquet").to_pylist()
    assert [(row["stage"], row["width"], row["height"]) for row in rows[::2]] == [
        (1, 16, 24),
        (2, 64, 96),
        (3, 256, 384),
    ]
    with Image.open(ours) as picture:
        assert picture.info["parameters"].splitlines()[0] == "a purple star"
        assert "Steps: 3" in picture.info["parameters"] and "Model: tiny-iii" in picture.info["parameters"]
    record = drawn_picture(ours)
    assert (record.stage, record.stages, record.size) == (3, "1-3", (16, 24))
    again, keys = recorded_options(GenerateOptions(), ours)
    assert again.stages == "1-3" and "stage3.validation_num_inference_steps=3" in keys


def test_a_job_that_is_stopped_goes_on_with_the_same_bytes(
    with_stage3: Run, models: dict[Any, Path], tmp_path: Path
) -> None:
    whole = drawn_here(with_stage3, models, tmp_path / "whole", ASKED)

    def stop(done: int, total: int, line: str) -> None:
        if "Stage III" in line and done == 1:
            raise KeyboardInterrupt

    (tmp_path / "stopped").mkdir()
    job = job_here(with_stage3, models, ASKED)
    texts_here(job, tmp_path / "stopped")
    with pytest.raises(KeyboardInterrupt):
        generate_pictures(Job(job, tmp_path / "stopped", stop))
    first = tmp_path / "stopped" / "picture-000-seed-3-64x96.png"
    before = first.stat().st_mtime_ns
    generate_pictures(Job(job, tmp_path / "stopped", no_report))
    assert first.stat().st_mtime_ns == before
    for file in whole.values():
        assert file.read_bytes() == (tmp_path / "stopped" / file.name).read_bytes()


def test_without_a_model_lanczos_enlarges_and_the_picture_says_so(
    run: Run, models: dict[Any, Path], tmp_path: Path
) -> None:
    drawn = drawn_here(run, models, tmp_path / "out", ASKED)
    small, large = drawn["64x96"], drawn["256x384"]
    with Image.open(small) as picture:
        assert np.array_equal(
            pixels(large), np.asarray(picture.resize((256, 384), Image.Resampling.LANCZOS)).astype(int)
        )
    with Image.open(large) as picture:
        assert json.loads(picture.info["deepfloyd"])["enlarged_by"] == "lanczos"
        assert "Hires upscaler: lanczos" in picture.info["parameters"]
    assert drawn_picture(large).stages == "1-3"
    again, keys = recorded_options(GenerateOptions(), large)
    assert again.by_lanczos and not any(key.startswith("stage3") for key in keys)
    with_model = load_run(Path(run.file), KEYS)
    assert not draws_stage3(with_model.config, again) and draws_stage3(with_model.config, ASKED)


def test_the_first_stage_alone(run: Run, models: dict[Any, Path], tmp_path: Path) -> None:
    options = GenerateOptions(("a purple star",), "base", seeds="3", sizes="16x24", stages="1")
    (file,) = drawn_here(run, models, tmp_path / "out", options).values()
    both = drawn_here(
        run, models, tmp_path / "both", GenerateOptions(("a purple star",), "base", seeds="3", sizes="16x24")
    )
    assert np.array_equal(pixels(file), pixels(both["16x24"]))
    assert drawn_picture(file).stages == "1" and drawn_picture(both["16x24"]).stages == "1-2"


def test_own_pictures_of_any_size(with_stage3: Run, tmp_path: Path) -> None:
    """Beyond 256 px of latents through windows."""
    folder, rng = tmp_path / "own", np.random.default_rng(0)
    folder.mkdir()
    for name, (width, height) in (("even.png", (64, 48)), ("wide.jpg", (283, 37))):
        Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).resize((width, height)).save(folder / name)
    (folder / "even.txt").write_text("a purple star\n")
    (folder / "torn.png").write_bytes((folder / "even.png").read_bytes()[:100])
    job = enlarge_job(with_stage3, own_pictures(folder, "a red circle"), 7, stage3_of(with_stage3.config))
    (tmp_path / "out").mkdir()
    summary = enlarge_pictures(Job(job, tmp_path / "out", no_report))
    assert summary.pictures == 2 and list(summary.left_out) == ["torn.png"]
    files = upscaled_files(tmp_path / "out")
    with Image.open(files[0]) as picture:
        assert "variant" not in json.loads(picture.info["deepfloyd"]) and "Version" not in picture.info["parameters"]
    with pytest.raises(ConfigError, match="was made by `deepfloyd upscale`, whose pictures are not drawn again"):
        recorded_options(GenerateOptions(), files[0])
    made = {file.name: pixels(file) for file in files}
    assert {name: picture.shape for name, picture in made.items()} == {
        "even.png": (192, 256, 3),
        "wide.png": (148, 1132, 3),
    }
    given = torch.from_numpy(pixels(folder / "even.png")).permute(2, 0, 1)[None].float() / 255
    assert np.abs(made["even.png"] - _stock(given, 7)).max() <= 1, "the bytes of the file are scaled in another order"
    wide = torch.from_numpy(np.array(Image.open(folder / "wide.jpg"))).permute(2, 0, 1)[None].float() / 255
    wide = torch.nn.functional.pad(wide, (0, 5, 0, 3), mode="replicate")
    whole = _stock(wide, 7, prompt="a red circle")[:148, :1132]
    seen = np.abs(made["wide.png"] - whole)
    assert seen.max() > 1 and seen.mean() < 8, "through windows, which see less than the whole picture at once"


def test_in_bf16_the_vae_keeps_every_bit(small_run: SmallRun) -> None:
    stage3 = stage3_of(load_run(small_run.config, (KEYS[0],)).config)
    pipeline = stage3_pipeline(stage3, Machine(device="cpu"))
    assert pipeline.unet.dtype == pipeline.text_encoder.dtype == torch.bfloat16
    stored = load_file(Path(STAGE3_REPOS["tiny-iii"]) / "vae" / "diffusion_pytorch_model.safetensors")
    for name, value in pipeline.vae.state_dict().items():
        assert torch.equal(value, stored[name].float()), name
    made = make_enlarger(stage3, Machine(device="cpu"), lambda _: None)(torch.zeros(1, 3, 16, 16), "a star", "", 0)
    assert made.shape == (64, 64, 3) and made.dtype == np.uint8


def test_what_cannot_be_drawn_is_one_sentence(small_run: SmallRun, image: Path, tmp_path: Path) -> None:
    def refused(goal: GenerateOptions | UpscaleOptions, *keys: str) -> str:
        with pytest.raises(DeepFloydError) as error:
            check_run(small_run.config, keys, goal)
        return str(error.value)

    without = refused(ASKED, "stage2=")
    assert without == "--stages 1-3 needs a [stage2] table with a model_flavour, and the run file has none."
    assert "add a [stage3] table" in refused(UpscaleOptions(image, "latest", stage=3))
    assert "it has no versions. Leave out --version" in refused(UpscaleOptions(image, "3", stage=3), *KEYS)
    assert "it takes no LoRA" in refused(UpscaleOptions(image, "base", loras=("x@1",), stage=3), *KEYS)
    gone = f"stage3.pretrained_model_name_or_path={tmp_path}/gone"
    assert "gone is not a directory, nor a hub id" in refused(ASKED, *KEYS, gone)
    other = f"stage3.pretrained_model_name_or_path={_of_stage2(tmp_path)}"
    assert "has 6 input channels; one of Stage III has 7" in refused(ASKED, *KEYS, other)
    assert "less than or equal to 350" in refused(ASKED, *KEYS, "stage3.validation_noise_level=351")
    mute = _of_stage2(tmp_path, "mute")
    (mute / "tokenizer" / "tokenizer.json").unlink()
    lacks = refused(ASKED, *KEYS, f"stage3.pretrained_model_name_or_path={mute}")
    assert "lacks tokenizer/vocab.json or tokenizer/tokenizer.json" in lacks, (
        "else each prompt would be the same tokens"
    )
    check_run(small_run.config, (*KEYS, other), GenerateOptions(("x",), "base"))
    with pytest.raises(ConfigError, match="Give none of these beside --from"):
        recorded_options(ASKED, image)


def _of_stage2(folder: Path, name: str = "mixed") -> Path:
    """A model of Stage III whose UNet is one of Stage II."""
    tiny = Path(STAGE3_REPOS["tiny-iii"])
    shutil.copytree(tiny, folder / name)
    shutil.copy(tiny.parent / "ii" / "unet" / "config.json", folder / name / "unet")
    return folder / name
