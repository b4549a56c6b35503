"""One Arrow file of text embeds: one row per text, stored raw (`none`) or compressed without loss (`packed`).

`none`: 630,784 bytes a text for T5-XXL in bf16, mapped straight into torch in 0.05 ms. `packed`: 64 % of that, at 0.6
ms. A float's high bytes (sign and exponent) repeat, its low bytes are noise. So the high halves are compressed with
zstd at its fastest level, and the low halves are stored as they are. Compressing whole floats saves less and costs
more. Each row carries a checksum of all of it, which a process checks when it first reads the row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pyarrow as pa

from deepfloyd_core.arrow import mapped_table, mapped_tensor
from deepfloyd_core.files import atomic_path, canonical_json
from deepfloyd_core.hashing import caption_id, checksum
from deepfloyd_core.store.damage import damaged, reading

if TYPE_CHECKING:
    import torch

Compression = Literal["none", "packed"]
VALUE_BYTES = {"bf16": 2, "fp32": 4}
SUM = "xxh3"  # the column of checksums
_ZSTD = pa.Codec("zstd", compression_level=1)


@dataclass(frozen=True)
class EmbedFile:
    """A finished file, mapped. Its rows are numbered from 0. Raises DamagedError where what is read is not as written."""

    path: Path

    @cached_property
    def _table(self) -> pa.Table:
        with reading(self.path):
            table = mapped_table(self.path)
            table.validate(full=True)  # an offset that is wrong would lead out of the file
        return table

    @property
    def text_ids(self) -> list[str]:
        """`caption_id` of each row's text."""
        return list(self._table["caption_id"].to_pylist())

    @property
    def texts(self) -> list[str]:
        """The cleaned texts."""
        return list(self._table["caption"].to_pylist())

    @property
    def tokens(self) -> np.ndarray:
        """int32 (N,): how many tokens each text has, including the end token, before it was cut to the length."""
        return np.asarray(self._table["tokens"].to_numpy())

    def stored(self, place: int) -> np.ndarray:
        """uint8: a row's bytes as stored, mapped from the file."""
        with reading(self.path):
            raw = self._stored(place)
            if self._is_checked[place]:
                return raw
            *named, found = (self._table[name][place].as_py() for name in ("caption_id", "caption", "tokens", SUM))
            is_whole = checksum(raw.data, _form(self._table.schema, *named)) == found
        if not is_whole:
            raise damaged(self.path, f"row {place} has other bytes than were written")
        self._is_checked[place] = True
        return raw

    def _stored(self, place: int) -> np.ndarray:
        column = self._column  # its scalars would be copies
        if pa.types.is_fixed_size_binary(column.type):
            size = column.type.byte_width
            return np.frombuffer(column.buffers()[1], np.uint8, size, place * size)
        start, end = np.frombuffer(column.buffers()[1], np.int64)[place : place + 2].tolist()
        return np.frombuffer(column.buffers()[2], np.uint8, end - start, start)

    def row(self, place: int) -> "torch.Tensor":
        """The hidden states (T, D) of a row; in an unpacked file they share its pages."""
        raw, schema = self.stored(place), self._table.schema.metadata
        dtype, width = schema[b"dtype"].decode(), int(schema[b"width"])
        if schema[b"compression"] == b"packed":
            raw = unpacked(raw, VALUE_BYTES[dtype])
        return mapped_tensor(raw, dtype).reshape(-1, width)

    @cached_property
    def _column(self) -> pa.Array:
        (column,) = self._table["embedding"].chunks  # one record batch a file
        return column

    @cached_property
    def _is_checked(self) -> np.ndarray:
        return np.zeros(len(self._table), bool)


def write_embed_file(
    path: Path, texts: Sequence[str], tokens: Sequence[int], rows: Sequence[np.ndarray], schema: pa.Schema
) -> None:
    """Write a file durably. `rows`: as `stored_row` makes them, or rows of an older file with the same schema."""
    ids = pa.array([caption_id(text) for text in texts])
    if pa.types.is_fixed_size_binary(schema.field("embedding").type):
        data = pa.py_buffer(np.concatenate(rows))
        column = pa.FixedSizeBinaryArray.from_buffers(schema.field("embedding").type, len(rows), [None, data])
    else:
        column = pa.array([row.tobytes() for row in rows], pa.large_binary())
    named = zip(rows, ids.to_pylist(), texts, tokens, strict=True)
    sums = [checksum(row.data, _form(schema, *of_row)) for row, *of_row in named]
    arrays = [ids, pa.array(list(texts), pa.string()), pa.array(list(tokens), pa.int32()), pa.array(sums, pa.uint64())]
    with atomic_path(path) as tmp, pa.OSFile(str(tmp), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(pa.record_batch([*arrays, column], schema=schema))


def _form(schema: pa.Schema, name: str, text: str, tokens: int) -> bytes:
    """Whatever else decides a row's values: its text, and how the values are stored."""
    return canonical_json([sorted((key.decode(), value.decode()) for key, value in schema.metadata.items()),
                           name, text, int(tokens)]).encode()  # fmt: skip


def embed_schema(dtype: str, length: int, width: int, compression: Compression) -> pa.Schema:
    """Columns `caption_id`, `caption`, `tokens`, the checksum and `embedding` of texts of length x width values."""
    raw = pa.binary(length * width * VALUE_BYTES[dtype])
    columns = {
        "caption_id": pa.string(), "caption": pa.string(), "tokens": pa.int32(), SUM: pa.uint64(),
        "embedding": raw if compression == "none" else pa.large_binary(),
    }  # fmt: skip
    metadata = {"dtype": dtype, "width": str(width), "length": str(length), "compression": compression}
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in columns.items()], metadata=metadata)


def stored_row(row: "torch.Tensor", compression: Compression) -> np.ndarray:
    """uint8: the stored bytes of a contiguous (T, D) tensor on the CPU."""
    import torch

    raw = row.view(torch.uint8).numpy().reshape(-1)
    return raw if compression == "none" else _packed(raw, row.element_size())


def _packed(raw: np.ndarray, size: int) -> np.ndarray:
    """Length of the compressed part (uint32), high halves of the values compressed, low halves. Little endian."""
    halves = raw.reshape(-1, 2, size // 2)
    high: bytes = _ZSTD.compress(np.ascontiguousarray(halves[:, 1]).T.tobytes(), asbytes=True)
    low = np.ascontiguousarray(halves[:, 0]).tobytes()
    return np.frombuffer(len(high).to_bytes(4, "little") + high + low, np.uint8)


def unpacked(data: np.ndarray, size: int) -> np.ndarray:
    """The bytes of a row's values, of what `stored_row` made with "packed". size: bytes of a value."""
    end = 4 + int.from_bytes(data[:4].tobytes(), "little")
    low = data[end:].reshape(-1, size // 2)
    high = np.frombuffer(_ZSTD.decompress(data[4:end], decompressed_size=low.size), np.uint8)
    raw = np.empty((len(low), 2, size // 2), np.uint8)
    raw[:, 0], raw[:, 1] = low, high.reshape(size // 2, -1).T
    return raw.reshape(-1)
