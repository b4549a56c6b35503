"""The table of measures is whole: every figure has its words, its column and its source, and the docs name it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clip_models import save_clip
from inputs import sample_inputs
from lpips_models import save_lpips
from small_run import SmallRun

from deepfloyd_core.config.flavours import FLAVOURS
from deepfloyd_core.config.run import RunConfig
from deepfloyd_core.config.stages import STAGES
from deepfloyd_core.measures.measure import Measure, Outputs
from deepfloyd_core.measures.registry import COLUMNS, MEASURES, NETWORKS, measures_against
from deepfloyd_core.preflight.load import load_run
from deepfloyd_core.sampling.identity import samples_request

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("measure", MEASURES, ids=lambda measure: f"{measure.name} of {measure.against}")
def test_every_measure_says_how_to_read_it(measure: Measure) -> None:
    assert (measure.better is None) == bool(measure.reading), "which way is better, or how it is read otherwise"
    assert not measure.gains or (measure.better and measure.share is None and measure.of == "picture")


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        ({}, "either compute or a network"),
        ({"compute": lambda it: 0.0, "network": NETWORKS[0]}, "either compute or a network"),
        ({"compute": lambda it: 0.0, "of": "set"}, "is of a set; compute measures one picture"),
        ({"network": NETWORKS[0], "against": "sample"}, "networks measure held-out pictures only"),
    ],
)
def test_a_measure_that_nothing_would_compute_is_refused(facts: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=rf"The measure 'sharpness' .*{says}"):
        Measure("sharpness", "sharpness", better="more", **facts)


def test_no_two_measures_of_a_kind_of_pictures_have_one_name() -> None:
    for against in ("truth", "sample"):
        names = [measure.name for measure in measures_against(against)]
        heads = [measure.label for measure in measures_against(against)]
        assert len(set(names)) == len(set(heads)) == len(names) > 2


def test_another_measure_makes_the_samples_anew(small_run: SmallRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples with fewer columns would be taken for finished ones."""
    run, folders = load_run(small_run.config), {stage: Path(FLAVOURS[f"tiny-{'i' * stage}"].repo) for stage in STAGES}
    before = samples_request(run, ["a star"], folders, sample_inputs()).fingerprint
    monkeypatch.setattr("deepfloyd_core.sampling.identity.COLUMNS", (*COLUMNS, "sharpness"))
    assert samples_request(run, ["a star"], folders, sample_inputs()).fingerprint != before


def test_a_networks_weights_are_a_key_of_the_run_file_and_it_gives_the_figures_of_its_measures(tmp_path: Path) -> None:
    weights = {
        "eval_clip_model": save_clip(tmp_path / "clip"),
        "eval_lpips_model": save_lpips(tmp_path / "a.safetensors"),
    }
    assert {network.key for network in NETWORKS} == weights.keys() <= RunConfig.model_fields.keys()
    pictures = list(np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8))
    outputs = Outputs({("bicubic", None): pictures, ("tuned", 0): pictures[::-1]}, pictures)
    for network in NETWORKS:
        network.check(weights[network.key])
        figures = network.load(weights[network.key], torch.device("cpu"))(outputs)
        of = {measure.name: measure.of for measure in MEASURES if measure.network is network}
        assert of == {**dict.fromkeys(figures.of_pictures, "picture"), **dict.fromkeys(figures.of_sets, "set")}
        for by_enlargement in (*figures.of_pictures.values(), *figures.of_sets.values()):
            assert by_enlargement.keys() == outputs.pictures.keys()


def test_the_docs_have_every_measure() -> None:
    page = (ROOT / "docs/training.md").read_text()
    for measure in MEASURES:
        kinds = {"truth": "held-out, spoilt", "sample": "stage1"}[measure.against]
        assert f"\n| `{measure.name}` | {kinds} | {measure.meaning} |\n" in page, measure.name
