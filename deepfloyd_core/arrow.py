"""Arrow tables: mapped from disk, as tensors that share their pages, and a digest of their values."""

import hashlib
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

if TYPE_CHECKING:
    import torch


def mapped_table(path: Path) -> pa.Table:
    """The table of an Arrow file, memory-mapped. The file descriptor is closed, so that thousands of tables can be open."""
    with pa.memory_map(str(path)) as source:
        return pa.ipc.open_file(source).read_all()


def table_digest(tables: Iterable[pa.Table]) -> str:
    """16 hex digits over the values (text, whole numbers, lists of either) of tables with the same columns, one after
    the other, however they are cut. Memory: one table at a time.
    """
    digests: dict[str, Any] = {}
    for table in tables:
        for name, column in zip(table.column_names, table.columns, strict=True):
            _digest(digests, name, column)
    named = "".join(f"{name} {digest.hexdigest()}\n" for name, digest in sorted(digests.items()))
    return hashlib.sha256(named.encode()).hexdigest()[:16]


def _digest(digests: dict[str, Any], name: str, column: pa.ChunkedArray) -> None:
    """Add a column's values to the digests of its parts, which are made as they come."""

    def add(part: str, data: bytes | memoryview) -> None:
        digests.setdefault(f"{name}/{part}", hashlib.sha256()).update(data)

    add("valid", pc.is_valid(column).to_numpy().astype(np.uint8).tobytes())
    if pa.types.is_list(column.type):
        add("lengths", pc.fill_null(pc.list_value_length(column), 0).to_numpy().astype("<i8").tobytes())
        _digest(digests, f"{name}/values", pc.list_flatten(column))
    elif pa.types.is_string(column.type):
        column = pc.fill_null(column, "")
        add("lengths", pc.binary_length(column).to_numpy().astype("<i8").tobytes())
        for chunk in column.chunks:
            _, offsets, text = chunk.buffers()
            ends = np.frombuffer(offsets, np.int32)[chunk.offset : chunk.offset + len(chunk) + 1]
            add("text", memoryview(text or b"")[ends[0] : ends[-1]])
    else:
        add("values", pc.fill_null(column, 0).to_numpy().astype("<i8").tobytes())


def mapped_tensor(raw: np.ndarray, dtype: str) -> "torch.Tensor":
    """Bytes (uint8, any number of values) as a flat tensor of `bf16` or `fp32` that shares them. Never write to it."""
    import torch

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(raw).view({"bf16": torch.bfloat16, "fp32": torch.float32}[dtype])
