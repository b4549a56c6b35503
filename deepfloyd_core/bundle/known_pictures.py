"""The pictures that a version's weights were trained on, and those of them that a run would not train on any more.

A warm training starts only while all of them are among its own pictures. So the pictures of the version that it starts
from contain those of all versions before it, and comparing with that one version is exact for the whole chain. A
picture is its bytes and its captions, of a ControlNet also its pair; its name does not count. Costs a few columns of two
ledgers, in memory.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from deepfloyd_core.arrow import mapped_table
from deepfloyd_core.config.run import Run
from deepfloyd_core.config.stages import STAGES, Stage
from deepfloyd_core.crops.eval_choice import choose_held_out, held_out_pictures
from deepfloyd_core.crops.rows import HELD_OUT_FILE
from deepfloyd_core.errors import ArtifactError
from deepfloyd_core.index.ledger import INDEX_FILE
from deepfloyd_core.store.artifacts import Artifact, damaged_parts
from deepfloyd_core.store.manifest import MANIFEST
from deepfloyd_core.store.versions import Version, index_of, part_of

_NAMED = 3  # pictures in a sentence
_COLUMNS = ("dataset_id", "source", "status", "image_id", "captions")


@dataclass(frozen=True)
class Ledger:
    """The pictures of an index."""

    rows: pa.Table  # name, source, status, image_id, content, and of each stage its reason
    held_out: pa.Array

    def trained_on(self, stage: Stage) -> pa.Table:
        """The rows that a stage is trained on."""
        fed = pc.and_(pc.equal(self.rows["status"], "accepted"), pc.is_null(self.rows[_reason(stage)]))
        return self.rows.filter(pc.and_(fed, pc.invert(pc.is_in(self.rows["image_id"], self.held_out))))

    def known(self, stage: Stage) -> pa.Table:
        """The `image_id` of each picture that a stage is trained on, by name, each once."""
        ids = pc.unique(self.trained_on(stage)["image_id"].combine_chunks())
        return pa.table({"image_id": ids.take(pc.sort_indices(ids))})


@dataclass(frozen=True)
class Missing:
    """Known pictures that a run would not train on, by their names; what became of each."""

    removed: tuple[str, ...]
    changed: tuple[str, ...]  # pixels, caption or pair
    rejected: tuple[str, ...]
    unused: tuple[str, ...]  # held out, or of no use to their stage: they are in the data as they were

    @property
    def taken_out(self) -> str:
        """Those that are not in the data as they were, in words; empty: there is none."""
        told = (self.removed, "removed"), (self.changed, "changed"), (self.rejected, "rejected")
        return ", and ".join(_were(names, became) for names, became in told if names)

    @property
    def left(self) -> str:
        """The others, in words; empty: there is none."""
        return _were(self.unused, "held out of training, or left out of it") if self.unused else ""


def ledger_of(index: Artifact, held_out: pa.Array) -> Ledger:
    """The pictures of an index. Raises OSError or ValueError when it cannot be read (pyarrow's errors are both)."""
    file = index.path / INDEX_FILE
    pairs = [name for name in ("conditioning_id",) if name in pq.read_schema(file).names]
    reasons = [_reason(stage) for stage in STAGES]
    table = pq.read_table(file, columns=[*_COLUMNS, *reasons, *pairs])
    parts = [table["image_id"], pc.binary_join(table["captions"], "\n"), *(table[name] for name in pairs)]
    content = pc.binary_join_element_wise(*parts, "\x1f", null_handling="replace")
    name = pc.binary_join_element_wise(table["dataset_id"], table["source"], "/")
    kept = {column: table[column] for column in ("source", "status", "image_id", *reasons)}
    return Ledger(pa.table({**kept, "name": name, "content": content}), held_out)


def ledger_now(run: Run, index: Artifact) -> Ledger:
    """The pictures of a run's index, with those that it holds out."""
    return ledger_of(index, held_out_pictures(index, choose_held_out(run, index)))


def ledger_then(workspace: Path, version: Version) -> Ledger:
    """The pictures of a finished version. Raises ArtifactError when its record names no held-out pictures, or a file of
    these is damaged, and as `ledger_of`.
    """
    eval_set = part_of(workspace, version, "eval_set")
    if eval_set is None:
        raise ArtifactError("its record names no held-out pictures")
    index = index_of(workspace, version)
    for artifact in (index, eval_set):
        if (artifact.path / MANIFEST).exists() and (fault := next(damaged_parts(artifact), None)):
            raise ArtifactError(fault)
    return ledger_of(index, mapped_table(eval_set.path / HELD_OUT_FILE)["image_id"].combine_chunks())


def missing(then: Ledger, now: Ledger, stages: tuple[Stage, ...]) -> Missing | None:
    """The pictures that a stage was trained on then and is not now; None: there is none."""
    lost = [_without(then.trained_on(stage), now.trained_on(stage)) for stage in stages]
    rows = pa.concat_tables(lost) if lost else then.rows.slice(0, 0)
    if not len(rows):
        return None
    accepted = now.rows.filter(pc.equal(now.rows["status"], "accepted"))
    is_there = pc.is_in(rows["content"], accepted["content"].combine_chunks())
    others = rows.filter(pc.invert(is_there))
    place = pc.index_in(others["name"], now.rows["name"].combine_chunks())
    status = pc.fill_null(now.rows["status"].take(place), "removed")
    return Missing(
        removed=tuple(_names(others.filter(pc.equal(status, "removed")))),
        changed=tuple(_names(others.filter(pc.equal(status, "accepted")))),
        rejected=tuple(_names(others.filter(pc.equal(status, "rejected")))),
        unused=tuple(_names(rows.filter(is_there))),
    )


def _without(rows: pa.Table, others: pa.Table) -> pa.Table:
    return rows.filter(pc.invert(pc.is_in(rows["content"], others["content"].combine_chunks())))


def _names(rows: pa.Table) -> Iterator[str]:
    """The files of rows, each once."""
    return iter(dict.fromkeys(rows["source"].to_pylist()))


def _reason(stage: Stage) -> str:
    return f"{STAGES[stage].table}_reason"


def _were(names: tuple[str, ...], became: str) -> str:
    """`a.png was removed`; many are counted."""
    shown = ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else "")
    return f"{shown} {'was' if len(names) == 1 else 'were'} {became}"
