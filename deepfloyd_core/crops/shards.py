"""Pixel shards: ordinary Parquet whose `pixels` column can also be memory-mapped row by row.

The column is fixed-size binary, non-null, PLAIN, uncompressed, one page a row group. So the values of a row group lie
end to end, row i starts at a known offset, and a batch is a few page faults. In shuffled order this is more than half
as fast as rows of a plain memory-mapped array, and 100 times as fast as PNG files; `benchmarks/results.md`.

Whoever opens a shard of a finished artifact here hashes it whole first, because a flipped bit of its footer can end the
process inside of Arrow. A training does not open it: the list of rows has the place and the checksum of each row's pixels.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from deepfloyd_core.files import atomic_path
from deepfloyd_core.hashing import checksum
from deepfloyd_core.store.damage import reading, whole

ROW_GROUP_BYTES = 2 << 20  # 1 to 3 MiB: large enough to stream, small enough to shuffle by
_TEXT, _INT, _REAL = pa.string(), pa.int32(), pa.float64()
_COLUMNS = (
    ("image_id", _TEXT), ("source", _TEXT), ("dataset_id", _TEXT), ("width", _INT), ("height", _INT),
    ("original_width", _INT), ("original_height", _INT), ("crop_left", _REAL), ("crop_top", _REAL),
    ("crop_width", _REAL), ("crop_height", _REAL), ("repeat", _INT), ("caption", _TEXT), ("caption_id", _TEXT),
    ("crop_style", _TEXT), ("method", _TEXT),
)  # fmt: skip
_NAMES = [name for name, _ in _COLUMNS]
PIXELS_SUM = "pixels_xxh3"  # the column of their checksums, uint64


@dataclass(frozen=True)
class ShardRow:
    """All columns of one crop except its pixels. The crop's box is in pixels of the upright original."""

    image_id: str
    source: str
    dataset_id: str
    width: int
    height: int
    original_width: int
    original_height: int
    crop_left: float
    crop_top: float
    crop_width: float
    crop_height: float
    repeat: int
    caption: str
    caption_id: str
    crop_style: str  # how this crop was placed: `center` also where no face was found
    method: str = ""  # how the crop was resized, known once it is made: kept, literal, scaled 1/2 to 1/8


def write_shard(path: Path, rows: list[ShardRow], pixels: list[np.ndarray]) -> None:
    """Write crops of one size, durably. pixels: uint8 (height, width, 3), one for each row."""
    size = rows[0].width * rows[0].height * 3
    flat = np.concatenate([picture.reshape(-1) for picture in pixels])
    column = pa.FixedSizeBinaryArray.from_buffers(pa.binary(size), len(rows), [None, pa.py_buffer(flat)])
    pieces = flat.data
    sums = [checksum(pieces[start : start + size]) for start in range(0, len(flat), size)]
    arrays = [pa.array([getattr(row, name) for row in rows], type=kind) for name, kind in _COLUMNS]
    columns = [*_COLUMNS, (PIXELS_SUM, pa.uint64()), ("pixels", pa.binary(size))]
    schema = pa.schema([pa.field(name, kind, nullable=False) for name, kind in columns])
    arrays += [pa.array(sums, pa.uint64()), column]
    table = pa.Table.from_arrays(arrays, schema=schema)
    group = max(1, ROW_GROUP_BYTES // size)
    with atomic_path(path) as tmp:
        pq.write_table(
            table, tmp, row_group_size=group, compression="none", use_dictionary=_NAMES,
            data_page_size=1 << 30, write_batch_size=group, store_schema=False,
            write_statistics=_NAMES,  # not of the pixels: the page header would hold two whole pictures
        )  # fmt: skip


def read_rows(path: Path) -> list[ShardRow]:
    """The rows of a shard without their pixels. Raises DamagedError where it is not as written."""
    with reading(whole(path)):
        return [ShardRow(**row) for row in pq.read_table(path, columns=_NAMES).to_pylist()]


def read_pixel_sums(path: Path) -> np.ndarray:
    """The checksums of the pixels of a shard's rows: uint64 (rows,)."""
    with reading(whole(path)):
        return np.asarray(pq.read_table(path, columns=[PIXELS_SUM])[PIXELS_SUM].to_numpy())


@dataclass(frozen=True)
class ShardPixels:
    """The pixels of a shard, memory-mapped and read-only: item n is row n, uint8 (height, width, 3)."""

    raw: memoryview  # the whole file
    group_starts: np.ndarray  # int64: where the pixels of each row group start in it
    group_rows: int  # rows in each row group; the last may have fewer
    rows: int
    shape: tuple[int, int, int]  # height, width, 3

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[place] for place in range(self.rows))

    def __getitem__(self, place: int) -> np.ndarray:
        start = int(self.starts(np.array([place]))[0])
        return np.frombuffer(self.raw, np.uint8, math.prod(self.shape), start).reshape(self.shape)

    def starts(self, places: np.ndarray) -> np.ndarray:
        """Where the pixels of rows start in `raw`: int64. Raises IndexError when the shard lacks one of them."""
        if len(places) and not 0 <= places.min() <= places.max() < self.rows:
            raise IndexError(f"rows {places.min()} to {places.max()} of a shard of {self.rows}")
        group, row = np.divmod(places, self.group_rows)
        return np.asarray(self.group_starts[group] + row * math.prod(self.shape))

    def all(self) -> np.ndarray:
        """A copy of all rows: uint8 (rows, height, width, 3)."""
        return np.stack(list(self))


def open_shard(path: Path) -> ShardPixels:
    """Map a shard's pixels. Raises DamagedError when the file is not as written, or lacks the layout of `write_shard`."""
    with reading(whole(path)):
        return _opened(path, pq.read_metadata(path))


def _opened(path: Path, meta: pq.FileMetaData) -> ShardPixels:
    index = meta.num_columns - 1
    size = meta.schema.column(index).length
    names = [meta.schema.column(number).name for number in range(index)]
    first = meta.row_group(0)  # all rows are of one size
    width, height = (first.column(names.index(name)).statistics.min for name in ("width", "height"))
    starts = []
    for number in range(meta.num_row_groups):
        chunk = meta.row_group(number).column(index)
        header = chunk.total_compressed_size - chunk.num_values * size  # of the one page; there are no levels
        if chunk.compression != "UNCOMPRESSED" or not 0 < header < 512:
            raise ValueError(f"row group {number} is not one plain, uncompressed page")
        starts.append(chunk.data_page_offset + header)
    return ShardPixels(map_file(path), np.array(starts), first.num_rows, meta.num_rows, (height, width, 3))


def map_file(path: Path) -> memoryview:
    """A file's bytes, mapped without keeping it open: np.memmap keeps a descriptor, and 1,024 are a usual limit."""
    with pa.memory_map(str(path)) as file:
        head = file.read_buffer(1)  # holds the mapping; what is read through Arrow is fetched from the disk at once
        return memoryview(pa.foreign_buffer(head.address, file.size(), head))
