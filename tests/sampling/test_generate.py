"""The job `generate` on the tiny cascade: a picture has the same bytes whatever is drawn beside it, and after a stop."""

import json
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import IFPipeline, IFSuperResolutionPipeline
from drawn_here import texts_here
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from small_run import NewSmallRun

from deepfloyd_core.config.run import Run
from deepfloyd_core.errors import ConfigError
from deepfloyd_core.preflight.generate import GenerateOptions, pictures_of
from deepfloyd_core.preflight.load import load_run
from deepfloyd_core.processes.jobs import Job
from deepfloyd_core.sampling import generate as module
from deepfloyd_core.sampling import jobs, stored
from deepfloyd_core.sampling.drawn_picture import drawn_picture
from deepfloyd_core.sampling.generate import generate_pictures
from deepfloyd_core.sampling.identity import generate_request
from deepfloyd_core.sampling.jobs import GenerateRequest, SampledStage, generate_job
from deepfloyd_core.sampling.sampler import make_sampler
from deepfloyd_core.store.artifacts import Artifact, materialise
from deepfloyd_core.text.embeds import embeds_request, embeds_to_draw_with, encode_job
from deepfloyd_core.text.encode import encode_captions, encode_prompts
from deepfloyd_core.types import Report, no_report

OPTIONS = GenerateOptions(("a purple star", "a red circle"), "base", seeds="3", sizes="64,72x64")
COUNT = 4  # pictures of each stage

Drawn = dict[str, bytes]
Draw = Callable[..., Drawn]


@pytest.fixture(scope="module")
def draw(run: Run, models: dict[Any, Path]) -> Draw:
    """Do the job in this process. Returns its PNGs by name."""

    def drawn(options: GenerateOptions, out: Path, report: Report = no_report) -> Drawn:
        out.mkdir(exist_ok=True)
        pictures = pictures_of(run, options)
        identity = generate_request(run, pictures, "base", models, None)
        request: GenerateRequest = generate_job(run, pictures, "base", models, identity, None)
        texts_here(request, out)
        summary = generate_pictures(Job(request, out, report))
        files = {file.name: file.read_bytes() for file in out.glob("picture-*.png")}
        assert len(files) == summary.pictures * len(summary.stages)
        return files

    return drawn


@pytest.fixture(scope="module")
def whole(draw: Draw, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Drawn]:
    """What OPTIONS ask for, and where it is."""
    out = tmp_path_factory.mktemp("generate") / "whole"
    return out, draw(OPTIONS, out)


def test_a_picture_has_the_same_bytes_alone_and_among_others(
    draw: Draw, whole: tuple[Path, Drawn], tmp_path: Path
) -> None:
    assert draw(GenerateOptions(("a red circle",), "base", seeds="3", sizes="72x64"), tmp_path / "alone") == {
        "picture-000-seed-3-72x64.png": whole[1]["picture-003-seed-3-72x64.png"],
        "picture-000-seed-3-288x256.png": whole[1]["picture-003-seed-3-288x256.png"],
    }


@pytest.mark.parametrize("stops_after", [2, 6])
def test_a_job_that_is_stopped_goes_on_with_the_first_picture_that_is_missing(
    draw: Draw, whole: tuple[Path, Drawn], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stops_after: int
) -> None:
    out, lines = tmp_path / "stopped", list[tuple[int, int]]()

    def stop(done: int, total: int, line: str) -> None:
        if len(list(out.glob("picture-*.png"))) == stops_after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw(OPTIONS, out, stop)
    before = {file: file.stat().st_mtime_ns for file in out.glob("picture-*.png")}
    assert len(before) == stops_after
    if stops_after > COUNT:  # and one that a disk has damaged, for people or for the next stage
        file = out / "picture-001-seed-3-72x64.png"
        file.write_bytes(file.read_bytes()[:-1])
        (out / ".drawn" / "stage1-0.safetensors").write_bytes(b"")
    with monkeypatch.context() as patched:
        patched.setattr(stored, "encode_prompts", lambda *_: pytest.fail("the texts are encoded already"))
        assert draw(OPTIONS, out, lambda done, total, _: lines.append((done, total))) == whole[1]
    if stops_after < COUNT:
        assert {file: file.stat().st_mtime_ns for file in before} == before
        assert lines[0] == (stops_after, COUNT)


def test_one_stage_is_in_memory_at_a_time(draw: Draw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    make = make_sampler

    def loaded(one: SampledStage, *more: Any) -> Any:
        assert all(ref() is None for ref in held), "the one before is gone"
        order.append(f"stage {one.stage}")
        sampler = make(one, *more)
        held.append(weakref.ref(sampler.pipeline.unet))
        return sampler

    held: list[weakref.ref[Any]] = []
    monkeypatch.setattr(module, "make_sampler", loaded)
    draw(GenerateOptions(("a red circle",), "base"), tmp_path / "out")
    assert order == ["stage 1", "stage 2"]


def test_texts_of_the_workspace_are_not_encoded_again(
    draw: Draw,
    whole: tuple[Path, Drawn],
    run: Run,
    models: dict[Any, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known = [*OPTIONS.prompts, "another caption", ""]
    embeds = materialise(
        tmp_path / "workspace", embeds_request(run, known, models[1]),
        lambda work: encode_captions(Job(encode_job(run, known, models[1]), work.path, no_report)),
    )  # fmt: skip
    asked: list[str] = []
    monkeypatch.setattr(jobs, "embeds_to_draw_with", lambda run, encoder: embeds)

    def encoded(texts: list[str], *more: Any) -> torch.Tensor:
        asked.extend(texts)
        return encode_prompts(texts, *more)

    monkeypatch.setattr(stored, "encode_prompts", encoded)
    assert draw(OPTIONS, tmp_path / "known") == whole[1] and asked == []
    draw(GenerateOptions((*OPTIONS.prompts, "a green square"), "base", seeds="3"), tmp_path / "one-more")
    assert asked == ["a green square"]


def test_the_workspace_s_embeds_are_those_of_the_same_encoder(
    run: Run, models: dict[Any, Path], new_small_run: NewSmallRun, tmp_path: Path
) -> None:
    own = new_small_run(tmp_path / "own", 2)

    def found(*keys: str) -> Artifact | None:
        return embeds_to_draw_with(load_run(own.config, keys), models[1])

    assert found() is None
    made = materialise(
        own.workspace, embeds_request(load_run(own.config), ["a star"], models[1]),
        lambda work: encode_captions(Job(encode_job(load_run(own.config), ["a star"], models[1]), work.path, no_report)),
    )  # fmt: skip
    assert found() == found("embed_file_mib=7", "seed=3") == made
    assert found("tokenizer_max_length=80") is None and found("text_encoder_dtype=bf16") is None
    (file,) = made.path.glob("embeds-*.arrow")
    whole = file.read_bytes()
    file.write_bytes(whole[:-999] + bytes([whole[-999] ^ 1]) + whole[-998:])
    assert found() is None, "no picture is drawn with a text that the disk has changed"


def test_pictures_are_those_of_the_stock_pipelines(
    whole: tuple[Path, Drawn], models: dict[Any, Path], run: Run
) -> None:
    """channels_last rounds otherwise than the stock layout: by 1 level at most."""
    one, two = (run.config.stage(stage) for stage in run.config.stages)
    text = IFPipeline.from_pretrained(models[1], safety_checker=None, feature_extractor=None, watermarker=None)
    embeds, negative = text.encode_prompt("a purple star", device="cpu")
    common = {"prompt_embeds": embeds, "negative_prompt_embeds": negative, "output_type": "pt"}
    small = text(
        **common, width=72, height=64, generator=torch.Generator().manual_seed(3),
        num_inference_steps=one.validation_num_inference_steps, guidance_scale=one.validation_guidance,
    ).images  # fmt: skip
    upscaler = IFSuperResolutionPipeline.from_pretrained(
        models[2], text_encoder=None, tokenizer=None, safety_checker=None, feature_extractor=None, watermarker=None
    )
    large = upscaler(
        **common, width=288, height=256, image=small, generator=torch.Generator().manual_seed(3),
        num_inference_steps=two.validation_num_inference_steps, guidance_scale=two.validation_guidance,
        noise_level=two.validation_noise_level,
    ).images  # fmt: skip
    for made, name in ((small, "72x64"), (large, "288x256")):
        with Image.open(whole[0] / f"picture-001-seed-3-{name}.png") as picture:
            ours = np.asarray(picture).astype(int)
        stock = ((made[0].clamp(-1, 1) / 2 + 0.5) * 255).round().permute(1, 2, 0).numpy().astype(int)
        assert np.abs(ours - stock).max() <= 1


def test_a_picture_is_not_drawn_again_with_other_models_or_settings(
    whole: tuple[Path, Drawn], models: dict[Any, Path], run: Run
) -> None:
    drawn = drawn_picture(whole[0] / "picture-003-seed-3-288x256.png")
    assert (drawn.prompt, drawn.seed, drawn.version, drawn.stage, drawn.size) == (
        "a red circle",
        3,
        "base",
        2,
        (72, 64),
    )
    same = generate_request(run, pictures_of(run, GenerateOptions(("another",), "base")), "base", models, None)
    drawn.check(same)
    for other, name in (
        (replace(same, inputs={**same.inputs, "stage1_model": "0" * 16}), "stage1_model"),
        (replace(same, spec={**same.spec, "tokenizer_max_length": 128}), "tokenizer_max_length"),
    ):
        with pytest.raises(ConfigError, match=f"cannot be drawn again: {name} is not what it was drawn with"):
            drawn.check(other)
    assert load_run(run.workspace.parent / "run.toml", tuple(drawn.overrides())).config == run.config


def test_what_was_drawn_is_listed_and_each_file_says_how(whole: tuple[Path, Drawn]) -> None:
    out, _ = whole
    rows = pq.read_table(out / "index.parquet").to_pylist()
    assert len(rows) == 2 * COUNT and {(row["stage"], row["width"], row["height"]) for row in rows} == {
        (1, 64, 64), (1, 72, 64), (2, 256, 256), (2, 288, 256),
    }  # fmt: skip
    for row in rows:
        with Image.open(out / row["file"]) as picture:
            assert picture.size == (row["width"], row["height"])
            lines = str(picture.info["parameters"]).splitlines()
        assert lines[0] == row["prompt"] and lines[1] == "Negative prompt: "
        assert f"Seed: {row['seed']}, Size: {row['width']}x{row['height']}" in lines[2] and "Model: tiny-i" in lines[2]
    with Image.open(out / "sheet.png") as sheet:
        assert sheet.width < 400 and sheet.height > 4 * 128


@pytest.mark.parametrize(
    "changed",
    [
        {"workspace": "/elsewhere"}, {"stage2": {"pretrained_model_name_or_path": "owner/name"}},
        {"stage3": {"pretrained_model_name_or_path": "owner/name"}}, {"stage1": None, "stage2": None},
        {"loras": [[1]]}, {"loras": ["x"]}, {"mask": 3}, "nested",
    ],
    ids=str,
)  # fmt: skip
def test_a_record_that_was_written_by_hand_sets_nothing_else(
    whole: tuple[Path, Drawn], tmp_path: Path, changed: Any
) -> None:
    with Image.open(whole[0] / "picture-003-seed-3-288x256.png") as picture:
        record = json.loads(picture.info["deepfloyd"])
        settings = record["drawn_with"]["settings"]
        text = "[" * 100_000
        if isinstance(changed, dict):
            settings |= changed
            record["drawn_with"]["settings"] = {key: value for key, value in settings.items() if value is not None}
            text = json.dumps(record)
        info = PngInfo()
        info.add_itxt("deepfloyd", text)
        picture.save(tmp_path / "written.png", pnginfo=info)
    with pytest.raises(ConfigError, match="was not drawn by `deepfloyd generate`: it has no record of that"):
        drawn_picture(tmp_path / "written.png")
