"""How the pictures of two indexes differ, by their paths."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from deepfloyd_core.store.counts import many

MOST_NAMES = 3
_WHAT = {"accepted": "picture", "rejected": "rejected file"}  # by status
MOST_ROWS = 2_000_000  # of two ledgers that are compared name by name: 250 bytes each


def picture_changes(old: Path, new: Path) -> list[str]:
    """How the pictures of two ledgers differ: `1 picture added: cat.jpg`, withdrawn, changed, captions changed.

    Rejected files are named as such; files in both ledgers are listed when they are newly rejected or newly accepted.
    """
    if sum(pq.read_metadata(ledger).num_rows for ledger in (old, new)) > MOST_ROWS:
        counts = (f"{pq.read_metadata(ledger).num_rows:,}" for ledger in (old, new))
        return [f"pictures: {' -> '.join(counts)}"]
    columns = ["dataset_id", "source", "status", "image_id", "captions"]
    before, now = (pq.read_table(ledger, columns=columns) for ledger in (old, new))
    names = [
        pc.binary_join_element_wise(table["dataset_id"], table["source"], "/").combine_chunks()
        for table in (before, now)
    ]
    place = pc.index_in(names[1], names[0])
    came, stayed = np.flatnonzero(pc.is_null(place).to_numpy(False)), np.flatnonzero(pc.is_valid(place).to_numpy(False))
    went = np.flatnonzero(~pc.is_in(names[0], names[1]).to_numpy(False))
    same = before.take(place.drop_null())
    kept = now.take(pa.array(stayed))
    other = {name: ~_equal(_text(same[name]), _text(kept[name])) for name in ("status", "image_id", "captions")}
    said_anew = (
        other["captions"] & ~other["image_id"] & ~other["status"]
    )  # else the caption was added or removed with the rest
    lines = [
        *(_named(_WHAT[status], "added", part) for status, part in _by_status(now.take(pa.array(came)))),
        *(_named(_WHAT[status], "withdrawn", part) for status, part in _by_status(before.take(pa.array(went)))),
        *(
            _named("picture", f"{status} now", part)
            for status, part in _by_status(kept.filter(pa.array(other["status"])))
        ),
        _named("picture", "changed", kept["source"].filter(pa.array(other["image_id"]))),
        _named("caption", "changed", kept["source"].filter(pa.array(said_anew))),
    ]
    return [line for line in lines if line]


def _by_status(rows: pa.Table) -> list[tuple[str, pa.ChunkedArray]]:
    return [(status, rows["source"].filter(pc.equal(rows["status"], status))) for status in _WHAT]


def _text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.binary_join(column, "\n") if pa.types.is_list(column.type) else pc.fill_null(column, "")


def _equal(one: pa.ChunkedArray, other: pa.ChunkedArray) -> np.ndarray:
    return np.asarray(pc.equal(one, other).to_numpy(), bool)


def _named(what: str, became: str, sources: pa.ChunkedArray) -> str:
    """Empty for none."""
    shown = ", ".join(sources.slice(0, MOST_NAMES).to_pylist())
    more = f" and {len(sources) - MOST_NAMES:,} more" if len(sources) > MOST_NAMES else ""
    return f"{many(len(sources), what)} {became}: {shown}{more}" if len(sources) else ""
