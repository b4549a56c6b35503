"""The job `upscale` on the tiny cascade: any size, captions beside pictures, faults that cost one picture, and a stop."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import IFPipeline, IFSuperResolutionPipeline
from PIL import Image

from deepfloyd_core.config.run import Run
from deepfloyd_core.errors import ConfigError
from deepfloyd_core.processes.jobs import Job
from deepfloyd_core.sampling import own_pictures as module
from deepfloyd_core.sampling.own_pictures import own_pictures, upscaled_files
from deepfloyd_core.sampling.upscale import upscale_pictures
from deepfloyd_core.sampling.upscale_jobs import UpscaledSummary, upscale_job
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
