"""Scan: lists every input of the data sets as one row of an Arrow table, with the sha256 of its bytes.

A file is read only when its size, times or inode differ from the notes of the last scan, so an unchanged data set costs
only its listing. The notes (`<workspace>/.scan/`) only save time: without them, or where their seal does not fit, every file
is read again (1.7 GB/s) and the table is the same. Nothing in the source directories is ever changed.
"""

import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from deepfloyd_core.arrow import table_digest
from deepfloyd_core.config.data_sets import ImageDataset
from deepfloyd_core.config.run import Run
from deepfloyd_core.errors import DataError
from deepfloyd_core.files import TMP_PREFIX, atomic_path, read_note, seal_note, sha256_bytes
from deepfloyd_core.index.captions import raw_captions
from deepfloyd_core.index.pairs import with_pairs
from deepfloyd_core.sources.columns import LISTED, LISTED_BLOCK, TEXTS, InColumns, tabled
from deepfloyd_core.sources.listing import FILE_BYTES
from deepfloyd_core.sources.names import count_labels, counted, starts_like_picture
from deepfloyd_core.sources.picture_bytes import is_heif
from deepfloyd_core.sources.source import Source, open_source
from deepfloyd_core.store.locks import create_workspace, locked
from deepfloyd_core.types import Report, no_report

log = logging.getLogger(__name__)

NOTES_DIR = ".scan"
BLOCK = 4096  # files whose reads are asked for at once
UNSURE_BYTES = 1 << 28  # more than any picture; a disk image would fill the memory
_START = 64  # bytes that tell a file's type

SCAN = pa.schema(
    [
        pa.field("dataset_id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),  # its name in the data set's source: a path, a URL
        pa.field("bytes", pa.int64(), nullable=False),
        pa.field("sha256", pa.string()),  # null: it could not be read
        pa.field("captions", TEXTS),  # texts as they were found; null: there are none, or they cannot be read
        pa.field("reason", pa.string()),  # why the scan itself rejects it
        pa.field("detail", pa.string()),  # of the reason, or why a caption that is there cannot be read
    ]
)
_NOTES = pa.schema([("source", pa.string()), ("stamp", pa.string()), ("bytes", pa.int64()), ("sha256", pa.string()),
                    ("looks_like", pa.string()), ("text_stamp", pa.string()), ("captions", TEXTS),
                    ("fault", pa.string())])  # fmt: skip
_READ = pa.schema([("bytes", pa.int64()), ("sha256", pa.string()), ("looks_like", pa.string()), ("fault", pa.string())])
_OTHERS = b"other files"  # in the scan's metadata: how many of each kind are no input, as JSON
_HEIF = b"HEIF"  # in it as well: some file is HEIF by its first bytes, whatever it is called


@dataclass(frozen=True)
class Unread:
    """The files of a data set that a scan would read: new ones, and those that changed since the last scan."""

    listed: int  # all of its files
    files: int
    bytes: int  # 0 where the source does not tell
    is_far: bool  # they are read over a network


class TooMuchToRead(DataError):
    """A scan would read more than it may."""

    def __init__(self, unread: dict[str, Unread]) -> None:
        super().__init__(f"{sum(one.files for one in unread.values())} files are to be read.")
        self.unread = unread  # of each data set


class _Listing(NamedTuple):
    """The files of a data set, and what the notes of the last scan tell of them."""

    source: Source
    notes: Path
    listed: pa.Table  # LISTED
    old: pa.Table  # _NOTES
    known: pa.Table  # of each listed file its note, null where there is none
    is_noted: np.ndarray  # bool: it has not changed since

    @property
    def to_read(self) -> np.ndarray:
        """The numbers of the files that must be read."""
        return np.flatnonzero(~self.is_noted & pc.is_null(self.listed["reason"]).to_numpy())

    @property
    def unread(self) -> Unread:
        """How much that is."""
        sizes = self.listed["bytes"].take(self.to_read)
        return Unread(len(self.listed), len(sizes), pc.sum(sizes).as_py() or 0, self.source.threads > 0)


class _Read(NamedTuple):
    """The result of reading a file: its length and sha256 (None: it cannot be read, `fault` says why)."""

    bytes: int
    sha256: str | None
    looks_like: str  # by its first bytes: picture, heif or other
    fault: str | None = None


def scan(run: Run, report: Report = no_report, most: int | None = None) -> pa.Table:
    """List the data sets and hash new or changed files: SCAN, sorted by data set and source. DataError: there are no files.

    With pairs it also has the columns of `with_pairs`. most: bytes of one data set that may be read, and nothing over a
    network; raises TooMuchToRead where it would be more.
    """
    others: Counter[str] = Counter()
    listings: Iterator[_Listing] = (
        _list_dataset(run, each, others) for each in run.datasets
    )  # one in memory at a time
    if most is not None:
        listings = iter(_listed_within(run, list(listings), most))
    parts = [_scan_dataset(run, *both, report, others) for both in zip(run.datasets, listings, strict=True)]
    places: list[pa.Table] = []
    if run.config.paired:
        parts, places = _with_places(run, parts, report)
    found = pa.concat_tables(parts)
    if not found.num_rows:
        where = ", ".join(open_source(dataset).name for dataset in run.datasets)
        beside = f" ({others_line(others)})" if others else ""
        raise DataError(f"There is no picture in {where}{beside}. Put pictures there, or correct the data set's entry.")
    if others:
        log.info("%s", others_line(others))
    found = found.sort_by([("dataset_id", "ascending"), ("source", "ascending")]).combine_chunks()
    heif = {_HEIF: b""} if any(map(has_heif, [*parts, *places])) else {}
    return found.replace_schema_metadata({_OTHERS: json.dumps(others), **heif})


def _listed_within(run: Run, listings: list[_Listing], most: int) -> list[_Listing]:
    """The same; raises TooMuchToRead where more is to be read, of the pictures or of their pairs."""
    unread = {dataset.id: listing.unread for dataset, listing in zip(run.datasets, listings, strict=True)}
    places = {place.id: place for dataset in run.datasets if (place := run.pairs_of(dataset)) is not None}
    unread |= {name: _list_dataset(run, place, Counter()).unread for name, place in places.items()}
    if any(one.bytes > most or (one.is_far and one.files) for one in unread.values()):
        raise TooMuchToRead(unread)
    return listings


def scan_some(run: Run, dataset: ImageDataset, names: Sequence[str]) -> pa.Table:
    """SCAN of some files of a data set, in their order. Notes of earlier scans are neither used nor made."""
    source, sources = open_source(dataset), pa.chunked_array([pa.array(names, pa.string())])
    read = tabled(_read_all(source, sources, source.threads or run.config.workers, no_report), _READ)
    texts = raw_captions(dataset, sources)
    reasons = pc.if_else(pc.is_null(read["sha256"]), source.lost, pa.scalar(None, pa.string()))
    details = pc.coalesce(read["fault"], texts["fault"])
    ids = pa.repeat(dataset.id, len(sources))
    return pa.table([ids, sources, read["bytes"], read["sha256"], texts["raw"], reasons, details], schema=SCAN)


def has_heif(found: pa.Table) -> bool:
    """Whether a scan found HEIF pictures."""
    return _HEIF in (found.schema.metadata or {})


def others_of(found: pa.Table) -> dict[str, int]:
    """How many files in a scan's places are no input, by their kind: `.mov`, `@eaDir/`, `no extension`."""
    return dict(json.loads((found.schema.metadata or {}).get(_OTHERS, b"{}")))


def others_line(others: Mapping[str, int]) -> str:
    """`others_of` in words; empty when there are none."""
    count = sum(others.values())
    many = "1 other file ({}) is no picture" if count == 1 else f"{count:,} other files ({{}}) are no pictures"
    return many.format(counted(others)) if count else ""


def _with_places(run: Run, parts: list[pa.Table], report: Report) -> tuple[list[pa.Table], list[pa.Table]]:
    """The scans of the data sets, each joined with the scan of its pairs' place; and the scans of those places."""
    scanned: dict[str, pa.Table] = {}
    paired = []
    for dataset, part in zip(run.datasets, parts, strict=True):
        place = run.pairs_of(dataset)
        if place is not None and place.id not in scanned:
            scanned[place.id] = _scan_dataset(run, place, _list_dataset(run, place, Counter()), report, Counter())
        paired.append(with_pairs(part, scanned[place.id] if place else SCAN.empty_table()))
    return paired, list(scanned.values())


def data_digest(scanned: pa.Table) -> str:
    """The fingerprint of a scan: everything that decides rows, but not why a file could not be read, which may vary."""
    told = pc.if_else(pc.is_null(scanned["reason"]), scanned["detail"], pa.scalar(None, pa.string()))
    return table_digest([scanned.set_column(scanned.schema.get_field_index("detail"), "detail", told)])


def _list_dataset(run: Run, dataset: ImageDataset, others: Counter[str]) -> _Listing:
    """List a data set. Counts in `others` the files that are no input."""
    source = open_source(dataset)
    notes = run.workspace / NOTES_DIR / f"{sha256_bytes(source.name.encode())[:16]}.arrow"
    listed = _without_others(_large_ones_left(_listing(source)), others)
    old = _read_notes(notes)
    known = old.take(pc.index_in(listed["source"], value_set=old["source"].combine_chunks()))
    is_noted = _equal_stamps(listed["stamp"], known["stamp"]) & pc.is_valid(known["sha256"]).to_numpy()
    return _Listing(source, notes, listed, old, known, is_noted)


def _scan_dataset(run: Run, dataset: ImageDataset, listing: _Listing, report: Report, others: Counter[str]) -> pa.Table:
    """SCAN of one data set. Counts in `others` the files that are no input."""
    source, notes, listed, old, known, same = listing
    to_read = listing.to_read
    names = listed["source"].take(to_read)
    read = tabled(_read_all(source, names, source.threads or run.config.workers, report), _READ)

    hashes = _merged(_where(same, known["sha256"]), to_read, read["sha256"])
    sizes = _merged(pc.if_else(pa.array(same), known["bytes"], listed["bytes"]), to_read, read["bytes"])
    looks = _merged(pc.if_else(pa.array(same), known["looks_like"], "picture"), to_read, read["looks_like"])
    kinds = pc.if_else(pc.or_(pc.equal(listed["kind"], "unsure"), pc.equal(looks, "heif")), looks, listed["kind"])
    lost = pc.and_(pc.is_null(hashes), pc.is_null(listed["reason"]))
    reasons = pc.if_else(lost, source.lost, listed["reason"])
    details = _merged(listed["detail"], to_read, read["fault"])

    usable = pc.and_(pc.is_null(reasons), pc.not_equal(kinds, "other")).to_numpy()
    same = usable & dataset.own_texts & _equal_stamps(listed["text_stamp"], known["text_stamp"])
    wanted = np.flatnonzero(usable & ~same)
    texts = raw_captions(dataset, listed["source"].take(wanted))
    captions = _merged(_where(same, known["captions"]), wanted, texts["raw"])
    faults = _merged(_where(same, known["fault"]), wanted, texts["fault"])
    # Only texts that lie with the pictures are worth a note: any others would be taken for them by the next scan.
    passing = wanted[texts["passing"].to_numpy()]
    stamps = _merged(listed["text_stamp"], passing, pa.chunked_array([pa.repeat("", len(passing))]))
    stamps = stamps if dataset.own_texts else pa.repeat("", len(listed))
    noted = (
        [captions, faults] if dataset.own_texts else [pa.nulls(len(listed), TEXTS), pa.nulls(len(listed), pa.string())]
    )
    new = pa.table([listed["source"], listed["stamp"], sizes, hashes, looks, stamps, *noted], schema=_NOTES)
    if not new.equals(old):
        _write_notes(notes, new)
    ids = pa.repeat(dataset.id, len(listed))
    details = pc.coalesce(details, faults)
    scanned = pa.table([ids, listed["source"], sizes, hashes, captions, reasons, details, kinds], [*SCAN.names, "kind"])
    heif = pc.any(pc.equal(kinds, "heif")).as_py()
    scanned = _without_others(scanned, others).drop_columns(["kind"]).cast(SCAN)
    return scanned.replace_schema_metadata({_HEIF: b""} if heif else None)


def _large_ones_left(listed: pa.Table) -> pa.Table:
    """Mark files that are too large to read: one whose name does not tell what it is becomes `other`, a picture is
    rejected.
    """
    large = pc.and_(pc.equal(listed["kind"], "unsure"), pc.greater(listed["bytes"], UNSURE_BYTES))
    listed = listed.set_column(
        listed.schema.get_field_index("kind"), "kind", pc.if_else(large, "other", listed["kind"])
    )
    picture = pc.and_(pc.equal(listed["kind"], "picture"), pc.is_null(listed["reason"]))
    large = pc.and_(picture, pc.greater(listed["bytes"], FILE_BYTES))
    reasons = pc.if_else(large, "unreadable", listed["reason"])
    details = pc.if_else(large, f"larger than {FILE_BYTES >> 20:,} MiB", listed["detail"])
    columns = [*listed.columns[:4], reasons, details, listed["kind"]]
    return pa.table(columns, schema=listed.schema)


def _without_others(table: pa.Table, others: Counter[str]) -> pa.Table:
    """The rows whose `kind` is not `other`; those are counted."""
    other = pc.equal(table["kind"], "other")
    names = table["source"].filter(other)
    for start in range(0, len(names), LISTED_BLOCK):
        others.update(count_labels(names.slice(start, LISTED_BLOCK).to_pylist()))
    return table.filter(pc.invert(other))


def _looks_like(start: bytes) -> str:
    """The type of a file by its first bytes."""
    if is_heif(start):
        return "heif"
    return "picture" if starts_like_picture(start) else "other"


def _equal_stamps(now: pa.ChunkedArray, then: pa.ChunkedArray) -> np.ndarray:
    same = pc.and_(pc.equal(now, then), pc.not_equal(now, ""))
    return np.asarray(pc.fill_null(same, False).to_numpy())


def _where(mask: np.ndarray, column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column of any type with null where the mask is false."""
    return column.take(pa.array(np.arange(len(mask)), mask=~mask))


def _merged(old: pa.ChunkedArray, places: np.ndarray, new: pa.ChunkedArray) -> pa.ChunkedArray:
    """`old` with the values at `places` replaced by `new`; for columns of any type."""
    take = np.arange(len(old))
    take[places] = len(old) + np.arange(len(new))
    return pa.chunked_array([*old.chunks, *new.chunks], old.type).take(take)


def _read_all(source: Source, names: pa.ChunkedArray, threads: int, report: Report) -> Iterator[_Read]:
    """The result of reading each file, in their order."""

    def read(name: str) -> _Read:
        digest, start, size = sha256(), b"", 0
        try:
            for piece in source.pieces(name):
                digest.update(piece)
                start, size = start + piece[: _START - len(start)], size + len(piece)
        except OSError as error:
            return _Read(0, None, "picture", str(error))
        except MemoryError:
            return _Read(0, None, "picture", "does not fit into the memory that is left")
        return _Read(size, digest.hexdigest(), _looks_like(start))

    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(names), BLOCK):
            yield from pool.map(read, names.slice(start, BLOCK).to_pylist())
            report(min(start + BLOCK, len(names)), len(names), "files hashed")


def _read_notes(path: Path) -> pa.Table:
    data = read_note(path)
    if data is None:
        return _NOTES.empty_table()  # none yet, or damaged: everything is read again
    notes = pa.ipc.open_file(pa.py_buffer(data)).read_all()
    return notes if notes.schema.equals(_NOTES) else _NOTES.empty_table()


def _write_notes(path: Path, notes: pa.Table) -> None:
    create_workspace(path.parents[1])
    path.parent.mkdir(exist_ok=True)
    with locked(path.parents[1], f"scan-{path.stem}"):
        for left in path.parent.glob(f"{TMP_PREFIX}*-{path.name}"):
            left.unlink()  # of a run that was killed: who writes holds the lock
        with atomic_path(path) as tmp:
            with pa.ipc.new_file(tmp, _NOTES) as writer:
                writer.write_table(notes)
            seal_note(tmp)


def _listing(source: Source) -> pa.Table:
    """LISTED, sorted by source."""
    listed = source.listed() if isinstance(source, InColumns) else tabled(source.listing(), LISTED)
    return listed.sort_by("source")
