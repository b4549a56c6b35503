"""The pictures that a run would find: its index, or as much as can be known of it in a few seconds.

An unchanged data set costs its listing, because the last scan's notes tell its hashes. A little that is new is read and
judged here as the run will judge it, in the shadow. More is only counted: then the plan stands on the newest index.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from deepfloyd_core.config.run import Run
from deepfloyd_core.crops.eval_choice import check_left, choice_notes, choose_held_out, held_out_pictures
from deepfloyd_core.index.changed_pictures import picture_changes
from deepfloyd_core.index.identity import FORMAT, index_request
from deepfloyd_core.index.index import build_index, judges
from deepfloyd_core.index.ledger import INDEX_FILE, check_share, ledger_batches
from deepfloyd_core.index.older_verdicts import older_verdicts
from deepfloyd_core.index.scan import TooMuchToRead, Unread, scan
from deepfloyd_core.index.summary import IndexSummary
from deepfloyd_core.store.artifacts import Artifact, Request, find, materialise, newest
from deepfloyd_core.store.counts import many

MOST_READ = 1 << 29  # bytes: 0.3 s at 1.7 GB/s
MOST_JUDGED = 64_000_000  # bytes of pictures: 2 s on two cores
_HELD_OUT, _TRAINED = "held out", "trained on"  # no reasons of a rejection
MOST_ROWS = 20_000  # of an index that is made for the plan alone


@dataclass(frozen=True)
class DataLook:
    """What is known of a run's pictures."""

    index: Artifact | None  # the run's, or the newest one before it; None: there is none
    is_current: bool  # it is the run's
    request: Request | None  # of the run's index; None: not known
    is_made: bool  # it is finished in the workspace
    changes: tuple[str, ...]  # since the newest index, in words
    unread: Mapping[str, Unread]  # by data set, where the index is not the run's
    to_judge: int = 0  # pictures
    judged_s: float | None = None  # what that took here; None: they were not all judged


@dataclass(frozen=True)
class SetCount:
    """The pictures of a data set."""

    dataset_id: str
    inputs: int
    rejected: Mapping[str, int]  # by their reason
    held_out: int
    trained: int  # accepted, and not held out


def look_of(index: Artifact) -> DataLook:
    """What is known once a run has its index."""
    return DataLook(index, True, Request(index.kind, FORMAT, index.spec, index.inputs), index.reused, (), {})


def look_at_data(run: Run) -> DataLook:
    """Look at a run's pictures. run: in its shadow. Raises what a scan raises, e.g. DataError where there are none."""
    before = newest(run.workspace, "image_index", FORMAT)
    try:
        scanned = scan(run, most=MOST_READ)
    except TooMuchToRead as error:
        to_read = sum(one.files for one in error.unread.values())
        return DataLook(before, False, None, False, (), error.unread, to_read)
    request = index_request(run, scanned)
    if index := find(run.workspace, request):
        return DataLook(index, True, request, True, (), {})
    unknown = older_verdicts(run, scanned, run.workspace).place.is_null()
    to_judge = pc.sum(scanned["bytes"].filter(unknown)).as_py() or 0
    if to_judge > MOST_JUDGED or len(scanned) > MOST_ROWS:
        return DataLook(before, False, request, False, (), {}, unknown.true_count)
    with judges(run) as children:
        index = materialise(run.workspace, request, lambda work: build_index(run, scanned, children, work))
    changes = picture_changes(before.path / INDEX_FILE, index.path / INDEX_FILE) if before else []
    took = index.manifest.provenance.seconds
    return DataLook(index, True, request, False, tuple(changes), {}, unknown.true_count, took)


def check_index(run: Run, index: Artifact) -> list[str]:
    """What a run says of its index, in notes. Raises DataError where it would end: too many rejected, nothing left."""
    check_share(index.summary(IndexSummary), run.config.max_rejected_share, None)
    choices = choose_held_out(run, index)
    return choice_notes(run, choices) + check_left(run, index, choices)


def count_sets(run: Run, index: Artifact) -> list[SetCount]:
    """The pictures of each data set in an index. Raises DataError where nothing would be left to train on."""
    out = held_out_pictures(index, choose_held_out(run, index))
    counts: Counter[tuple[str, str]] = Counter()  # by data set, and by what became of a picture
    for batch in ledger_batches(index, ["dataset_id", "status", "reason", "image_id"], rejected=True):
        is_out = pc.if_else(pc.is_in(batch["image_id"], out), _HELD_OUT, _TRAINED)
        became = pc.if_else(pc.equal(batch["status"], "accepted"), is_out, batch["reason"])
        rows = pa.table({"dataset": batch["dataset_id"], "became": became}).group_by(["dataset", "became"])
        for row in rows.aggregate([([], "count_all")]).to_pylist():
            counts[row["dataset"], row["became"]] += row["count_all"]
    return [_set_count(dataset.id, {what: n for (name, what), n in counts.items() if name == dataset.id})
            for dataset in run.datasets]  # fmt: skip


def _set_count(name: str, counts: dict[str, int]) -> SetCount:
    rejected = {reason: count for reason, count in sorted(counts.items()) if reason not in (_HELD_OUT, _TRAINED)}
    return SetCount(name, sum(counts.values()), rejected, counts.get(_HELD_OUT, 0), counts.get(_TRAINED, 0))


def why_unknown(look: DataLook) -> str:
    """What is not known of the data, in words; empty where all is."""
    if look.is_current:
        return ""
    new = [f"{name}: {many(one.files, 'new or changed file')} of {one.listed:,}" for name, one in look.unread.items()]
    amount = f"{'; '.join(new)}, more than a plan reads"
    if not new:
        amount = f"{many(look.to_judge, 'new picture')}, more than a plan judges"
    since = "what follows is of the last index" if look.index else "no picture was looked into"
    return f"{amount}; {since}"
