"""Scan: every input file of the data sets as one row of an Arrow table, with the sha256 that names its bytes.

A file is read only when its size, times or inode differ from the notes of the last scan, so an unchanged data set costs
its listing. The notes (`<workspace>/.scan/`) are no truth of their own: without them every file is read again (1.7 GB/s) and
the table is the same. Nothing in the source directories is ever touched.
"""

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from deepfloyd_core.artifacts import locked
from deepfloyd_core.caption_tables import table_path
from deepfloyd_core.captions import raw_captions
from deepfloyd_core.config import Run
from deepfloyd_core.datafile import TABLES, ImageDataset
from deepfloyd_core.errors import DataError
from deepfloyd_core.files import TMP_PREFIX, atomic_path, sha256_bytes
from deepfloyd_core.types import Report, no_report

NOTES_DIR = ".scan"
SIDECARS = (".txt", ".json")  # captions and metadata: not inputs
BLOCK = 4096  # files whose reads are asked for at once
LISTED_BLOCK = 1 << 16  # files of a listing held as Python objects
RACY_NS = 2_000_000_000  # a file this young may change again without a new time of change (FAT counts in 2 s)
_TEXTS = pa.list_(pa.string())

SCAN = pa.schema(
    [
        pa.field("dataset_id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),  # path below the data set's directory, with forward slashes
        pa.field("bytes", pa.int64(), nullable=False),
        pa.field("sha256", pa.string()),  # null: it could not be read
        pa.field("captions", _TEXTS),  # texts as they were found; null: there are none, or they cannot be read
        pa.field("reason", pa.string()),  # why the scan itself rejects it
    ]
)
_NOTES = pa.schema([("source", pa.string()), ("stamp", pa.string()), ("sha256", pa.string()),
                    ("text_stamp", pa.string()), ("captions", _TEXTS)])  # fmt: skip
_LISTED = pa.schema([("source", pa.string()), ("bytes", pa.int64()), ("stamp", pa.string()),
                     ("text_stamp", pa.string()), ("reason", pa.string())])  # fmt: skip


@dataclass(frozen=True)
class _Listed:
    """One file of a listing. A stamp changes when the file does; "" is never trusted."""

    source: str
    bytes: int = 0
    stamp: str = ""
    text_stamp: str = ""
    reason: str | None = None


def scan(run: Run, report: Report = no_report) -> pa.Table:
    """List the data sets, hash what is new or changed: SCAN, sorted by data set and source. DataError: nothing there."""
    parts = [_scan_dataset(run, dataset, report) for dataset in run.datasets]
    found = pa.concat_tables(parts)
    if not found.num_rows:
        places = ", ".join(dataset.instance_data_dir for dataset in run.datasets)
        raise DataError(f"There is no picture in {places}. Put pictures there, or correct instance_data_dir.")
    return found.sort_by([("dataset_id", "ascending"), ("source", "ascending")]).combine_chunks()


def table_digest(table: pa.Table) -> str:
    """16 hex digits over a table's values (text, whole numbers, lists of text), however it is cut into chunks."""
    digest = hashlib.sha256()
    for column in table.columns:
        _digest(digest, column)
    return digest.hexdigest()[:16]


def _digest(digest: Any, column: pa.ChunkedArray) -> None:
    digest.update(np.packbits(pc.is_valid(column).to_numpy()).tobytes())
    if pa.types.is_list(column.type):
        digest.update(pc.fill_null(pc.list_value_length(column), 0).to_numpy().astype("<i8").tobytes())
        _digest(digest, pc.list_flatten(column))
    elif pa.types.is_string(column.type):
        column = pc.fill_null(column, "")
        digest.update(pc.binary_length(column).to_numpy().astype("<i8").tobytes())
        for chunk in column.chunks:
            _, offsets, text = chunk.buffers()
            ends = np.frombuffer(offsets, np.int32)[chunk.offset : chunk.offset + len(chunk) + 1]
            digest.update(memoryview(text or b"")[ends[0] : ends[-1]])
    else:
        digest.update(column.to_numpy().astype("<i8").tobytes())


def _scan_dataset(run: Run, dataset: ImageDataset, report: Report) -> pa.Table:
    root = Path(dataset.instance_data_dir)
    notes = run.workspace / NOTES_DIR / f"{sha256_bytes(str(root.resolve()).encode())[:16]}.arrow"
    listed = _listing(dataset, root)
    old = _read_notes(notes)
    place = pc.index_in(listed["source"], value_set=old["source"].combine_chunks())
    known = old.take(place)
    same = _equal_stamps(listed["stamp"], known["stamp"]) & pc.is_valid(known["sha256"]).to_numpy()
    to_read = np.flatnonzero(~same & pc.is_null(listed["reason"]).to_numpy())
    sources = listed["source"].take(to_read).to_pylist()
    read = list(_read_all(root, sources, run.config.workers, report))

    hashes = _merged(_where(same, known["sha256"]), to_read, pa.array([sha for _, sha in read], pa.string()))
    sizes = listed["bytes"].to_numpy().copy()
    sizes[to_read] = [size for size, _ in read]
    lost = pc.and_(pc.is_null(hashes), pc.is_null(listed["reason"]))
    reasons = pc.if_else(lost, "unreadable", listed["reason"])

    usable = pc.is_null(reasons).to_numpy()
    beside = dataset.caption_strategy == "textfile" and not dataset.only_instance_prompt
    same = usable & beside & _equal_stamps(listed["text_stamp"], known["text_stamp"])
    wanted = np.flatnonzero(usable & ~same)
    texts = raw_captions(dataset, listed["source"].take(wanted).to_pylist())
    captions = _merged(_where(same, known["captions"]), wanted, pa.array(texts, _TEXTS))
    # Only texts that lie beside the pictures are worth a note: any others would be taken for them by the next scan.
    stamps = listed["text_stamp"] if beside else pa.repeat("", len(listed))
    noted = captions if beside else pa.nulls(len(listed), _TEXTS)
    new = pa.table([listed["source"], listed["stamp"], hashes, stamps, noted], schema=_NOTES)
    if not new.equals(old):
        _write_notes(notes, new)
    ids = pa.repeat(dataset.id, len(listed))
    return pa.table([ids, listed["source"], sizes, hashes, captions, reasons], schema=SCAN)


def _equal_stamps(now: pa.ChunkedArray, then: pa.ChunkedArray) -> np.ndarray:
    same = pc.and_(pc.equal(now, then), pc.not_equal(now, ""))
    return np.asarray(pc.fill_null(same, False).to_numpy())


def _where(mask: np.ndarray, column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column of any type with null where the mask is false."""
    return column.take(pa.array(np.arange(len(mask)), mask=~mask))


def _merged(old: pa.ChunkedArray, places: np.ndarray, new: pa.Array) -> pa.ChunkedArray:
    """`old` with the values at `places` replaced by `new`; for columns of any type."""
    take = np.arange(len(old))
    take[places] = len(old) + np.arange(len(new))
    return pa.chunked_array([*old.chunks, new]).take(take)


def _read_all(root: Path, sources: list[str], workers: int, report: Report) -> Iterator[tuple[int, str | None]]:
    """(bytes, sha256) of each file; None for one that cannot be read."""
    with ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(sources), BLOCK):
            yield from pool.map(lambda source: _read(root / source), sources[start : start + BLOCK])
            report(min(start + BLOCK, len(sources)), len(sources), "files hashed")


def _read(path: Path) -> tuple[int, str | None]:
    try:
        data = path.read_bytes()
    except OSError:
        return 0, None
    return len(data), sha256_bytes(data)


def _read_notes(path: Path) -> pa.Table:
    try:
        notes = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except (OSError, pa.ArrowInvalid):
        return _NOTES.empty_table()  # none yet, or damaged: everything is read again
    return notes if notes.schema.equals(_NOTES) else _NOTES.empty_table()


def _write_notes(path: Path, notes: pa.Table) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.parents[1], f"scan-{path.stem}"):
        for left in path.parent.glob(f"{TMP_PREFIX}*-{path.name}"):
            left.unlink()  # of a run that was killed: who writes holds the lock
        with atomic_path(path) as tmp, pa.ipc.new_file(tmp, _NOTES) as writer:
            writer.write_table(notes)


def _listing(dataset: ImageDataset, root: Path) -> pa.Table:
    """_LISTED, sorted by source: the files below a directory that may be pictures, and directories that cannot be listed."""
    table = table_path(dataset).resolve() if dataset.caption_strategy in TABLES else None

    def skip(path: str) -> bool:
        return table is not None and path.endswith(table.name) and Path(path).resolve() == table

    files = _walk(root, skip)
    blocks = []
    while block := list(islice(files, LISTED_BLOCK)):
        blocks.append(pa.RecordBatch.from_pylist([asdict(file) for file in block], schema=_LISTED))
    return pa.Table.from_batches(blocks, schema=_LISTED).sort_by("source")


def _walk(root: Path, skip: Callable[[str], bool]) -> Iterator[_Listed]:
    young = time.time_ns() - RACY_NS
    real_root = root.resolve()
    folders = [""]
    while folders:
        folder = folders.pop()
        try:
            with os.scandir(root / folder) as handle:
                entries = list(handle)
        except OSError:
            yield _Listed(_printable(folder or "./"), reason="unreadable")
            continue
        texts = {entry.name: entry for entry in entries if entry.name.endswith(".txt")}
        for entry in entries:
            name = entry.name
            if name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                folders.append(f"{folder}{name}/")
            elif not name.lower().endswith(SIDECARS) and not skip(entry.path):
                yield _listed(entry, folder + name, real_root, young, texts.get(_text_name(name)))


def _listed(
    entry: "os.DirEntry[str]", source: str, real_root: Path, young: int, text: "os.DirEntry[str] | None"
) -> _Listed:
    printable = _printable(source)
    if printable != source:
        return _Listed(printable, reason="name_not_utf8")
    try:
        if entry.is_symlink() and not Path(entry.path).resolve().is_relative_to(real_root):
            return _Listed(source, reason="outside_root")
        if not entry.is_file():
            return _Listed(source, reason="not_a_file")
        return _Listed(source, entry.stat().st_size, _stamp(entry, young), _stamp(text, young) if text else "none")
    except OSError:
        return _Listed(source, reason="unreadable")
    except RuntimeError:
        return _Listed(source, reason="not_a_file")  # a link that leads to itself, before Python 3.13


def _stamp(entry: "os.DirEntry[str]", young: int) -> str:
    try:
        stat = entry.stat()
    except OSError:
        return ""
    if max(stat.st_mtime_ns, stat.st_ctime_ns) > young:
        return ""
    return f"{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}:{stat.st_ino}"


def _text_name(name: str) -> str:
    """What pathlib's `with_suffix(".txt")` makes of a name."""
    dot = name.rfind(".")
    return f"{name[:dot] if 0 < dot < len(name) - 1 else name}.txt"


def _printable(source: str) -> str:
    if source.isascii():
        return source
    return source.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
