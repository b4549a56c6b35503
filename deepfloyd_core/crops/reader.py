"""The pixels of finished shards, mapped: the crops of any rows of one size as a tensor.

A process checks each crop when it first reads it. Its place in the shard and its checksum are from the list of rows, which
is hashed before each use: so nothing but the pixels themselves is read of a shard. Costs 0.4 us for 12 KiB, once; figures
in `benchmarks/results.md`.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from deepfloyd_core.crops.rows import read_row_list, shard_files
from deepfloyd_core.crops.shards import PIXELS_SUM, map_file
from deepfloyd_core.hashing import checksum
from deepfloyd_core.store.artifacts import Artifact
from deepfloyd_core.store.damage import damaged, reading

Size = tuple[int, int]


class Crops:
    """The pixels of shards by their places in a list of rows (ROWS), mapped."""

    def __init__(self, rows: pa.Table, files: Sequence[Path]) -> None:
        """files: the shards, in the order of their numbers."""
        self._files, self._raw = list(files), list[memoryview]()
        for file in files:
            with reading(file):
                self._raw.append(map_file(file))
        names = ("file", "start", PIXELS_SUM, "place")
        self._file, self._start, self._sums, self._place = (rows[name].to_numpy() for name in names)
        self._is_checked = np.zeros(len(rows), bool)

    def take(self, size: Size, rows: np.ndarray) -> torch.Tensor:
        """The crops of some rows of one size: uint8 (B, H, W, C). Raises DamagedError where one is not as written."""
        raw, length = self._raw, size[0] * size[1] * 3
        where = zip(self._file[rows].tolist(), self._start[rows].tolist(), strict=True)
        pieces = [raw[file][start : start + length] for file, start in where]
        for number in np.flatnonzero(~self._is_checked[rows]).tolist():
            self._check(int(rows[number]), pieces[number])
        # One copy in C out of the mapped files: twice as fast as stacking arrays, and no slower for many files.
        pixels = bytearray().join(pieces)
        return torch.frombuffer(pixels, dtype=torch.uint8).reshape(len(rows), size[1], size[0], 3)

    def _check(self, row: int, piece: memoryview) -> None:
        if checksum(piece) != int(self._sums[row]):
            raise damaged(self._files[self._file[row]], f"row {self._place[row]} has other pixels than were written")
        self._is_checked[row] = True


def crops_of(pixels: Artifact) -> Crops:
    """The crops of a finished artifact."""
    return Crops(read_row_list(pixels.path), shard_files(pixels))
