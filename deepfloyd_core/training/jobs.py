"""The training job: its request, its inputs and its report. No torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from deepfloyd_core.config.run import Run
from deepfloyd_core.config.run_validation import ValidationKeys
from deepfloyd_core.config.stage import StageConfig
from deepfloyd_core.config.stages import Stage
from deepfloyd_core.hashing import hash_seed
from deepfloyd_core.measures.held_out_loss import HeldOutLosses
from deepfloyd_core.processes.jobs import JobRequest
from deepfloyd_core.store.artifacts import Artifact
from deepfloyd_core.store.counts import many
from deepfloyd_core.store.inputs import A, Inputs
from deepfloyd_core.store.manifest import Summary
from deepfloyd_core.store.pinned import PinnedFile
from deepfloyd_core.training.mixing import Share, shares
from deepfloyd_core.training.previews import preview_interval

LOSS_CURVE, VALIDATION_SHEET = "loss.png", "validation.png"
VALIDATION_FILE = "validation.parquet"  # the loss of each picture of the grid at each timestep, base and trained


@dataclass(frozen=True, kw_only=True)
class TrainingInputs(Inputs[A]):
    """The inputs of a stage's LoRA."""

    pixels: A
    text: A  # the stage's, or the embeds where its text modules are trained
    eval_set: A
    conditioning: A | None = None  # a ControlNet's pictures for the rows of the pixels, where not made of these
    eval_conditioning: A | None = None  # the same for the eval set
    low_res: A | None = None  # Stage I's remakes, for Stage II
    start: A | None = None  # the weights of a version, for a warm training


class SizeCrops(Summary):
    """The crops of one size of a data set."""

    dataset: str
    size: str  # px, WIDTHxHEIGHT
    crops: int  # that an epoch shows, without those of held-out pictures


class Bucket(SizeCrops):
    """The batches of one size in an epoch."""

    batches: int
    crops_of_last_batch: int


class TrainingFigures(HeldOutLosses):
    """The published figures of a training."""

    steps: int
    rows: int  # crops that were trained on
    pictures: int  # from which they were cut
    trainable_parameters: int
    last_loss: float
    # Of the UNet's output, between the trained weights and those that a stock pipeline loads.
    reload_difference: float | None = None


class TrainingSummary(TrainingFigures):
    """The summary of a stage's LoRA."""

    buckets: tuple[Bucket, ...]
    frozen_parameters: int
    frozen_bytes: int
    first_loss: float
    steps_of_this_process: int
    # Of a warm training: how much its losses at step 0 differ, at most, from those that the version published.
    start_difference: float | None = None
    # The size of micro-batches by the first step, counted from 0, that has it; before the first one batches are whole.
    micro_batches: Mapping[int, int] = {}
    # The number of ranks by the first step that has it; before the first one there is one process.
    ranks: Mapping[int, int] = {}
    samples_per_s: float | None = None  # None: this process did no step
    eval_by_t: Mapping[int, tuple[float, float]] = {}  # held-out losses, base and trained, at timesteps 0 to 999

    @property
    def mixed_sums(self) -> str:
        """How its batches were cut and shared out, in words; empty where all steps do it alike."""
        sizes, ranks = {0: 0, **self.micro_batches}, {0: 1, **self.ranks}
        cut = {first: f"in micro-batches of {size}" if size else "whole" for first, size in sizes.items()}
        shared = {first: f"by {many(count, 'process', 'processes')}" for first, count in ranks.items()}
        return " and ".join(
            ", ".join(f"{how} from step {first + 1} on" for first, how in sorted(changes.items()))
            for changes in (cut, shared) if len(changes) > 1
        )  # fmt: skip

    @property
    def by_timestep(self) -> list[dict[str, float]]:
        """A row for each timestep that held-out pictures were measured at: t, base, tuned."""
        return [{"t": t, "base": base, "tuned": tuned} for t, (base, tuned) in self.eval_by_t.items()]


class TrainRequest(JobRequest[TrainingSummary]):
    """Train a stage's LoRA, biases or UNet."""

    job = "train"
    entry = "deepfloyd_core.training.trainer:train"
    returns = TrainingSummary
    stage: Stage
    settings: StageConfig
    validation: ValidationKeys
    seed: int
    sampling: Literal["auto-weighting", "uniform"]  # `data_backend_sampling`
    shares: Mapping[str, Share]  # how the data sets take turns, by their ids
    model: Path  # folder of the base model
    parent: PinnedFile | None = None  # weights to start from
    new_share: float | None = None  # `warm_new_share`; None: it is no warm training
    prompts: tuple[str, ...] = ()  # of the validations
    previews: int = 0  # steps between two, where no validations are asked for; 0: none
    inputs: TrainingInputs[Artifact]
    rank: int = 0  # of this process
    ranks: int = 1  # processes that share each step

    def of_ranks(self, count: int) -> "list[TrainRequest]":
        """The requests of the processes that share its steps."""
        return [self.model_copy(update={"rank": rank, "ranks": count}) for rank in range(count)]


def train_job(
    run: Run, stage: Stage, folder: Path, inputs: TrainingInputs[Artifact], prompts: Sequence[str],
    parent: PinnedFile | None,
) -> TrainRequest:  # fmt: skip
    """The job that trains a stage's LoRA. folder: the base model; parent: the weights that it starts from.

    A warm training has draws of its own: with those of the version before it, each night would show the same noise.
    """
    config, start = run.config, inputs.start
    return TrainRequest(
        machine=config, validation=config, stage=stage, settings=config.stage(stage), model=folder, inputs=inputs,
        seed=hash_seed(config.seed, start.name) if start else config.seed, sampling=config.data_backend_sampling,
        shares=shares(run, stage), prompts=tuple(prompts), parent=parent,
        previews=preview_interval(run, stage),
        new_share=config.warm_new_share if start else None,
    )  # fmt: skip
