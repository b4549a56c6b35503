"""`diff` of two versions: pictures, settings, figures, and samples of the same seeds in one picture."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from candidates import Candidate
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from releases import deepfloyd
from small_run import SmallRun

from deepfloyd_core.bundle.identity import BundleSummary
from deepfloyd_core.errors import ConfigError
from deepfloyd_core.index.summary import IndexSummary
from deepfloyd_core.store.artifacts import Artifact, Request, WorkDir, materialise
from deepfloyd_core.store.manifest import Summary
from deepfloyd_core.store.registry import publish


def ledger(pictures: dict[str, str]) -> pa.Table:
    """The rows of accepted pictures: their names and captions."""
    rows = [{"dataset_id": "stars", "source": name, "status": "accepted", "image_id": name, "captions": [caption]}
            for name, caption in pictures.items()]  # fmt: skip
    return pa.Table.from_pylist(rows)


def sample(path: Path, prompt: str, seed: int, colour: tuple[int, int, int]) -> None:
    """A stored sample."""
    info = PngInfo()
    info.add_itxt("deepfloyd", json.dumps({"prompt": prompt, "seed": seed}))
    Image.fromarray(np.full((64, 64, 3), colour, np.uint8)).save(path, "PNG", pnginfo=info)


def published(
    workspace: Path, candidate: Candidate, pictures: dict[str, str], rate: float, seeds: dict[int, tuple[int, int, int]]
) -> None:
    """A version of a candidate's figures, with a list of pictures, a learning rate and samples."""

    def made(kind: str, spec: dict[str, Any], build: Any, *inputs: Artifact) -> Artifact:
        request = Request(kind, 1, spec, {one.kind: one.name for one in inputs} | {"data": "1" * 16})
        return materialise(workspace, request, build)

    def index(work: WorkDir) -> Summary:
        pq.write_table(ledger(pictures), work.path / "index.parquet")
        return candidate.index(workspace).summary(IndexSummary)

    def samples(work: WorkDir) -> Summary:
        (work.path / "stage1").mkdir()
        for number, (seed, colour) in enumerate(seeds.items()):
            sample(work.path / "stage1" / f"base-{number:03d}.png", "a star", seed, (90, 90, 90))
            sample(work.path / "stage1" / f"tuned-{number:03d}.png", "a star", seed, colour)
        return Summary()

    def bundle(work: WorkDir) -> Summary:
        source = candidate.bundle(workspace)
        for name in source.hashes:
            (work.path / name).parent.mkdir(exist_ok=True)
            (work.path / name).write_bytes((source.path / name).read_bytes())
        return source.summary(BundleSummary)

    indexed = made("image_index", {"of": pictures}, index)
    lora = made("stage1_lora", {"learning_rate": rate, "lora_rank": 4}, lambda work: Summary(), indexed)
    sampled = made("cascade_samples", {}, samples, lora)
    publish(workspace, made("lora_bundle", {}, bundle, indexed, lora, sampled), indexed)


@pytest.fixture
def workspace(small_run: SmallRun) -> Path:
    """One with two versions."""
    first = {"a.png": "a star", "b.png": "a star", "c.png": "a star"}
    second = {"b.png": "a star", "c.png": "a red star", "d.png": "a star", "e.png": "a star"}
    folder = small_run.workspace
    published(folder, Candidate(), first, 1e-3, {0: (200, 0, 0), 1: (0, 200, 0)})
    better = Candidate(loss=-0.06, psnr=1.5, seed=1, forgotten=0.025, shift=-1.5)
    published(folder, better, second, 2e-3, {1: (0, 0, 200), 2: (0, 200, 200)})
    return folder


def test_pictures_captions_settings_and_figures_of_two_versions_are_told(workspace: Path) -> None:
    done = deepfloyd("diff", str(workspace), "1", "2")
    assert done.exit_code == 0, done.exception
    lines = [line.strip() for line in done.output.splitlines()]
    for line in (
        "2 pictures added: d.png, e.png", "1 picture withdrawn: a.png", "1 caption changed: c.png",
        "stage1.learning_rate 0.001 -> 0.002",
    ):  # fmt: skip
        assert line in lines
    (loss,) = (line for line in lines if line.startswith("Stage I: held-out loss"))
    assert loss.split()[7:9] == ["0.45", "0.44"] and "-0.01" in loss and "95 %, 12 pictures" in loss
    (psnr,) = (line for line in lines if line.startswith("Stage II: PSNR to the truth"))
    assert "+0.50 (+0.50 to +0.50" in psnr
    (colour,) = (line for line in lines if line.startswith("Stage II: difference in mean colour"))
    assert "-1.00 (-1.00 to -1.00" in colour
    (forgot,) = (line for line in lines if line.startswith("loss on the base's own pictures, less is better"))
    assert "-0.00" in forgot and "95 %, 8 pictures" in forgot
    back = deepfloyd("diff", str(workspace), "2", "1").output
    assert "2 pictures withdrawn: d.png, e.png" in back and "+0.01" in back


def test_the_picture_has_the_seeds_that_both_versions_drew_one_below_the_other(workspace: Path) -> None:
    printed = deepfloyd("diff", str(workspace), "1", "2").output
    path = workspace / "diff_1_2.png"
    assert f"1 sample of the same seeds, side by side: {path}" in printed
    sheet = np.asarray(Image.open(path).convert("RGB"))
    colours = [tuple(int(value) for value in row) for row in sheet[:, sheet.shape[1] // 2]]
    drawn = list(dict.fromkeys(one for one in colours if one in {(90, 90, 90), (0, 200, 0), (0, 0, 200), (200, 0, 0)}))
    assert drawn == [(90, 90, 90), (0, 200, 0), (0, 0, 200)], "of seed 1: the base, version 1, version 2"


def test_versions_without_a_common_seed_have_no_picture_and_one_that_is_not_there_is_refused(workspace: Path) -> None:
    published(workspace, Candidate(seed=2), {"z.png": "a star"}, 1e-3, {7: (0, 0, 0)})
    printed = deepfloyd("diff", str(workspace), "1", "3").output
    assert "no sample has the same prompt, seed and size in both" in printed
    assert not (workspace / "diff_1_3.png").exists()
    refused = deepfloyd("diff", str(workspace), "1", "9")
    assert isinstance(refused.exception, ConfigError) and "published: 1, 2, 3" in str(refused.exception)
