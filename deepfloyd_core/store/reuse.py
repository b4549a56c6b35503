"""Which files a new version of a growing artifact reuses from the previous one: one rule for pixels and embeds."""

from pathlib import Path

import numpy as np

from deepfloyd_core.files import sha256_file
from deepfloyd_core.store.artifacts import Artifact

MAX_SMALL = 8  # files that are less than half full; more of them are put together
MIN_LIVE = 0.5  # share of a file's rows below which the rest of them move to a new one


def is_as_recorded(file: Path, hashes: dict[str, str]) -> bool:
    """Whether a file at the top of an artifact still has the bytes that its manifest says."""
    return file.is_file() and sha256_file(file) == hashes[file.name]


def files_as_recorded(older: Artifact | None, pattern: str) -> dict[Path, str]:
    """The files of an artifact whose bytes are still as recorded, in their order, with their sha256."""
    if older is None:
        return {}
    hashes = older.hashes
    return {file: hashes[file.name] for file in sorted(older.path.glob(pattern)) if is_as_recorded(file, hashes)}


def worth_keeping(live: np.ndarray, rows_in: np.ndarray, capacity: int) -> np.ndarray:
    """Which files are reused as they are: bool (files,). live, rows_in: in each file the number of live rows, and of
    all rows.
    """
    kept = (live > 0) & (live >= MIN_LIVE * rows_in) & (rows_in <= capacity)
    small = kept & (2 * rows_in < capacity)
    return kept if small.sum() <= MAX_SMALL else kept & ~small
