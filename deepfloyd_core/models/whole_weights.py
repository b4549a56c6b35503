"""Checks that weights are complete: reports a broken download, or a clone without Git LFS, before anything is made from it.

Only headers and sizes are read, which takes milliseconds even for T5's gigabytes. No NumPy, which takes 0.1 s to
import.
"""

from math import prod
from pathlib import Path
from typing import Any

from deepfloyd_core.errors import ModelError
from deepfloyd_core.files import each_once, parsed_json
from deepfloyd_core.models.headers import weight_files

_MOST_HEADER = 100_000_000  # bytes; more is what safetensors itself refuses
_LFS = b"version https://git-lfs"
_NO_FILE = "is no safetensors file"
_SIZES = {  # bytes of a number
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip


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
            return _NO_FILE
        handle.seek(8)
        header = handle.read(length)
    if len(header) < length:
        return f"is truncated to {size:,} bytes"
    try:
        whole = 8 + length + _bytes_of(parsed_json(header.decode(), each_once))
    except (ValueError, KeyError, TypeError, AttributeError):
        return _NO_FILE
    return f"has {size:,} of {whole:,} bytes" if size != whole else None


def _bytes_of(header: dict[str, Any]) -> int:
    """How many bytes the tensors of a header have, which lie one after the other. Raises ValueError or others where
    safetensors would not read it.
    """
    metadata, place = header.pop("__metadata__", {}), 0
    if not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("metadata that are no texts")
    for part in sorted(header.values(), key=lambda part: part["data_offsets"]):
        (start, end), shape = part["data_offsets"], part["shape"]
        are_numbers = isinstance(shape, list) and all(
            type(number) is int and number >= 0 for number in (*shape, start, end)
        )
        if not are_numbers or (start, end) != (place, place + _SIZES[part["dtype"]] * prod(shape)):
            raise ValueError("a tensor that is not where it should be")
        place = end
    return place
