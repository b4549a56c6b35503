"""Which pictures are held out of training, to measure on.

Of each data set those with the smallest hashes of (seed, picture), so that every machine chooses alike; and first of all
those that the workspace's last eval set has, so that a picture that was held out is not trained on when others come; of an
index that was there before, those of its own last one, so that data that went back gives what it gave. Their number is what
the set can spare unless it is said. Pictures that show the same count as one, and the first of them is hashed: so a copy
that comes later, and is named after its picture, joins the side that this is on.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from deepfloyd_core.artifacts import Artifact, newest
from deepfloyd_core.config import Run
from deepfloyd_core.datafile import ImageDataset
from deepfloyd_core.draws import hash_units, image_keys
from deepfloyd_core.errors import DataError
from deepfloyd_core.files import sha256_bytes
from deepfloyd_core.flavours import Stage
from deepfloyd_core.ledger import SCHEMA, ledger_batches
from deepfloyd_core.row_list import eval_ids

EVAL_FORMAT = 6  # 5: the chosen pictures in its spec. 6: `held_out.arrow`
MOST, SHARE, FEWEST = 4, 10, 8  # by default: of each SHARE pictures one, at most MOST, at least one from FEWEST on
_COUNTED = MOST * SHARE  # more pictures than these spare no more


@dataclass(frozen=True)
class Choice:
    """What is held out of one data set. `usable`: its pictures that are fit for every stage that it feeds, as far as they
    were counted; of those that show the same one."""

    dataset_id: str
    usable: int
    ids: tuple[str, ...]  # in the order of their hashes

    @property
    def digest(self) -> str:
        """16 hex digits over the chosen pictures."""
        return sha256_bytes("\n".join(self.ids).encode())[:16]


def spare(usable: int) -> int:
    """How many pictures a data set can do without."""
    return 0 if usable < FEWEST else min(max(1, usable // SHARE), MOST)


@lru_cache(maxsize=4)
def choose_held_out(run: Run, index: Artifact) -> tuple[Choice, ...]:
    """The choice of each data set that pictures are held out of; remembered, for it is asked for more than once.

    Raises DataError where it would leave nothing to train on.
    """
    only = run.config.eval_dataset_id
    before = _held_out_before(run, index)
    sets = [dataset for dataset in run.datasets if only in (None, dataset.id)]
    return tuple(choice for dataset in sets if (choice := _choose(run, index, dataset, before)) is not None)


def choice_notes(run: Run, choices: tuple[Choice, ...]) -> list[str]:
    """What a person should know of a choice: a line for each data set that is hardly trained on, or not measured."""
    notes = []
    for choice in choices:
        count, rest = len(choice.ids), choice.usable - len(choice.ids)
        if 0 < rest < count:
            notes.append(
                f"{choice.dataset_id}: {count} of its {choice.usable} pictures are held out (num_eval_images), and "
                f"{rest} are trained on. Add pictures, or lower num_eval_images; unset, it is {spare(choice.usable)}"
            )
    if not any(choice.ids for choice in choices):
        few = " and ".join(f"{choice.usable} of {choice.dataset_id}" for choice in choices) or "none"
        why = f"num_eval_images is {run.config.num_eval_images}"
        if run.config.num_eval_images is None:
            why = f"usable pictures: {few}; one is held out from {FEWEST} on"
        first = run.config.stage1
        drawn = "there are no samples, for they are made of held-out pictures"
        if first is not None and not first.controlnet:
            drawn = "look at the samples"
        notes.append(
            f"No picture is held out of training ({why}), so nothing is measured on pictures that the model does not know: "
            f"neither the loss nor what Stage II makes. {drawn[0].upper()}{drawn[1:]}"
        )
    return notes


def _held_out_before(run: Run, index: Artifact) -> frozenset[str]:
    """The pictures of the newest eval set of the same seed with one of these data sets; of this very index if it has one."""
    names = {dataset.id for dataset in run.datasets}

    def fits(record: dict[str, Any]) -> bool:
        spec: Mapping[str, Any] = record["spec"]
        return spec["seed"] == run.config.seed and not names.isdisjoint(spec["held_out"])

    def same_data(record: dict[str, Any]) -> bool:
        return fits(record) and bool(record["inputs"]["image_index"] == index.name)

    last = newest(run.workspace, "eval_set", EVAL_FORMAT, same_data) or newest(
        run.workspace, "eval_set", EVAL_FORMAT, fits
    )
    try:
        return eval_ids(last) if last else frozenset()
    except (OSError, pa.ArrowInvalid):
        return frozenset()  # damaged


def _choose(run: Run, index: Artifact, dataset: ImageDataset, before: frozenset[str]) -> Choice | None:
    """None when the data set feeds no stage or has no picture."""
    fed = tuple(stage for stage in run.config.stages if dataset.factor(stage) is not None)
    asked = run.config.num_eval_images
    usable = _first_by_hash(run, index, dataset, fed, max(_COUNTED, 2 * (asked or 0) + 1), before) if fed else []
    if not usable:
        return None
    others = [other for other in run.datasets if other.id != dataset.id and not other.start_step]
    spared = run.config.eval_dataset_id is not None and all(
        any(other.factor(stage) is not None for other in others) for stage in fed
    )  # of others enough is trained on
    count = asked if asked is not None else MOST if spared else spare(len(usable))
    if len(usable) <= count and not spared:
        raise DataError(
            f"{dataset.id} has {len(usable)} usable pictures, and num_eval_images = {count} would hold all of them out. "
            f"Add pictures, or lower num_eval_images; unset, it is {spare(len(usable))}."
        )
    first = sorted(usable, key=lambda image_id: image_id not in before)[:count]  # stable: by hash otherwise
    chosen = set(first)
    return Choice(dataset.id, len(usable), tuple(image_id for image_id in usable if image_id in chosen))


def _first_by_hash(
    run: Run, index: Artifact, dataset: ImageDataset, fed: tuple[Stage, ...], most: int, before: frozenset[str]
) -> list[str]:
    """The usable pictures of a data set with the smallest hashes, and those of `before`, by hash; of each group one."""
    reasons = [f"stage{stage}_reason" for stage in fed]
    best, known = SCHEMA.empty_table().select(["image_id", "group"]), pa.array(sorted(before), pa.string())
    for batch in ledger_batches(index, ["image_id", "group", "dataset_id", *reasons]):
        fit = pc.equal(batch["dataset_id"], dataset.id)
        for reason in reasons:
            fit = pc.and_(fit, pc.is_null(batch[reason]))
        best = pa.concat_tables([best, batch.filter(fit).select(best.column_names)])
        names = pc.coalesce(best["group"], best["image_id"])
        units = hash_units("eval", run.config.seed, image_keys(names), np.zeros(len(best), np.int64))
        new = ~pc.is_in(best["image_id"], known).to_numpy()
        order = np.lexsort((pc.not_equal(names, best["image_id"]).to_numpy(), new, units))
        first = order[np.unique(units[order], return_index=True)[1]]
        best = best.take(first[(np.arange(len(first)) < most) | ~new[first]])
    return [str(name) for name in best["image_id"].to_pylist()]
