"""Converts epochs to optimizer steps, once the crops of a stage exist. No torch: a fingerprint depends on it.

Training depends only on the number of steps: the same number written as `max_train_steps` gives the same bytes.
"""

import logging
from collections import Counter
from dataclasses import replace

import pyarrow as pa
import pyarrow.compute as pc

from deepfloyd_core.config.base import parse_spec
from deepfloyd_core.config.run import Run
from deepfloyd_core.config.stage import StageConfig
from deepfloyd_core.config.stages import Stage
from deepfloyd_core.crops.rows import held_out_ids, read_row_list
from deepfloyd_core.store.artifacts import Artifact
from deepfloyd_core.store.counts import many
from deepfloyd_core.training.jobs import SizeCrops
from deepfloyd_core.training.mixing import check_steps

log = logging.getLogger(__name__)
_SIZE = ["dataset_id", "width", "height"]


def crops_of_sizes(pixels: Artifact, held_out: frozenset[str]) -> list[SizeCrops]:
    """How many crops of each data set's sizes an epoch shows, without the held-out ones."""
    names = pa.array(sorted(held_out), pa.string())
    counts: Counter[tuple[str, int, int]] = Counter()
    # Batch by batch: nothing of a large set's list, which is mapped, is copied as a whole.
    for rows in read_row_list(pixels.path).select(["image_id", *_SIZE, "times"]).to_batches():
        kept = pa.table(rows.filter(pc.invert(pc.is_in(rows["image_id"], names))))
        for row in kept.group_by(_SIZE).aggregate([("times", "sum")]).to_pylist():
            counts[row["dataset_id"], row["width"], row["height"]] += row["times_sum"]
    return [
        SizeCrops(dataset=name, size=f"{width}x{height}", crops=count)
        for (name, width, height), count in counts.items()
    ]


def batches_per_epoch(pixels: Artifact, held_out: frozenset[str], batch_size: int) -> int:
    """Batches that show every crop once, except held-out ones; the crops of each data set and size are cut into batches
    apart.
    """
    return sum(-(-row.crops // batch_size) for row in crops_of_sizes(pixels, held_out))


def steps_of_epochs(config: StageConfig, batches: int) -> int:
    """Optimizer steps of a stage: its own, or those of its epochs of so many batches."""
    if config.num_train_epochs is None:
        return config.steps
    return max(1, -(-config.num_train_epochs * batches // config.gradient_accumulation_steps))


def counted(run: Run, stage: Stage, steps: int) -> Run:
    """The run with so many steps of a stage in place of its epochs; unchanged if it has no epochs.

    Raises ConfigError for a warm-up as long as the training.
    """
    config = run.config.stage(stage)
    if config.num_train_epochs is None:
        return run
    values = {**config.model_dump(), "num_train_epochs": None, "max_train_steps": steps}
    own = parse_spec(StageConfig, values, f"stage{stage}, num_train_epochs = {config.num_train_epochs}")
    return replace(run, config=run.config.model_copy(update={f"stage{stage}": own}))


def with_steps(run: Run, stage: Stage, pixels: Artifact, eval_set: Artifact) -> Run:
    """The run with the steps of a stage in place of its epochs; unchanged if it has no epochs.

    Raises ConfigError for a warm-up as long as the training, or a step in which no data set is drawn from.
    """
    config = run.config.stage(stage)
    if config.num_train_epochs is None:
        return run
    batches = batches_per_epoch(pixels, held_out_ids(eval_set), config.train_batch_size)
    steps = steps_of_epochs(config, batches)
    epochs = f"{many(config.num_train_epochs, 'epoch')} of {many(batches, 'batch', 'batches')}"
    log.info("stage %d: %s make %s", stage, epochs, many(steps, "step"))
    with_own = counted(run, stage, steps)
    for note in check_steps(run.datasets, stage, steps):
        log.info("%s", note)
    return with_own
