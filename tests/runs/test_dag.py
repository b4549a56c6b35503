"""The flows make each artifact from what `planned` says, by which `retrain` decides; no artifact is made here."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from data_world import DataWorld

from deepfloyd_core.bundle.planned import planned, sample_prompts
from deepfloyd_core.config.run import Run
from deepfloyd_core.config.stages import Stage
from deepfloyd_core.store.artifacts import Artifact
from deepfloyd_core.store.registry import Outcome
from deepfloyd_core.text.projection import text_is_frozen
from flows import dag, finetune

PAIRED = {"model_flavour": "tiny-i", "controlnet": True, "controlnet_conditioning": "paired"}
REMADE = {"model_flavour": "tiny-ii", "low_res_stage1_share": 0.5}
RUNS: dict[str, dict[str, Any]] = {
    "both stages": {},
    "Stage II alone": {"stages": (2,)},
    "a low-res picture of Stage I's": {"stage2": REMADE},
    "a text module that is trained": {"stage1": {"model_flavour": "tiny-i", "model_type": "full"}},
    "a ControlNet's pairs": {"stage1": PAIRED},
}


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, str]]:
    """By the kind of each artifact that the flows ask for the kinds that it is made from, by name; in their order."""
    made: dict[str, dict[str, str]] = {}

    def make(kind: str, **inputs: Artifact) -> Artifact:
        made[kind] = {name: artifact.kind for name, artifact in inputs.items()}
        return Artifact(kind, "0" * 16, Path("nowhere"))

    def text(run: Run, stage: Stage, embeds: Artifact) -> Artifact:
        frozen = text_is_frozen(run.config.stage(stage))
        return make(f"stage{stage}_text", text_embeds=embeds) if frozen else embeds

    fakes: dict[str, Callable[..., Artifact]] = {
        "dag.stage_pixels": lambda run, index, stage: make(f"stage{stage}_pixels"),
        "dag.eval_set": lambda run, index: make("eval_set"),
        "dag.stage_conditioning": lambda run, index, crops: make("stage1_conditioning", crops=crops),
        "dag.eval_conditioning": lambda run, index, crops: make("eval_conditioning", crops=crops),
        "dag.stage_text": text,
        "dag.stage_low_res": lambda run, stage, inputs: make(f"stage{stage}_low_res", **inputs.by_field),
        "dag.stage_lora": lambda run, stage, inputs, prompts: make(f"stage{stage}_lora", **inputs.by_field),
        "finetune.text_embeds": lambda run, index: make("text_embeds"),
        "finetune.cascade_samples": lambda run, prompts, inputs: make("cascade_samples", **inputs.by_field),
        "finetune.lora_bundle": lambda run, prompts, inputs: make("lora_bundle", **inputs.by_field),
        "finetune.publish_version": lambda run, bundle, index, start: bundle,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(f"flows.{name}", fake)
    return made


@pytest.fixture
def loaded(world: DataWorld, request: pytest.FixtureRequest) -> tuple[Run, Artifact]:
    """A run of RUNS and its index."""
    keys = RUNS[request.param]
    for number in range(4):
        world.add(f"{number}.png", np.full((300, 300, 3), number, np.uint8))
    entries: tuple[dict[str, Any], ...] = ()
    if keys.get("stage1") is PAIRED:
        for number in range(4):
            world.add(f"../pairs/{number}.png", np.full((300, 300, 3), number, np.uint8), caption=None)
        pairs = {"id": "pairs", "dataset_type": "conditioning", "instance_data_dir": str(world.folder / "pairs")}
        entries = ({"conditioning_data": "pairs"}, pairs)
    run = world.load(*entries, **keys)
    return run, world.index(run)


@pytest.mark.parametrize("loaded", RUNS, indirect=True)
def test_a_run_makes_each_artifact_from_what_its_plan_says(
    loaded: tuple[Run, Artifact], recorded: dict[str, dict[str, str]]
) -> None:
    run, index = loaded
    finetune.make_bundle(run, index)
    requests = planned(run, index)
    assert requests is not None and set(recorded) == set(requests)
    for kind in ("stage2_low_res", "stage1_lora", "stage2_lora", "cascade_samples", "lora_bundle"):
        if kind in recorded:
            inputs = {name: value for name, value in requests[kind].inputs.items() if not name.endswith("model")}
            assert inputs.keys() == recorded[kind].keys(), kind
            for name, value in inputs.items():  # of some only a part counts, which is not named so
                assert "/" not in value or value.split("/")[0] == recorded[kind][name], (kind, name)


@pytest.mark.parametrize("loaded", RUNS, indirect=True)
def test_a_stage_apart_is_made_from_what_a_whole_run_makes_it_from_and_all_of_it_is_told(
    loaded: tuple[Run, Artifact], recorded: dict[str, dict[str, str]]
) -> None:
    run, index = loaded
    finetune.make_bundle(run, index)
    whole, embeds = dict(recorded), Artifact("text_embeds", "0" * 16, index.path)
    for stage in run.config.stages:
        recorded.clear()
        stages: tuple[Stage, ...] = (1, 2) if run.config.stage(stage).remakes_low_res else (stage,)
        pictures = dag.make_pictures(run, index, stages)
        trainings = dag.make_trainings(run, pictures, embeds, sample_prompts(run, index))
        assert f"stage{stage}_lora" in recorded and recorded.items() <= whole.items()
        trained = [artifact for training in trainings.values() for artifact in training.artifacts]
        told = dict.fromkeys(artifact.kind for artifact in (*pictures.artifacts, *trained))
        assert [kind for kind in told if kind not in ("image_index", "text_embeds")] == list(recorded)


@pytest.mark.parametrize(
    ("state", "is_new", "name"),
    [("champion", True, "Completed"), ("blocked", True, "Blocked"), ("candidate", True, "Candidate"),
     ("blocked", False, "Completed")],
)  # fmt: skip
def test_the_end_of_a_run_names_what_became_of_its_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: Any, is_new: bool, name: str
) -> None:
    version: Any = SimpleNamespace(number=2)
    monkeypatch.setattr(finetune, "news_of", lambda *_: "the news")
    end = finetune.ended(cast(Run, SimpleNamespace(workspace=tmp_path)), Outcome(version, state, is_new, "", 1, 1))
    assert (end.name, end.message, end.is_completed()) == (name, "the news", True)
