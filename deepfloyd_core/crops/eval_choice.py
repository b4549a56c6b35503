"""Chooses which pictures are held out of training, to measure on.

For each data set, take first the pictures that the workspace held out before, the longest-held first (`eval_record`).
So these, and copies of them, stay held out when other pictures are added or removed, or when another number is asked
for. Then take further ones: first those that the version which serves was not trained on, so that it can be compared on
them; then those that every stage can use, whichever stages are in the run; among these the smallest hashes of (seed,
picture), so every machine chooses the same. Their number is `num_eval_images`. By default it is as many as the data set can
spare, and none becomes one that the version which serves was trained on, unless no other is held out.

A group of duplicates counts as one picture. The hash is taken of its first picture. A copy that is added later, and
whose name sorts after the original's, is therefore held out or trained on together with the original. Costs two to
three passes over three columns of the ledger.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache, reduce
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from deepfloyd_core.arrow import mapped_table
from deepfloyd_core.config.data_sets import ImageDataset
from deepfloyd_core.config.run import Run
from deepfloyd_core.config.stages import STAGES, Stage, titles
from deepfloyd_core.crops.eval_record import EvalRecord, eval_record
from deepfloyd_core.crops.rows import HELD_OUT_FILE
from deepfloyd_core.errors import ArtifactError, DataError
from deepfloyd_core.index.ledger import group_names, ledger_batches, schema
from deepfloyd_core.pictures.draws import hash_units, image_keys
from deepfloyd_core.store.artifacts import Artifact
from deepfloyd_core.store.versions import champion, index_of, part_of

EVAL_FORMAT = 8
MOST, SHARE, FEWEST = 4, 10, 8  # by default: of each SHARE pictures one, at most MOST, at least one from FEWEST on
_COUNTED = MOST * SHARE  # above this count a set spares no more pictures
_NONE = pa.nulls(0, pa.string())  # pa.array of a list would import pandas


@dataclass(frozen=True)
class Choice:
    """The held-out pictures of one data set. `usable`: how many pictures fit every stage that the set feeds, as far as
    they were counted; of duplicates one.
    """

    dataset_id: str
    usable: int
    ids: tuple[str, ...]  # the measured pictures, in the order of their hashes
    groups: tuple[
        str, ...
    ]  # not trained on, each by its first picture: theirs, and further ones that were held out as theirs


@dataclass(frozen=True)
class _Known:
    """Earlier held-out pictures that are in an index, in the order of one data set."""

    names: dict[str, str]  # image_id -> its group, by the first picture of it
    subjects: dict[str, str]  # image_id -> the picture that was measured on for it
    groups: dict[
        str, tuple[int, str]
    ]  # name -> place of the first of its pictures among these, and the subject of that
    is_closed: bool  # no other picture is held out

    def place(self, name: str) -> int:
        """The smallest goes first; all groups that are new are equal."""
        return self.groups[name][0] if name in self.groups else len(self.subjects)


class _Row(NamedTuple):
    """A picture that may be held out."""

    image_id: str
    name: str  # of its group
    fit: bool  # usable
    trained: bool  # its group was trained on by the version that serves


def spare(usable: int) -> int:
    """How many pictures a data set can do without."""
    return 0 if usable < FEWEST else min(max(1, usable // SHARE), MOST)


@lru_cache(maxsize=4)
def choose_held_out(run: Run, index: Artifact) -> tuple[Choice, ...]:
    """The choice for each data set that held-out pictures are taken from. Cached, because it is needed more than once.

    Raises DataError if it would leave nothing to train on.
    """
    only = run.config.eval_dataset_id
    sets = [dataset for dataset in run.datasets if only in (None, dataset.id)]
    with eval_record(run.workspace, run.config.seed) as record:
        names = _names(index, "image_id", {image_id for pictures in record.sets.values() for image_id in pictures})
        known = {dataset.id: _known(record, dataset.id, names) for dataset in sets}
        chosen = [(dataset.id, _choose(run, index, dataset, known[dataset.id])) for dataset in sets]
        choices = tuple(choice for _, choice in chosen if choice is not None)
        _remember(record, index, choices, known)
    return choices


def choice_notes(run: Run, choices: tuple[Choice, ...]) -> list[str]:
    """Notes on a choice for people: a line for each data set that is hardly trained on, or not measured."""
    notes = []
    for choice in choices:
        count, rest = len(choice.ids), choice.usable - len(choice.ids)
        if 0 < rest < count:
            are = "is" if rest == 1 else "are"
            notes.append(
                f"{choice.dataset_id}: {count} of its {choice.usable} pictures are held out (num_eval_images), and "
                f"{rest} {are} trained on. Add pictures, or lower num_eval_images; unset, it is {spare(choice.usable)}"
            )
    if not any(choice.ids for choice in choices):
        few = " and ".join(f"{choice.usable} of {choice.dataset_id}" for choice in choices) or "none"
        why = f"num_eval_images is {run.config.num_eval_images}"
        if run.config.num_eval_images is None:
            why = f"usable pictures: {few}; one is held out from {FEWEST} on"
        first = run.config.text_to_image
        drawn = "there are no samples, which need held-out pictures"
        if first is not None and not first.controlnet:
            drawn = "judge by the samples"
        unmeasured = "the loss is not"
        if upscalers := run.config.upscalers:
            unmeasured = f"neither the loss nor the output of {titles(upscalers)} is"
        notes.append(
            f"No picture is held out of training ({why}), so {unmeasured} measured on pictures that the model does not "
            f"know; {drawn}"
        )
    return notes


@lru_cache(maxsize=4)
def held_out_pictures(index: Artifact, choices: tuple[Choice, ...]) -> pa.Array:
    """The pictures that are not trained on: of all data sets those in held-out groups, by name, each once. Cached."""
    groups = pa.array(sorted({name for choice in choices for name in choice.groups}), pa.string())
    found = [pa.array([], pa.string())]
    for batch in ledger_batches(index, ["image_id", "group"]) if len(groups) else ():
        found += batch.filter(pc.is_in(group_names(batch), groups))["image_id"].chunks
    ids = pc.unique(pa.chunked_array(found))
    return ids.take(pc.sort_indices(ids))


def chosen_pictures(run: Run, index: Artifact, columns: tuple[str, ...]) -> pa.Table:
    """The chosen pictures (some columns), each once, in the order of their choice."""
    found = schema(run.config.paired).empty_table().select(columns)
    parts = [found]
    choices = {choice.dataset_id: pa.array(choice.ids, pa.string()) for choice in choose_held_out(run, index)}
    for batch in ledger_batches(index, columns) if any(map(len, choices.values())) else ():
        for name, ids in choices.items():
            own = pc.and_(pc.equal(batch["dataset_id"], name), pc.is_in(batch["image_id"], ids))
            parts.append(batch.filter(own))
    found = pa.concat_tables(parts)
    pairs = list(zip(found["dataset_id"].to_pylist(), found["image_id"].to_pylist(), strict=True))
    place = {pair: at for at, pair in reversed(list(enumerate(pairs)))}  # of two rows of a picture the first
    order = [place[name, image_id] for name, ids in choices.items() for image_id in ids.to_pylist()]
    return found.take(pa.array(order, pa.int64()))


def check_left(run: Run, index: Artifact, choices: tuple[Choice, ...]) -> list[str]:
    """A line for each data set that leaves a stage nothing to train on, except the set that is only measured on.

    Raises DataError when a stage has nothing at all to train on.
    """
    out = held_out_pictures(index, choices)
    usable: Counter[tuple[Stage, str]] = Counter()
    left: Counter[tuple[Stage, str]] = Counter()
    reasons = [f"stage{stage}_reason" for stage in run.config.stages]
    for batch in ledger_batches(index, ["image_id", "dataset_id", *reasons]):
        free = pc.invert(pc.is_in(batch["image_id"], out))
        for stage, reason in zip(run.config.stages, reasons, strict=True):
            fit = pc.is_null(batch[reason])
            for counts, rows in ((usable, fit), (left, pc.and_(fit, free))):
                for each in pc.value_counts(batch["dataset_id"].filter(rows)).to_pylist():
                    counts[stage, each["values"]] += each["counts"]
    only, notes = run.config.eval_dataset_id, list[str]()
    for stage in run.config.stages:
        of_sets = {name: count for (of, name), count in usable.items() if of == stage}
        if of_sets and not any(left[stage, name] for name in of_sets):
            advice = (
                f"Remove duplicates from {only}, or add pictures to the other sets" if only else "Add other pictures"
            )
            raise DataError(
                f"Stage {stage} has no picture to train on: each of its {sum(of_sets.values())} is held out, or a "
                f"duplicate of one that is. {advice}."
            )
        notes += [
            f"{name}: stage {stage} trains on none of its pictures: each of its {count} is held out, or a duplicate "
            "of one that is"
            for name, count in sorted(of_sets.items()) if not left[stage, name] and name != only
        ]  # fmt: skip
    return notes


def _names(index: Artifact, column: str, values: Iterable[str]) -> dict[str, str]:
    """The rows, rejected ones too, with one of these values in a column (`image_id`, or the group's `name`): image_id
    -> name.
    """
    wanted = pa.array(sorted(values), pa.string())
    found: dict[str, str] = {}
    for batch in ledger_batches(index, ["image_id", "group"], rejected=True) if len(wanted) else ():
        names = group_names(batch)
        rows = pc.is_in(names if column == "name" else batch[column], wanted)
        for image_id, name in zip(
            batch["image_id"].filter(rows).to_pylist(), names.filter(rows).to_pylist(), strict=True
        ):
            if found.get(image_id, image_id) == image_id:  # of the same bytes a rejected row is in no group
                found[image_id] = name
    return found


def _known(record: EvalRecord, dataset_id: str, names: dict[str, str]) -> _Known:
    subjects = {one: subject for one, subject in record.order_for(dataset_id).items() if one in names}
    groups: dict[str, tuple[int, str]] = {}
    for place, (image_id, subject) in enumerate(subjects.items()):
        groups.setdefault(names[image_id], (place, subject))
    return _Known(names, subjects, groups, record.is_closed)


def _choose(run: Run, index: Artifact, dataset: ImageDataset, known: _Known) -> Choice | None:
    """None when the data set feeds no stage or has no picture."""
    fed = tuple(stage for stage in run.config.stages if dataset.factor(stage) is not None)
    asked = run.config.num_eval_images
    rows = _by_hash(run, index, dataset, fed, known, _NONE) if fed else []
    usable = sum(row.fit for row in rows)
    if not usable:
        return None
    others = [other for other in run.datasets if other.id != dataset.id and not other.start_step]
    spared = run.config.eval_dataset_id is not None and all(
        any(other.factor(stage) is not None for other in others) for stage in fed
    )  # of others enough is trained on
    count = asked if asked is not None else MOST if spared else spare(usable)
    if usable <= count and not spared:
        raise DataError(
            f"{dataset.id} has {usable} usable pictures, and num_eval_images = {count} would hold all of them out. "
            f"Add pictures, or lower num_eval_images; unset, it is {spare(usable)}."
        )
    ids, groups = _take(rows, count, known)
    if known.is_closed:
        ids, groups = _take([row for row in rows if row.name in known.groups], count, known)
    elif not known.groups.keys() >= {*groups} and len(trained := _trained_groups(run, index)):
        rows = _by_hash(run, index, dataset, fed, known, trained)
        ids, groups = _take(rows, count, known)
        if asked is None and (fresh := _take([row for row in rows if not row.trained], count, known))[0]:
            ids, groups = fresh
    return Choice(dataset.id, usable, tuple(row.image_id for row in rows if row.image_id in ids), groups)


def _trained_groups(run: Run, index: Artifact) -> pa.Array:
    """The groups of an index with a picture that the version which serves was trained on; empty where it is not known."""
    try:
        serving = champion(run.workspace)
        eval_set = part_of(run.workspace, serving, "eval_set") if serving else None
        if serving is None or eval_set is None:
            return _NONE
        then = index_of(run.workspace, serving)
        out = mapped_table(eval_set.path / HELD_OUT_FILE)["image_id"].combine_chunks()
        ids = pa.chunked_array([batch["image_id"] for batch in ledger_batches(then, ["image_id"])], pa.string())
    except (ArtifactError, OSError, ValueError):  # pyarrow's errors are the last two
        return _NONE
    trained = ids.filter(pc.invert(pc.is_in(ids, out))).combine_chunks()
    names = [group_names(batch).filter(pc.is_in(batch["image_id"], trained))
             for batch in ledger_batches(index, ["image_id", "group"])]  # fmt: skip
    return pc.unique(pa.chunked_array(names, pa.string()))


def _take(rows: list[_Row], count: int, known: _Known) -> tuple[set[str], tuple[str, ...]]:
    """The pictures to measure on, and all groups that are held out. rows: as `_by_hash`.

    Earlier held-out pictures come first, one for each subject. One that is unfit now is not measured on, and stays held
    out.
    """
    ids: set[str] = set()
    groups: set[str] = set()
    taken: set[str] = set()
    for row in sorted(rows, key=lambda row: known.place(row.name)):  # stable
        if len(ids) == count:
            break
        subject = known.groups[row.name][1] if row.name in known.groups else row.image_id
        if subject in taken:
            continue
        groups.add(row.name)
        if row.fit:
            ids.add(row.image_id)
            taken.add(subject)
    groups |= {known.names[one] for one, subject in known.subjects.items() if subject in taken}
    return ids, tuple(sorted(groups))


def _by_hash(
    run: Run, index: Artifact, dataset: ImageDataset, fed: tuple[Stage, ...], known: _Known, trained: pa.Array
) -> list[_Row]:
    """The usable pictures of a data set with the smallest hashes, and all that are known, by hash; of each group one. Those
    come first that are not among the groups `trained`, then those that every stage could use which the set can feed: a
    stage that is added to the run then finds them chosen.
    """
    most = max(_COUNTED, 2 * (run.config.num_eval_images or 0) + 1)
    # All stages, not the run's: otherwise Stage I alone would choose pictures that Stage II cannot use. So a new record in
    # STAGES changes the choice in new workspaces; an existing one keeps its pictures (`eval_record`).
    reasons = [f"stage{stage}_reason" for stage in STAGES if dataset.factor(stage) is not None]
    of_run = [f"stage{stage}_reason" for stage in fed]
    ids, groups = pa.array(known.subjects, pa.string()), pa.array(known.groups, pa.string())
    best = pa.table({"image_id": pa.array([], pa.string()), "name": pa.array([], pa.string()),
                     "fit": pa.array([], pa.bool_()), "everywhere": pa.array([], pa.bool_()),
                     "trained": pa.array([], pa.bool_())})  # fmt: skip
    for batch in ledger_batches(index, ["image_id", "group", "dataset_id", *reasons]):
        name = group_names(batch)
        fit, everywhere = (
            reduce(pc.and_, [pc.is_null(batch[reason]) for reason in some]) for some in (of_run, reasons)
        )
        own = pc.and_(pc.equal(batch["dataset_id"], dataset.id), pc.or_(fit, pc.is_in(name, groups)))
        columns = {"image_id": batch["image_id"], "name": name, "fit": fit, "everywhere": everywhere,
                   "trained": pc.is_in(name, trained)}  # fmt: skip
        rows = pa.table(columns).filter(own)
        best = pa.concat_tables([best, rows])
        units = hash_units("eval", run.config.seed, image_keys(best["name"]), np.zeros(len(best), np.int64))
        place = pc.fill_null(pc.index_in(best["image_id"], ids), len(ids)).to_numpy()  # of a group the longest known
        later = pc.not_equal(best["name"], best["image_id"]).to_numpy()
        less = ~best["everywhere"].to_numpy()
        order = np.lexsort((later, less, place, ~best["fit"].to_numpy(), units))
        first = order[np.unique(units[order], return_index=True)[1]]
        first = first[np.lexsort((less[first], best["trained"].to_numpy()[first]))]  # stable
        new = ~pc.is_in(best["name"], groups).to_numpy()[first]
        best = best.take(first[~new | (np.cumsum(new) <= most)])
    return [_Row(*row) for row in zip(*(best[column].to_pylist() for column in _Row._fields), strict=True)]


def _remember(record: EvalRecord, index: Artifact, choices: Iterable[Choice], known: dict[str, _Known]) -> None:
    """Add the held-out pictures to the record, the chosen ones first, and all duplicates of any that ever was held out."""
    kept: dict[str, set[str]] = {}  # of each data set the groups that it held out, now or before
    for choice in choices:
        recorded = record.sets.get(choice.dataset_id, {})
        before = {name for one, name in known[choice.dataset_id].names.items() if one in recorded}
        kept[choice.dataset_id] = before | set(choice.groups)
    members = _names(index, "name", set().union(*kept.values()))
    for choice in choices:
        mine, groups = known[choice.dataset_id], kept[choice.dataset_id]
        first = {members[image_id]: image_id for image_id in choice.ids}
        subjects = first | {name: subject for name, (_, subject) in mine.groups.items()}
        for name in sorted([*first, *sorted(groups - first.keys())], key=mine.place):  # stable: the new ones by hash
            record.add(choice.dataset_id, first.get(name) or list(mine.subjects)[mine.place(name)], subjects[name])
        for image_id, name in members.items():
            if name in groups:
                record.add(choice.dataset_id, image_id, subjects[name])
