"""Which pictures each variant of Stage II is given, and that all of them are reported; the models are stood in for."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from artifact_rows import SOME_EVAL_SET
from clip_models import features, save_clip
from data_world import DataWorld
from inputs import sample_inputs, training_inputs
from lpips_models import lpips_by_hand, save_lpips
from narrowing import known
from PIL import Image
from small_run import SmallRun

from deepfloyd_core.config.flavours import FLAVOURS
from deepfloyd_core.config.run import Run
from deepfloyd_core.config.run_machine import Machine
from deepfloyd_core.config.stages import STAGES
from deepfloyd_core.crops.rows import shard_files
from deepfloyd_core.crops.shards import open_shard
from deepfloyd_core.diffusion.loss import low_res, to_bytes, to_model_range
from deepfloyd_core.measures.comparison import enlarged
from deepfloyd_core.measures.registry import measures_against
from deepfloyd_core.preflight.load import load_run
from deepfloyd_core.processes.jobs import Job
from deepfloyd_core.sampling import cascade as samples
from deepfloyd_core.sampling import cascade_draws
from deepfloyd_core.sampling.identity import samples_request
from deepfloyd_core.sampling.jobs import SampledStage, SampleInputs, SamplesSummary, sample_job
from deepfloyd_core.store.artifacts import Artifact, Request
from deepfloyd_core.training.identity import lora_request
from deepfloyd_core.types import Json, Report


@dataclass(frozen=True)
class StandIn:
    """Draws plain colours: Stage I one for each variant, Stage II the low-res picture, brighter by its noise level."""

    stage: int
    variant: str
    sampled: Callable[[int], None]
    level: int = 20

    def at(self, level: int) -> "StandIn":
        return replace(self, level=level)


@pytest.fixture
def stood_in(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Replaces the models; lists what Stage II was asked: variant, level, seeds, size and mean of plain low-res pictures."""
    asked: list[tuple[Any, ...]] = []

    def make(
        one: SampledStage, lora: Path | None, machine: Machine, sampled: Callable[[int], None], gpu: int
    ) -> StandIn:
        return StandIn(one.stage, "tuned" if lora else "base", sampled)

    def first(
        sampler: StandIn,
        text: torch.Tensor,
        negative: torch.Tensor,
        seeds: list[int],
        size: tuple[int, int],
        given: torch.Tensor | None,
    ) -> torch.Tensor:
        if sampler.stage == 2:
            assert given is not None
            return second(sampler, seeds, given)
        sampler.sampled(len(seeds))
        return torch.full((len(seeds), 3, size[1], size[0]), {"base": -0.5, "tuned": 0.25}[sampler.variant])

    def second(sampler: StandIn, seeds: list[int], small: torch.Tensor) -> torch.Tensor:
        sampler.sampled(len(seeds))
        if float(small.std()) == 0:
            asked.append((sampler.variant, sampler.level, *seeds, tuple(small.shape[-2:]), float(small.mean())))
        return (F.interpolate(small, scale_factor=4) + sampler.level / 100).clamp(-1, 1)

    for name, stand_in in {"make_sampler": make, "sample": first}.items():
        monkeypatch.setattr(cascade_draws, name, stand_in)
    monkeypatch.setattr(
        cascade_draws, "prompt_embeds", lambda job, prompts: (torch.zeros(len(prompts)), torch.zeros(len(prompts)))
    )
    return asked


def sampled(run: Run, held_out: Artifact, out: Path, report: Report) -> SamplesSummary:
    """What the job makes; of LoRAs and embeds only the folders are asked for, which are any."""
    inputs = SampleInputs(text_embeds=held_out, eval_set=held_out, stage1_lora=held_out, stage2_lora=held_out)
    request = sample_job(run, ["a purple star"], {1: Path(), 2: Path()}, inputs)
    return samples.sample_cascade(Job(request, out, report))


def test_both_variants_of_stage2_enlarge_the_tuned_stage1s_samples(
    small_run: SmallRun, new_world: Callable[[Path], DataWorld], stood_in: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    keys = ("stage2.validation_noise_level=20", "stage2.validation_noise_levels=[0, 20]", "num_upscaled_images=3")
    two = ("num_eval_images=2", "num_validation_images=2", 'validation_resolution="64,96x64"')
    run = load_run(small_run.config, (*keys, *two))
    world = new_world(run.workspace)
    held_out = world.eval_set(run, world.index(run))
    reports: list[tuple[int, int, str]] = []
    summary = sampled(run, held_out, tmp_path, lambda *report: reports.append(report))

    tuned = [("tuned", level, *part) for level in (20, 0) for part in ((0, 1, (64, 64), 0.25), (0, (64, 96), 0.25))]
    own = [("base", 20, 0, 1, (64, 64), -0.5), ("base", 20, 0, (64, 96), -0.5)]
    assert Counter(stood_in) == Counter([*tuned, *(("base", *asked[1:]) for asked in tuned), *own])
    measured = 2 * held_out.manifest.summary["pictures"]  # at two levels
    parts = {
        "Stage I's samples, base": 4, "Stage I's samples, tuned": 4, "Stage II's samples, base": 3 * 3,
        "Stage II's samples, tuned": 3 * 2, "held-out pictures upscaled, base": measured,
        "held-out pictures upscaled, tuned": measured,
    }  # fmt: skip
    told = [(count, count, f"part {number} of 6: {what}") for number, (what, count) in enumerate(parts.items(), 1)]
    assert [report for report in reports if report[0] == report[1]] == told
    assert reports[0] == (0, 4, told[0][2]), "told before anything is made"

    levels = summary.samples.by_level if summary.samples else {}
    assert {level: round(known(found.upscaled["base"]["colour_shift"])) for level, found in levels.items()} == {
        20: 26,
        0: 0,
    }
    assert levels[0].upscaled["tuned"] == {
        "consistency": 100.0, "colour_shift": 0.0, "colour_spread": 0.0, "detail_share": None,
    }  # fmt: skip
    table = pq.read_table(tmp_path / "eval.parquet").to_pylist()
    assert [row["image_id"] for row in table if row["low_res"] == "stage1" and row["way"] == "bilinear"] == [
        "a purple star, seed 0, 64x64", "a purple star, seed 1, 64x64", "a purple star, seed 0, 96x64",
    ]  # fmt: skip


def test_what_is_spoilt_in_training_is_measured_spoilt_and_reported(
    small_run: SmallRun, new_world: Callable[[Path], DataWorld], stood_in: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    run = load_run(small_run.config, ("stage2.low_res_noise=40", "num_upscaled_images=1"))
    world = new_world(run.workspace)
    held_out = world.eval_set(run, world.index(run))
    reports: list[tuple[int, int]] = []
    summary = sampled(run, held_out, tmp_path, lambda done, total, text: reports.append((done, total)))
    assert summary.held_out and summary.spoilt
    assert reports[-1][0] == reports[-1][1]
    true, spoilt = (found.upscaled["bicubic"] for found in (summary.held_out, summary.spoilt))
    for name, fall in (("psnr", 1), ("consistency", 5)):
        assert known(spoilt[name]) < known(true[name]) - fall, name
    rows = pq.read_table(tmp_path / "eval.parquet").to_pylist()
    ways = Counter(row["way"] for row in rows if row["low_res"] == "spoilt")
    assert ways == dict.fromkeys(("bilinear", "bicubic", "base", "tuned"), held_out.manifest.summary["pictures"])


def test_what_clip_and_lpips_see_of_the_held_out_pictures_is_measured_where_there_are_models(
    small_run: SmallRun, new_world: Callable[[Path], DataWorld], stood_in: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    """Plain enlargements against Pillow's, transformers' own features of them, and LPIPS written out."""
    folder, weights = save_clip(tmp_path / "clip"), save_lpips(tmp_path / "alex.safetensors")
    keys = (f"eval_clip_model={folder}", f"eval_lpips_model={weights}", "stage2.validation_noise_levels=[60]")
    run = load_run(small_run.config, (*keys, "num_upscaled_images=1"))
    world = new_world(run.workspace)
    held_out = world.eval_set(run, world.index(run))
    out = tmp_path / "out"
    out.mkdir()
    summary = sampled(run, held_out, out, lambda done, total, text: None).held_out
    assert summary

    (file,) = shard_files(held_out, 2)
    truths, rows = open_shard(file).all(), pq.read_table(out / "eval.parquet").to_pylist()
    for way, how in (("bilinear", Image.Resampling.BILINEAR), ("bicubic", Image.Resampling.BICUBIC)):
        small = [Image.fromarray(truth).resize((64, 64), Image.Resampling.BICUBIC) for truth in truths]
        large = [np.asarray(picture.resize((256, 256), how)) for picture in small]
        expected = (features(folder, large) * features(folder, list(truths))).sum(1)
        found = [row["clip"] for row in rows if row["way"] == way and row["low_res"] == "held-out"]
        np.testing.assert_allclose(found, expected, atol=2e-3)
        assert summary.upscaled[way]["clip"] == pytest.approx(float(np.mean(expected)), abs=2e-3)
        assert summary.upscaled[way]["clip_distance"] is None, "too few pictures"
    assert all(row["clip"] is row["lpips"] is None for row in rows if row["low_res"] == "stage1")

    true = to_model_range(torch.from_numpy(truths))
    bilinear, levels = to_bytes(enlarged(low_res(true), "bilinear")).numpy(), summary.by_level
    for level in (100, 60):
        by_model = to_bytes((F.interpolate(low_res(true), scale_factor=4) + level / 100).clamp(-1, 1)).numpy()
        apart = {}
        for way, made, of in (("bilinear", bilinear, None), ("tuned", by_model, level)):
            apart[way] = [lpips_by_hand(weights, "alex", *pair) for pair in zip(made, truths, strict=True)]
            wanted = ("held-out", way, of)
            found = [row["lpips"] for row in rows if (row["low_res"], row["way"], row["noise_level"]) == wanted]
            np.testing.assert_allclose(found, apart[way], rtol=1e-4)
            assert levels[level].upscaled[way]["lpips"] == pytest.approx(float(np.mean(apart[way])), abs=1e-4)
        less = float(np.mean(apart["bilinear"]) - np.mean(apart["tuned"]))
        assert abs(less) > 0.01
        gain = levels[level].gain
        assert gain["bilinear"]["lpips"] == pytest.approx((less,), abs=2e-4), "more than 0 if the tuned one is nearer"
        assert list(gain["base"]) == ["psnr", "ssim", "clip", "lpips"]
        assert set(levels[level].upscaled["base"]) == {measure.name for measure in measures_against("truth")}


def test_other_weights_of_lpips_make_the_samples_anew(
    small_run: SmallRun, new_world: Callable[[Path], DataWorld], tmp_path: Path
) -> None:
    """By their bytes: a copy elsewhere is the same; without the key the samples are others again."""
    paths = [tmp_path / name for name in ("one.safetensors", "copy.safetensors", "other.safetensors")]
    for path, seed in zip(paths, (0, 0, 1), strict=True):
        save_lpips(path, seed=seed)
    keys = [(), *((f"eval_lpips_model={path}",) for path in paths)]
    folders = {stage: Path(FLAVOURS[f"tiny-{'i' * stage}"].repo) for stage in STAGES}
    requests = [samples_request(load_run(small_run.config, key), ["a star"], folders, sample_inputs()) for key in keys]
    without, one, copy, other = (request.fingerprint for request in requests)
    assert one == copy and len({without, one, other}) == 3


def test_a_fingerprint_of_stage2s_lora_has_back_projection_where_it_is_of_the_guesses(small_run: SmallRun) -> None:
    text = Request("stage2_text", 1, {}, {"text_embeds": "0", "unet": "0"})

    def spec(**keys: Any) -> Json:
        run = load_run(small_run.config, tuple(f"stage2.{key}={json.dumps(value)}" for key, value in keys.items()))
        return lora_request(
            run, 2, Path(FLAVOURS["tiny-ii"].repo), training_inputs(text=text, eval_set=SOME_EVAL_SET)
        ).spec

    plain, projected = spec(snr_gamma=5), {"validation_back_projection": True}
    assert "back_projection" not in plain
    assert spec(snr_gamma=5, **projected) == plain, "it is in the samples alone"
    rolled = {"snr_gamma": 5, "scheduled_sampling_max_step_offset": 9, "scheduled_sampling_probability": 0.5}
    added = {**{key: value for key, value in rolled.items() if key != "snr_gamma"}, "back_projection": False}
    assert spec(**rolled) == {**plain, **added}
    assert spec(**rolled, **projected) == {**plain, **added, "back_projection": True}
    assert spec(snr_gamma=5, stage2_patch=64) == {**plain, "stage2_patch": 64}
