"""Checks that weights are complete: reports a broken download, or a clone without Git LFS, before anything is made from it.

Only headers and sizes are read, which takes milliseconds even for T5's gigabytes. No NumPy, which takes 0.1 s to
import.
"""

import json
from pathlib import Path

from deepfloyd_core.errors import ModelError
from deepfloyd_core.models.headers import weight_files

_MOST_HEADER = 100_000_000  # bytes; more is what safetensors itself refuses
_LFS = b"version https://git-lfs"


def lacking(folder: Path, name: str) -> list[str]:
    """The weight files that a folder's index names and that are missing; without an index the file with the usual name.

    Raises ModelError for an index that cannot be read.
    """
    return [file.name for file in _files(folder, name) if not file.exists()]


def weight_faults(folder: Path, name: str) -> list[str]:
    """The faults of existing weight files: a clause for each damaged one."""
    faults = ((file, _fault(file)) for file in _files(folder, name) if file.exists())
    # For a link into a cache, name the target: only if the target is removed is it downloaded again.
    return [f"{file.resolve() if file.is_symlink() else file} {fault}" for file, fault in faults if fault]


def _files(folder: Path, name: str) -> list[Path]:
    try:
        return weight_files(folder, name)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        index = folder / f"{name}.index.json"
        raise ModelError(f"{index} cannot be read ({error}). Put the one that belongs to the weights there.") from None


def _fault(file: Path) -> str | None:
    size = file.stat().st_size
    if not size:
        return "is empty"
    with file.open("rb") as handle:
        start = handle.read(len(_LFS))
        if start == _LFS:
            return "is a pointer of Git LFS, not the weights (`git lfs pull` fetches them)"
        length = int.from_bytes(start[:8], "little")
        if not 2 <= length <= _MOST_HEADER:
            return "is no safetensors file"
        handle.seek(8)
        header = handle.read(length)
    if len(header) < length:
        return f"is truncated to {size:,} bytes"
    try:
        ends = [part["data_offsets"][1] for key, part in json.loads(header).items() if key != "__metadata__"]
        whole = 8 + length + max(ends, default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        return "is no safetensors file"
    return f"has {size:,} of {whole:,} bytes" if size != whole else None
