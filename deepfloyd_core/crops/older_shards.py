"""What a new version of a pixel artifact reuses from the previous one: complete shards, or single rows by their key."""

from dataclasses import dataclass

import numpy as np
import pyarrow.parquet as pq

from deepfloyd_core.crops.rows import ROWS_FILE, read_row_list, shard_files
from deepfloyd_core.crops.shards import open_shard, read_rows
from deepfloyd_core.store.artifacts import Artifact, WorkDir
from deepfloyd_core.store.reuse import is_as_recorded, worth_keeping


def left_over(work: WorkDir) -> Artifact | None:
    """What is left of the same artifact, which was damaged, so that its intact shards are kept. None: it was not, or its
    list of rows is damaged.
    """
    before = work.before
    return before if before and is_as_recorded(before.path / ROWS_FILE, before.hashes) else None


@dataclass(frozen=True)
class OlderRows:
    """The rows of the newest pixel artifact by key, and its files whose bytes are still as recorded."""

    names: tuple[str, ...]
    digests: dict[str, str]
    rows_in: np.ndarray  # int64, rows in each file, live or not
    keys: np.ndarray  # uint64, sorted
    number: np.ndarray  # int64: the number of the row that has the key
    file: np.ndarray  # int32, of each row
    place: np.ndarray

    @classmethod
    def read(cls, older: Artifact | None) -> "OlderRows":
        """Read the newest artifact; empty when there is none or its list of rows was changed."""
        none = np.zeros(1, np.int64)  # dummy row, so that index -1 is valid
        recorded = older.hashes if older else {}
        if older is None or not is_as_recorded(older.path / ROWS_FILE, recorded):
            return cls((), {}, none, np.empty(0, np.uint64), none[:0], none.astype(np.int32), none.astype(np.int32))
        table, files = read_row_list(older.path), shard_files(older)
        digests = {file.name: recorded[file.name] for file in files if is_as_recorded(file, recorded)}
        whole = np.array([file.name in digests for file in files])
        rows_in = np.array(
            [pq.read_metadata(file).num_rows if good else 0 for file, good in zip(files, whole, strict=True)]
        )
        keys, file = table["key"].to_numpy(), table["file"].to_numpy()
        number = np.argsort(keys, kind="stable")
        number = number[whole[file[number]]]
        return cls(
            tuple(file.name for file in files), digests, rows_in, keys[number], number, file, table["place"].to_numpy()
        )

    def find(self, keys: np.ndarray) -> np.ndarray:
        """The row with each key: int64, -1 if there is none."""
        if not len(self.keys):
            return np.full(len(keys), -1)
        spot = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return np.where(self.keys[spot] == keys, self.number[spot], -1)

    def worth_keeping(self, copies: np.ndarray, capacity: int) -> np.ndarray:
        """Which files are reused as they are, given the rows of one size that are needed: bool (files,)."""
        live = np.bincount(self.file[copies[copies >= 0]], minlength=len(self.rows_in))
        return worth_keeping(live, self.rows_in, capacity)


def copy_rows(older: Artifact, copies: np.ndarray, pixels: list[np.ndarray], methods: list[str]) -> None:
    """Fill in the rows that exist in an older artifact."""
    numbers = np.flatnonzero(copies >= 0)
    rows = read_row_list(older.path).select(["file", "place"])
    files, places = (rows[name].to_numpy()[copies[numbers]] for name in ("file", "place"))
    paths = shard_files(older)
    for file in np.unique(files):
        shard, old_rows = open_shard(paths[file]), read_rows(paths[file])
        for number, place in zip(numbers[files == file], places[files == file], strict=True):
            pixels[number], methods[number] = shard[place], old_rows[place].method
