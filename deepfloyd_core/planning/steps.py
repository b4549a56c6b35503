"""How long a run trains: steps, epochs, and how often each picture is seen."""

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from deepfloyd_core.config.run import Run
from deepfloyd_core.config.stages import Stage
from deepfloyd_core.crops.eval_choice import choose_held_out, held_out_pictures
from deepfloyd_core.crops.plan import CropCount, count_crops
from deepfloyd_core.store.artifacts import Artifact
from deepfloyd_core.training.epochs import counted, steps_of_epochs


@dataclass(frozen=True)
class StagePlan:
    """A stage's crops and its training."""

    stage: Stage
    crops: tuple[CropCount, ...]  # that are trained on
    rows: int  # crops to be cut, those of held-out pictures too
    row_bytes: int  # of their pixels
    steps: int
    samples: int  # pictures in all steps
    epochs: float  # passes over the data, of batches
    seen: float  # how often a picture is trained on, in the mean


def plan_stages(run: Run, index: Artifact) -> list[StagePlan]:
    """The trainings of a run on an index. Raises DataError where nothing would be left to train on."""
    out = held_out_pictures(index, choose_held_out(run, index))
    return [_plan_stage(run, index, stage, out) for stage in run.config.stages]


def with_counted_steps(run: Run, plans: Sequence[StagePlan]) -> Run:
    """The run with its stages' steps in place of their epochs: a training has the same identity by both."""
    for plan in plans:
        run = counted(run, plan.stage, plan.steps)
    return run


def _plan_stage(run: Run, index: Artifact, stage: Stage, out: pa.Array) -> StagePlan:
    config = run.config.stage(stage)
    crops, every = count_crops(run, index, stage, out)
    batches = sum(-(-count.shown // config.train_batch_size) for count in crops)
    steps = steps_of_epochs(config, batches)
    samples, pictures = steps * config.samples_per_step, sum(count.pictures for count in crops)
    return StagePlan(
        stage,
        tuple(crops),
        sum(count.rows for count in every),
        sum(count.rows * count.size[0] * count.size[1] * 3 for count in every),
        steps,
        samples,
        steps * config.gradient_accumulation_steps / batches if batches else 0.0,
        samples / pictures if pictures else 0.0,
    )
