"""A sheet of rejected files: a few for each reason of a ledger, as one picture.

The choice follows from the files' names alone. It does not use the run's seed, which is not part of an index's
identity. So the shown files stay the same when others are added. Costs a pass over the ledger that hashes the rejected
names, 2.4 s a million, and the decoding of the shown files.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from deepfloyd_core.files import sha256_bytes
from deepfloyd_core.pictures.sheets import Cell, captioned_sheet, fitted

MAX_SHOWN, COLUMNS = 32, 8


@dataclass(frozen=True)
class Rejected:
    """The ledger's facts about a rejected file."""

    reason: str
    dataset_id: str
    source: str
    image_id: str | None
    detail: str | None
    bytes: int
    width: int | None
    height: int | None


_COLUMNS = list(Rejected.__annotations__)


def choose(ledger: Path, not_wanted: tuple[str, ...]) -> list[Rejected]:
    """At most MAX_SHOWN rejected rows, without some reasons, an equal number of each reason as far as it has so many;
    sorted by reason. Holds a few hundred rows in memory.
    """
    best: pa.Table | None = None
    with pq.ParquetFile(ledger, pre_buffer=False) as file:  # it would hold the whole file
        for batch in file.iter_batches(columns=["status", *_COLUMNS]):
            mask = pc.equal(batch["status"], "rejected")
            mask = pc.and_not(mask, pc.is_in(batch["reason"], pa.array(not_wanted)))
            rows = pa.Table.from_batches([batch]).filter(mask).select(_COLUMNS)
            names = zip(rows["dataset_id"].to_pylist(), rows["source"].to_pylist(), strict=True)
            rows = rows.append_column("hash", pa.array([sha256_bytes("/".join(name).encode()) for name in names]))
            best = _ranked(rows if best is None else pa.concat_tables([best.drop_columns("rank"), rows]))
    if best is None:
        return []
    best = best.sort_by([("rank", "ascending"), ("reason", "ascending")]).slice(0, MAX_SHOWN)
    best = best.sort_by([("reason", "ascending"), ("rank", "ascending")])
    return [Rejected(**row) for row in best.select(_COLUMNS).to_pylist()]


def draw(rows: list[Rejected], pictures: Mapping[Rejected, np.ndarray], count: int, cell_px: int) -> Image.Image:
    """The sheet. `pictures`: those that could be decoded; `count`: of how many rejected files these are some."""
    cells = [
        Cell(
            pictures.get(row),
            row.detail or _words(row.reason),
            (_words(row.reason), _size(row), fitted(row.source, cell_px, 12, keep_end=True)),
        )
        for row in rows
    ]
    return captioned_sheet(cells, COLUMNS, cell_px, f"{len(rows)} of {count:,} rejected files")


def _ranked(rows: pa.Table) -> pa.Table:
    """The rows with the smallest hashes of each reason, and how many of its reason come before each."""
    rows = rows.sort_by([("reason", "ascending"), ("hash", "ascending")])
    _, first, group = np.unique(rows["reason"].to_numpy(), return_index=True, return_inverse=True)
    rank = np.arange(len(rows)) - first[group]
    return rows.append_column("rank", pa.array(rank)).filter(pa.array(rank < MAX_SHOWN))


def _words(reason: str) -> str:
    return reason.replace("_", " ")


def _size(row: Rejected) -> str:
    size = f"{row.width}x{row.height} px, " if row.width is not None else ""
    if row.bytes < 1000:
        return f"{size}{row.bytes} B"
    return f"{size}{row.bytes / 1000:,.0f} kB"
