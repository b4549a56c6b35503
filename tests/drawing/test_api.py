"""Pictures through `deepfloyd_core.api`: those of the command line, without Prefect."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from command_here import ForkServerHere
from draws_here import draw_in_this_process
from PIL import Image
from small_run import SmallRun

from deepfloyd_core.api import GenerateOptions, UpscaleOptions, generate, upscale
from deepfloyd_core.errors import ConfigError
from deepfloyd_core.processes import jobs
from deepfloyd_core.sampling import generate as sampling_generate
from deepfloyd_core.sampling import stored
from deepfloyd_core.sampling import upscale as sampling_upscale
from deepfloyd_core.sampling.jobs import SampledStage
from deepfloyd_core.text.encode import encode_prompts


@pytest.mark.slow
def test_a_script_draws_what_the_command_draws_and_upscales_it(small_run: SmallRun, tmp_path: Path) -> None:
    options = GenerateOptions(("a red circle",), "base", seeds="4")
    small, large = generate(small_run.config, options)
    with Image.open(small) as picture, Image.open(large) as other:
        assert (picture.size, other.size) == ((64, 64), (256, 256))
        assert json.loads(picture.info["deepfloyd"])["seed"] == 4
    before = small.stat().st_mtime_ns
    assert generate(str(small_run.config), options) == [small, large] and small.stat().st_mtime_ns == before
    done = small_run.call_here(
        "generate", str(small_run.config), "--prompt", "a red circle", "--version", "base", "--seeds", "4"
    )
    assert [Path(line) for line in done.stdout.split()] == [small, large], done.stderr
    (again,) = upscale(small_run.config, UpscaleOptions(small, "base", "a red circle"))
    with Image.open(again) as picture:
        assert picture.size == (256, 256)


def test_the_text_encoder_has_a_process_of_its_own_that_ends_before_a_stage_is_loaded(
    small_run: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its memory is free then, to the last byte."""
    seen, encode = tmp_path / "seen", encode_prompts

    def encoded(texts: list[str], *more: Any) -> Any:
        seen.write_text(f"{os.getpid()} {texts}")
        return encode(texts, *more)

    def stage(make: Callable[..., Any]) -> Callable[..., Any]:
        def loaded(one: SampledStage, *more: Any) -> Any:
            encoder, texts = seen.read_text().split(maxsplit=1)
            (tmp_path / f"stage{one.stage}").write_text(f"{psutil.pid_exists(int(encoder))} {texts}")
            return make(one, *more)

        return loaded

    monkeypatch.setattr(jobs, "ForkServer", ForkServerHere)  # real processes, which have imported already
    monkeypatch.setattr(stored, "encode_prompts", encoded)
    for job in (sampling_generate, sampling_upscale):
        monkeypatch.setattr(job, "make_sampler", stage(job.make_sampler))
    small, _ = generate(small_run.config, GenerateOptions(("a red circle",), "base", seeds="4"))
    for number in (1, 2):
        assert (tmp_path / f"stage{number}").read_text() == "False ['a red circle', '']"
    upscale(small_run.config, UpscaleOptions(small, "base", "another"))
    assert (tmp_path / "stage2").read_text() == "False ['another', '']"


def test_what_cannot_be_drawn_is_told_before_a_model_is_loaded(small_run: SmallRun) -> None:
    with pytest.raises(ConfigError, match="There is no version '7'"):
        generate(small_run.config, GenerateOptions(("x",), "7"))
    with pytest.raises(ConfigError, match="is not there"):
        upscale(small_run.config, UpscaleOptions(Path("nothing"), "base"))


def test_a_run_file_of_three_lines_draws_and_upscales(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw_in_this_process(monkeypatch)
    run_file = tmp_path / "mine.toml"
    run_file.write_text(
        f'workspace = "{tmp_path}/workspace"\nstage1.model_flavour = "tiny-i"\nstage2.model_flavour = "tiny-ii"\n'
    )
    quick = ("device=cpu", "num_threads=1", *(f"stage{stage}.validation_num_inference_steps=2" for stage in (1, 2)))
    small, large = generate(run_file, GenerateOptions(("a red circle",), "base"), quick)
    (again,) = upscale(run_file, UpscaleOptions(small, "base"), quick)
    for file, size in ((small, 64), (large, 256), (again, 256)):
        with Image.open(file) as picture:
            assert picture.size == (size, size)
