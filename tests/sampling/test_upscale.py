"""The job `upscale` on the tiny cascade: any size, captions beside pictures, faults that cost one picture, and a stop."""

import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import IFPipeline, IFSuperResolutionPipeline
from drawn_here import texts_here
from PIL import Image

from deepfloyd_core.config.run import Run
from deepfloyd_core.diffusion.loss import to_bytes
from deepfloyd_core.errors import ConfigError
from deepfloyd_core.models.memory import Counted
from deepfloyd_core.processes.jobs import Job
from deepfloyd_core.sampling import forecasts
from deepfloyd_core.sampling import own_pictures as module
from deepfloyd_core.sampling import upscale as module_of_the_job
from deepfloyd_core.sampling.forecasts import canvas_bytes
from deepfloyd_core.sampling.jobs import SampledStage
from deepfloyd_core.sampling.own_pictures import own_pictures, upscaled_files
from deepfloyd_core.sampling.sampler import Sampler, make_sampler, sample_upscaled
from deepfloyd_core.sampling.upscale import upscale_pictures
from deepfloyd_core.sampling.upscale_jobs import UpscaledSummary, upscale_job
from deepfloyd_core.sampling.windows import WindowedUnet
from deepfloyd_core.types import Report, no_report

Upscale = Callable[..., UpscaledSummary]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder with a picture as the stage makes them, one of another shape, and what is none."""
    folder, rng = tmp_path / "pictures", np.random.default_rng(0)
    folder.mkdir()
    for name, (width, height) in (("even.png", (64, 64)), ("odd.jpg", (71, 37))):
        smooth = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).resize((width, height))
        smooth.save(folder / name)
    (folder / "even.txt").write_text("a purple star\n")
    (folder / "torn.png").write_bytes((folder / "even.png").read_bytes()[:200])
    (folder / ".hidden.png").write_bytes(b"")
    return folder


@pytest.fixture
def upscale(run: Run, models: dict[Any, Path], tmp_path: Path) -> Upscale:
    """Do the job in this process."""

    def upscaled(pictures: Path, out: str, report: Report = no_report) -> UpscaledSummary:
        (tmp_path / out).mkdir(exist_ok=True)
        job = upscale_job(run, own_pictures(pictures, "a red circle"), 7, "base", models, None)
        texts_here(job, tmp_path / out)
        return upscale_pictures(Job(job, tmp_path / out, report))

    return upscaled


def test_pictures_of_any_size_are_four_times_as_large_and_a_fault_costs_one(
    upscale: Upscale, pictures: Path, tmp_path: Path
) -> None:
    summary = upscale(pictures, "out")
    assert summary.pictures == 2 and list(summary.left_out) == ["torn.png"]
    sizes = {}
    for file in upscaled_files(tmp_path / "out"):
        with Image.open(file) as picture:
            sizes[file.name] = picture.size
    assert sizes == {"even.png": (256, 256), "odd.png": (284, 148)}
    rows = {row["source"]: row for row in pq.read_table(tmp_path / "out" / "index.parquet").to_pylist()}
    assert (rows["even.png"]["prompt"], rows["odd.jpg"]["prompt"]) == ("a purple star", "a red circle")
    assert rows["torn.png"]["file"] is None and "truncated" in rows["torn.png"]["left_out"]


def test_a_picture_is_that_of_the_stock_pipeline(
    upscale: Upscale, pictures: Path, tmp_path: Path, run: Run, models: dict[Any, Path]
) -> None:
    """channels_last rounds otherwise than the stock layout: by 1 level at most."""
    upscale(pictures / "even.png", "out")
    nothing = {"safety_checker": None, "feature_extractor": None, "watermarker": None}
    embeds, negative = IFPipeline.from_pretrained(models[1], **nothing).encode_prompt("a purple star", device="cpu")
    settings = run.config.stage(2)
    with Image.open(pictures / "even.png") as picture:
        small = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 127.5 - 1
    stock = IFSuperResolutionPipeline.from_pretrained(models[2], text_encoder=None, tokenizer=None, **nothing)(
        prompt_embeds=embeds, negative_prompt_embeds=negative, image=small, width=256, height=256, output_type="pt",
        generator=torch.Generator().manual_seed(7), num_inference_steps=settings.validation_num_inference_steps,
        guidance_scale=settings.validation_guidance, noise_level=settings.validation_noise_level,
    ).images[0]  # fmt: skip
    with Image.open(tmp_path / "out" / "even.png") as picture:
        ours = np.asarray(picture).astype(int)
    known = ((stock.clamp(-1, 1) / 2 + 0.5) * 255).round().permute(1, 2, 0).numpy().astype(int)
    assert np.abs(ours - known).max() <= 1


def test_a_job_that_is_stopped_goes_on_and_a_picture_alone_has_the_same_bytes(
    upscale: Upscale, pictures: Path, tmp_path: Path
) -> None:
    def stop(done: int, total: int, line: str) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        upscale(pictures, "stopped", stop)
    first = (tmp_path / "stopped" / "even.png").exists()
    upscale(pictures, "stopped")
    upscale(pictures, "whole")
    upscale(pictures / "odd.jpg", "alone")
    for name in ("even.png", "odd.png"):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), first
    assert (tmp_path / "alone" / "odd.png").read_bytes() == (tmp_path / "whole" / "odd.png").read_bytes()


def _oblong(folder: Path, width: int) -> Path:
    folder.mkdir()
    pixels = np.random.default_rng(1).integers(0, 256, (2, 60, 3), np.uint8)
    Image.fromarray(pixels).resize((width, 8), Image.Resampling.BICUBIC).save(folder / "wide.png")
    return folder / "wide.png"


def test_a_picture_of_any_length_is_upscaled_and_a_kill_in_it_costs_it_alone(
    upscale: Upscale, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = _oblong(tmp_path / "wide", 1100)
    shutil.copy(pictures / "even.png", wide.parent)

    def cut(sampler: Sampler, text: torch.Tensor, negative: torch.Tensor, seeds: list[int], small: torch.Tensor) -> Any:
        if small.shape[3] > 1024:
            raise KeyboardInterrupt
        return sample_upscaled(sampler, text, negative, seeds, small)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(module_of_the_job, "sample_upscaled", cut)
        upscale(wide.parent, "stopped")
    before = (tmp_path / "stopped" / "even.png").stat().st_mtime_ns
    assert upscale(wide.parent, "stopped").pictures == 2
    assert (tmp_path / "stopped" / "even.png").stat().st_mtime_ns == before
    upscale(wide, "alone")
    assert (tmp_path / "stopped" / "wide.png").read_bytes() == (tmp_path / "alone" / "wide.png").read_bytes()
    with Image.open(wide) as small, Image.open(tmp_path / "alone" / "wide.png") as large:
        assert large.size == (4400, 32)
        again = np.asarray(large.resize(small.size, Image.Resampling.BOX)).ravel()
        assert np.corrcoef(again, np.asarray(small).ravel())[0, 1] > 0.9, "it shows what it was made of"


def test_what_does_not_fit_into_memory_is_left_out_before_it_is_decoded(
    upscale: Upscale, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = _oblong(tmp_path / "wide", 1100)
    shutil.copy(wide, wide.parent / "a.png")
    with (wide.parent / "a.png").open("r+b") as file:  # its header says that it has 30,000 x 30,000 px
        data = bytearray(file.read())
        data[16:24] = (30_000).to_bytes(4) * 2
        data[29:33] = zlib.crc32(data[12:29]).to_bytes(4)
        file.seek(0)
        file.write(data)
    monkeypatch.setattr(module_of_the_job, "device_bytes", lambda device: 40_000_000)
    lines: list[str] = []
    summary = upscale(wide.parent, "out", lambda done, total, line: lines.append(line))
    needed = 1100 * 8 * 16 * 206  # bytes, without guidance
    assert needed < 0.9 * 40e6 and summary.pictures == 1
    assert summary.left_out == {
        "a.png": "30000x30000 px take 2966.4 GB to make four times as wide and high, of 0.0 GB that may be used here: "
        "make it smaller first"
    }
    monkeypatch.setattr(module_of_the_job, "device_bytes", lambda device: int(needed / 0.9) - 2)
    assert list(upscale(wide, "less").left_out) == ["wide.png"]


def test_a_large_canvas_is_told_before_the_model_is_loaded(
    upscale: Upscale, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide, lines = _oblong(tmp_path / "wide", 300), list[str]()
    monkeypatch.setattr(forecasts, "SAID_FROM", 7_000_000)  # above the tiny model's file
    upscale(wide, "out", lambda done, total, line: lines.append(line))
    assert lines[0].endswith("pictures upscaled, with 0.0 GB of memory")


@pytest.mark.parametrize(
    ("guidance", "scheduler", "projects"), [(1.0, "unipc", False), (3.0, "unipc", False), (1.0, "ddpm", True)]
)
def test_a_canvas_takes_what_is_forecast(
    run: Run, models: dict[Any, Path], guidance: float, scheduler: str, projects: bool
) -> None:
    keys = {"validation_guidance": guidance, "validation_noise_scheduler": scheduler,
            "validation_back_projection": projects, "validation_num_inference_steps": 3}  # fmt: skip
    one = SampledStage(stage=2, settings=run.config.stage(2).model_copy(update=keys), model=models[2])
    sampler = make_sampler(one, None, run.config, lambda _: None)
    windowed = WindowedUnet(sampler.pipeline.unet)
    windowed.unet.forward = lambda sample, *_, **__: (sample * 0.9,)  # a call on a window takes nearly nothing
    sampler.pipeline.unet = windowed
    text, counted = torch.zeros(1, 77, 64), Counted([])
    with torch.no_grad(), counted:
        to_bytes(sample_upscaled(sampler, text, text, [0], torch.zeros(1, 3, 16, 1400)))
    assert 0.98 * counted.peak < canvas_bytes(2, (1400, 16), guidance) < 1.2 * counted.peak


def test_what_cannot_be_asked_for_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "note.txt").write_text("no picture")
    (tmp_path / "large.png").write_bytes(b"0" * 11)
    monkeypatch.setattr(module, "MOST_BYTES", 10)
    for path, fault in ((tmp_path / "none", "is not there"), (tmp_path / "empty", "has no pictures"),
                        (tmp_path / "large.png", "has 11 bytes; a picture to upscale may have 10")):  # fmt: skip
        with pytest.raises(ConfigError, match=fault):
            own_pictures(path, "")


def test_pictures_of_one_name_have_files_of_two(tmp_path: Path) -> None:
    for name in ("a.png", "a.jpg", "b.png"):
        (tmp_path / name).write_bytes(b"x")
    assert [one.file for one in own_pictures(tmp_path, "")] == ["a.jpg.png", "a.png.png", "b.png"]
