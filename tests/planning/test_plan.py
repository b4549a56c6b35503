"""What a plan says is what the run then does; and a plan changes nothing."""

import hashlib
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_world import DataWorld

from deepfloyd_core.bundle.planned import planned
from deepfloyd_core.config.run import Run
from deepfloyd_core.config.stages import Stage
from deepfloyd_core.crops.rows import held_out_ids, read_row_list
from deepfloyd_core.errors import JobError
from deepfloyd_core.index.ledger import read_index
from deepfloyd_core.models.device import Device
from deepfloyd_core.models.text_encoders import T5_XXL
from deepfloyd_core.models.torch_facts import TorchFacts
from deepfloyd_core.models.work import Speed, Work
from deepfloyd_core.pictures.geometry import Size
from deepfloyd_core.planning import data, memory, times
from deepfloyd_core.planning.fit import Fitted, fit
from deepfloyd_core.planning.memory import plan_memory
from deepfloyd_core.planning.plan import Plan, plan_after_index, plan_run
from deepfloyd_core.planning.tables import plan_tables, verdict
from deepfloyd_core.sources import folder
from deepfloyd_core.store.artifacts import Artifact, WorkDir, materialise
from deepfloyd_core.store.manifest import Summary
from deepfloyd_core.training.costs import StepCosts
from deepfloyd_core.training.epochs import crops_of_sizes, with_steps


@pytest.fixture(autouse=True)
def no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes that are asked for the device and for costs: tests/planning/test_costs.py."""

    def ask_torch(threads: int | None) -> TorchFacts:
        raise JobError("torch is not asked")

    monkeypatch.setattr("deepfloyd_core.planning.plan.ask_torch", ask_torch)
    monkeypatch.setattr("deepfloyd_core.planning.costs._CALCULATED_BY", "no_such_module")


def draw(world: DataWorld, numbers: range, edge: int = 70) -> None:
    for number in numbers:
        noise = np.random.default_rng(number).integers(0, 256, (edge, edge + number, 3), np.uint8)
        world.add(f"{number}.png", noise, caption=f"picture {number % 3}")


def states(plan: Plan) -> dict[str, str]:
    return {artifact.kind: artifact.state for artifact in plan.artifacts}


def reasons(plan: Plan) -> dict[str, tuple[str, ...]]:
    return {artifact.kind: artifact.why for artifact in plan.artifacts if artifact.state != "reused"}


def finish(run: Run, index: Artifact, *kinds: str) -> None:
    """Finished artifacts of these kinds, as a run would have left them, with nothing in them."""

    def build(work: WorkDir) -> Summary:
        return Summary()

    requests = planned(run, index)
    assert requests is not None
    for kind in kinds or requests:
        materialise(run.workspace, requests[kind], build)


def tree(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


def test_a_first_plan_counts_what_the_run_will_find_and_leaves_no_file(world: DataWorld) -> None:
    draw(world, range(12))
    world.add("small.png", np.zeros((20, 20, 3), np.uint8))
    world.add("broken.png", b"no picture")
    run = world.load(stages=(1,), num_eval_images=2, max_rejected_share=0.9, max_train_steps=30, train_batch_size=2)
    before = tree(world.folder)
    plan = plan_run(run)
    assert tree(world.folder) == before and not run.workspace.exists()
    (counted,) = plan.sets
    index = world.index(run)
    rows = read_index(index)
    assert counted.inputs == len(rows) == 14
    assert counted.rejected == Counter(row.reason for row in rows if row.reason)
    assert (counted.held_out, counted.trained) == (2, 10)
    assert set(states(plan).values()) == {"made"} and reasons(plan)["image_index"] == ("there is none yet",)
    (stage,) = plan.stages
    assert (stage.steps, stage.samples, stage.epochs, stage.seen) == (30, 60, 6.0, 6.0)
    assert plan.captions == len({"picture 0", "picture 1", "picture 2", "", *run.config.probes})
    assert plan.seconds is None and "not known" in verdict(plan)[0]


def test_each_artifact_is_reused_or_made_for_a_reason_in_the_users_words(world: DataWorld) -> None:
    draw(world, range(12))
    run = world.load(stages=(1,), num_eval_images=2)
    index = world.index(run)
    finish(run, index)
    before = tree(run.workspace)
    plan = plan_run(run)
    assert set(states(plan).values()) == {"reused"} and verdict(plan) == ["Nothing to do: every artifact is there."]
    changed = plan_run(world.load(stages=(1,), num_eval_images=2, lora_rank=8))
    assert {kind for kind, state in states(changed).items() if state == "made"} == {
        "stage1_lora", "cascade_samples", "lora_bundle"
    }  # fmt: skip
    assert reasons(changed)["stage1_lora"] == ("stage1.lora_rank 16 -> 8",)
    assert reasons(changed)["lora_bundle"] == ("cascade samples changed", "Stage I LoRA changed")
    assert tree(run.workspace) == before
    draw(world, range(12, 13))
    grown = plan_run(run)
    assert grown.changes == ("1 picture added: 12.png",) and reasons(grown)["image_index"] == grown.changes
    assert states(grown)["stage1_pixels"] == "made" and states(grown)["text_embeds"] == "reused"
    assert tree(run.workspace) == before


def test_more_than_a_plan_reads_is_counted_and_the_last_index_stands_in(
    world: DataWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw(world, range(12))
    run = world.load(stages=(1,), num_eval_images=2)
    monkeypatch.setattr(data, "MOST_READ", 1)
    monkeypatch.setattr(folder, "RACY_NS", 0)
    first = plan_run(run)
    assert first.sets == () and first.stages == ()
    assert first.notes[0].startswith(
        "set: 12 new or changed files of 12, more than a plan reads; no picture was looked"
    )
    finish(run, world.index(run))
    draw(world, range(12, 15))
    plan = plan_run(run)
    assert plan.sets[0].trained == 10
    assert plan.notes[0].startswith("set: 3 new or changed files of 15") and plan.notes[0].endswith("of the last index")
    assert reasons(plan)["stage1_lora"] == ("pictures are new or changed",)
    assert any(table.title == "Trainings" for table in plan_tables(plan))


@pytest.mark.parametrize(
    "entry",
    [
        {},
        {"repeats": 3},
        {"crop_aspect": "preserve"},
        {
            "crop_style": "random",
            "repeats": 5,
            "random_crops": 2,
            "maximum_image_size": 72,
            "target_downsample_size": 68,
        },
        {"crop_aspect": "closest", "crop_aspect_buckets": [1.0, 1.5], "repeats": 1},
    ],
)
def test_crops_are_counted_as_they_will_be_cut_and_epochs_as_steps(world: DataWorld, entry: dict[str, Any]) -> None:
    for number in range(14):
        shape = (70 + number, 100 + 7 * number, 3)
        pixels = np.random.default_rng(number).integers(0, 256, shape, np.uint8)
        world.add(f"{number}.png", pixels, caption="one\ntwo" if number % 2 else "one")
    keys = {"num_eval_images": 2, "num_train_epochs": 3, "train_batch_size": 3, "gradient_accumulation_steps": 2}
    run = world.load(entry, stages=(1,), **keys)
    index, eval_set = world.index(run), None
    plan = plan_after_index(run, index)
    pixels_made, eval_set = world.pixels(run, index, 1), world.eval_set(run, index)
    (stage,) = plan.stages
    cut = {(row.dataset, row.size): row.crops for row in crops_of_sizes(pixels_made, held_out_ids(eval_set))}
    assert {(one.dataset_id, f"{one.size[0]}x{one.size[1]}"): one.shown for one in stage.crops} == cut
    assert stage.rows == len(read_row_list(pixels_made.path))
    assert stage.steps == with_steps(run, 1, pixels_made, eval_set).config.stage(1).steps
    shards = sum(file.stat().st_size for file in pixels_made.path.glob("*.parquet"))
    assert stage.row_bytes < shards


def test_what_is_finished_tells_how_long_the_rest_takes(world: DataWorld) -> None:
    draw(world, range(12))
    run = world.load(stages=(1,), num_eval_images=2)
    world.pixels(run, world.index(run), 1)
    draw(world, range(12, 24))
    plan = plan_run(run)
    assert plan.times["stage1_pixels"].by == "earlier runs" and plan.times["image_index"].by == "earlier runs"
    assert "stage1_lora" not in plan.times


GIB = 1 << 30
CUT = "the same steps, up to the rounding of sums"

ONE = Work(flops=1e9, bytes=1e6, calls=10.0)
SPEED = Speed(flops=1e12, bytes=1e10, call_s=1e-5)
HUGE = StepCosts(
    frozen=GIB, trained=1000, trained_bytes=4000, kept=(GIB, 2 * GIB), recomputed=(GIB // 4, GIB // 2), sampled=(5, 9),
    kept_blocks=(), recomputed_blocks=(), trained_tensors=1, kept_work=(ONE, ONE), recomputed_work=(ONE, ONE),
    sampled_work=(ONE, ONE),
)  # fmt: skip
GPU = Device("a GPU", False, 5 * GIB, 5 * GIB, True, {"no": SPEED, "bf16": SPEED})


def batch_of_four(world: DataWorld, **more: Any) -> Run:
    draw(world, range(6))
    keys = {"train_batch_size": 4, "gradient_accumulation_steps": 2, "optimizer": "prodigy", "use_ema": True}
    return world.load(stages=(1,), num_eval_images=2, **keys, **more)


def of_stage1(run: Run, **keys: Any) -> Run:
    """The run with other settings of Stage I."""
    return replace(run, config=run.config.model_copy(update={"stage1": run.config.stage(1).model_copy(update=keys)}))


def test_what_does_not_fit_says_which_settings_would(world: DataWorld) -> None:
    run = batch_of_four(world)
    (training, _) = plan_memory(run, {"stage1_lora"}, 0, {1: HUGE}, {1: (64, 64)}, GPU)
    assert {part.name: part.bytes for part in training.parts} == {
        "frozen weights": GIB, "trained weights": 4000, "optimizer": 16000, "average": 4000,
        "activations and gradients": 4 * GIB, "gradients of earlier passes": 4000,
    }  # fmt: skip
    plan = replace(plan_run(run), memory=(training,), device=GPU)
    said = verdict(plan)
    assert "Stage I, training takes 5.37 GB, and a GPU has 5.37 GB: that does not fit." in said
    assert said[3:] == [
        f"  stage1.micro_batch_size = 2: 3.22 GB, which fits; {CUT}",
        "  stage1.gradient_checkpointing = true: 2.15 GB, which fits; the same result",
        f"  stage1.gradient_checkpointing = true with stage1.micro_batch_size = 2: 1.61 GB, which fits; {CUT}",
    ]
    narrow = replace(GPU, total=GIB)
    (training, _) = plan_memory(run, {"stage1_lora"}, 0, {1: HUGE}, {1: (64, 64)}, narrow)
    least, no = "stage1.gradient_checkpointing = true with stage1.micro_batch_size = 1", "which does not fit either"
    assert verdict(replace(plan, memory=(training,), device=narrow))[3:] == [
        f"  stage1.micro_batch_size = 1: 2.15 GB, {no}; {CUT}",
        f"  stage1.gradient_checkpointing = true: 2.15 GB, {no}; the same result",
        f"  {least}: 1.34 GB, {no}; {CUT}",
        f"  {least} with stage1.base_model_precision = int8: 827 MB, which fits; another result",
        f"  {least} with stage1.base_model_precision = nf4: 569 MB, which fits; another result",
    ]
    roomy = replace(plan, device=replace(GPU, total=6 * GIB))
    assert verdict(roomy)[-1].endswith("(Stage I, training), and a GPU has 6.44 GB: it fits.")


def test_auto_fit_sets_what_changes_no_result_and_proposes_the_rest(world: DataWorld) -> None:
    run = batch_of_four(world, auto_fit=True)
    assert fit(run, {1: HUGE}, {1: (64, 64)}, replace(GPU, total=6 * GIB), 1) == Fitted(run, (), ())
    fitted = fit(run, {1: HUGE}, {1: (64, 64)}, GPU, 1)
    assert fitted.run.config.stage(1).micro_batch_size == 2 and not fitted.proposed
    assert fitted.applied == (
        f"stage1.micro_batch_size = 2: Stage I, training takes 5.37 GB, and a GPU has 5.37 GB; with it 3.22 GB, {CUT}",
    )
    held = HUGE.model_copy(update={"kept": (3 * GIB // 2, 2 * GIB)})
    again = fit(run, {1: held}, {1: (64, 64)}, replace(GPU, total=9 * GIB // 4), 1)
    chosen = again.run.config.stage(1)
    assert (chosen.gradient_checkpointing, chosen.micro_batch_size) == (True, None), "parts alone do not fit"
    dropped = of_stage1(run, lora_dropout=0.1)
    assert fit(dropped, {1: HUGE}, {1: (64, 64)}, GPU, 1).run == of_stage1(dropped, gradient_checkpointing=True)
    index = world.index(run)
    assert planned(fitted.run, index) == planned(run, index) == planned(world.load(stages=(1,), num_eval_images=2,
        train_batch_size=4, gradient_accumulation_steps=2, optimizer="prodigy", use_ema=True), index)  # fmt: skip
    small = fit(run, {1: HUGE}, {1: (64, 64)}, replace(GPU, total=GIB), 1)
    proposal, *weights_alone = small.proposed
    assert weights_alone[1] == "Stage I, drawing takes 1.07 GB, and a GPU has 1.07 GB" and len(weights_alone) == 2
    assert proposal.startswith(
        "Stage I, training takes 1.34 GB, and a GPU has 1.07 GB. Less would take stage1.base_model_precision = int8: 827 MB"
    )
    assert small.run.config.stage(1).train_batch_size == 4 and small.run.config.stage(1).micro_batch_size == 1


def test_fewer_pictures_are_sampled_at_once_where_all_do_not_fit(world: DataWorld) -> None:
    run = batch_of_four(world, validation_prompt=["a", "b"], num_validation_images=7, validation_resolution="64,96x64")
    run = of_stage1(run, validation_step_interval=10, lora_dropout=0.1)
    sampled = HUGE.model_copy(update={"kept": (0, 0), "recomputed": (0, 0), "sampled": (GIB // 32, GIB // 16)})
    about: tuple[dict[Stage, StepCosts], dict[Stage, Size]] = {1: sampled}, {1: (64, 64)}
    training, validating, drawing = plan_memory(run, {"stage1_lora", "cascade_samples"}, 0, *about, GPU)
    calls, area = 2, 1.5  # with guidance; of 96x64 px
    assert {part.name: part.bytes for part in validating.parts} == {
        "frozen weights": GIB, "trained weights": 4000, "optimizer": 16000, "average": 4000,
        "a call for 14 pictures": int(14 * calls * area * GIB / 32),
    }  # fmt: skip
    assert training.fits(GPU) and drawing.parts[-1] == validating.parts[-1] and validating.fits(GPU)
    narrow = replace(GPU, total=int((GIB + 24000 + 5.5 * calls * area * GIB / 32) / 0.95))
    fitted = fit(run, *about, narrow, 0)
    assert fitted.run == of_stage1(run, sample_batch_size=5) and not fitted.proposed
    (line,) = fitted.applied
    assert line.startswith("stage1.sample_batch_size = 5: Stage I, validating takes ")
    short = of_stage1(run, validation_step_interval=None, max_train_steps=10)
    assert [one.what for one in plan_memory(short, {"stage1_lora"}, 0, *about, GPU)] == ["Stage I, training"]


def test_t5_is_streamed_where_it_does_not_fit(world: DataWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    run = batch_of_four(world, auto_fit=True)
    monkeypatch.setattr(memory, "t5_shape", lambda run: T5_XXL)
    fitted = fit(run, {}, {}, GPU, 1)
    assert fitted.run.config.text_encoder_streaming and not fitted.proposed
    assert fitted.applied[0].startswith("text_encoder_streaming = true: ")


def test_nothing_is_built_in_the_workspace_and_what_cannot_be_read_is_left_out(world: DataWorld) -> None:
    draw(world, range(12))
    run = world.load(stages=(1,), num_eval_images=2)
    index = world.index(run)
    unfinished = index.path
    (unfinished / "manifest.json").rename(unfinished / ".kept")
    (unfinished / ".request.json").write_bytes((unfinished / ".kept").read_bytes())
    (run.workspace / "held_out" / "folder").mkdir(parents=True)
    (run.workspace / "held_out" / "gone.json").symlink_to("nowhere")
    before = tree(run.workspace)
    plan = plan_run(run)
    assert states(plan)["image_index"] == "made" and plan.sets[0].trained == 10
    assert tree(run.workspace) == before


def test_a_compiled_training_is_not_recomputed_by_itself(world: DataWorld) -> None:
    run = of_stage1(batch_of_four(world, auto_fit=True), dynamo_backend="aot_eager")
    fitted = fit(run, {1: HUGE}, {1: (64, 64)}, GPU, 1)
    assert fitted.run == run and "another rounding" in fitted.proposed[0]


def test_no_model_is_downloaded_for_a_plan(world: DataWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    draw(world, range(6))

    def resolve(*_: object, **__: object) -> None:
        raise AssertionError("asked")

    monkeypatch.setattr("deepfloyd_core.models.folders._resolved", resolve)
    assert states(plan_run(world.load(stages=(1,), num_eval_images=2)))["stage1_lora"] == "made"


def test_a_rate_of_another_model_is_not_taken(world: DataWorld) -> None:
    draw(world, range(12))
    run = world.load(stages=(1,), num_eval_images=2)
    requests = planned(run, world.index(run))
    assert requests is not None
    lora = materialise(run.workspace, requests["stage1_lora"], lambda work: Summary())
    assert times._is_alike(lora, requests["stage1_lora"])
    other = replace(requests["stage1_lora"], inputs={**lora.inputs, "model": "another"})
    assert not times._is_alike(lora, other) and not times._is_alike(lora, None)


def test_a_run_that_would_end_is_told_with_its_pictures(world: DataWorld) -> None:
    draw(world, range(4))
    for number in range(4):
        world.add(f"small{number}.png", np.zeros((20, 20, 3), np.uint8))
    plan = plan_run(world.load(stages=(1,), max_rejected_share=0.1))
    assert plan.sets[0].rejected == {"too_small": 4}
    assert verdict(plan)[0].startswith("A run would end here. 4 of 8 pictures were rejected (4 too_small)")
    assert "ledger" not in verdict(plan)[0]
