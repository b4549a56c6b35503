"""Listings and texts as Arrow columns, and paths by the column.

A row costs some 10 us as Python objects and 0.5 us in columns. Most sources make rows; `InColumns` are those that have
columns at hand.
"""

from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import PurePosixPath
from typing import Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

LISTED_BLOCK = 1 << 16  # rows that are Python objects, or are looked up, at once
TEXTS = pa.list_(pa.string())
# The fields of `Listed` and of `Texts`.
LISTED = pa.schema([("source", pa.string()), ("bytes", pa.int64()), ("stamp", pa.string()),
                    ("text_stamp", pa.string()), ("reason", pa.string()), ("detail", pa.string()),
                    ("kind", pa.string())])  # fmt: skip
TOLD = pa.schema([("raw", TEXTS), ("fault", pa.string()), ("passing", pa.bool_())])

_UNUSUAL = r"(?s)//|(?:^|/)\.(?:/|$)|./$"  # paths that pathlib writes in another way
_EXTENSION = r"(?s)^((?:.*/)?[^/]+)\.[^/.]+$"
_FOLDERS = r"(?s)^.*/"


@runtime_checkable
class InColumns(Protocol):
    """A source that has columns at hand."""

    def listed(self) -> pa.Table:
        """`Source.listing` as LISTED."""

    def told(self, names: pa.ChunkedArray) -> pa.Table:
        """`Source.texts` as TOLD."""


def is_text(kind: pa.DataType) -> bool:
    """Whether a column of this type holds texts."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def tabled(rows: Iterable[Sequence[object]], schema: pa.Schema) -> pa.Table:
    """Rows as a table; LISTED_BLOCK of them are Python objects at a time."""
    left, blocks = iter(rows), []
    while block := list(islice(left, LISTED_BLOCK)):
        columns = [pa.array(column, field.type) for column, field in zip(zip(*block, strict=True), schema, strict=True)]
        blocks.append(pa.RecordBatch.from_arrays(columns, schema=schema))
    return pa.Table.from_batches(blocks, schema=schema)


def in_blocks(columns: Sequence[pa.Array], schema: pa.Schema) -> pa.Table:
    """Columns as a table of blocks: a block is within 2 GiB where a column is not."""
    rows, blocks = len(columns[0]), []
    for start in range(0, rows, LISTED_BLOCK):
        places = pa.array(np.arange(start, min(start + LISTED_BLOCK, rows)))  # a slice would not be cast beyond 2 GiB
        cut = [column.take(places).cast(field.type) for column, field in zip(columns, schema, strict=True)]
        blocks.append(pa.RecordBatch.from_arrays(cut, schema=schema))
    return pa.Table.from_batches(blocks, schema=schema)


def told(raw: pa.Array | pa.ChunkedArray) -> pa.Table:
    """TOLD of texts that can all be read."""
    return pa.table([raw, pa.nulls(len(raw), pa.string()), pa.repeat(False, len(raw))], schema=TOLD)


def lists_at(lists: pa.LargeListArray, places: pa.ChunkedArray) -> pa.ChunkedArray:
    """TEXTS at some places of lists of `large_string`; null where the place is. In blocks: each is within 2 GiB."""
    blocks = (places.slice(start, LISTED_BLOCK) for start in range(0, len(places), LISTED_BLOCK))
    return pa.chunked_array([lists.take(block.combine_chunks()).cast(TEXTS) for block in blocks], TEXTS)


def one_each(texts: pa.ChunkedArray) -> pa.ChunkedArray:
    """TEXTS: for each text the list of it alone."""
    return pa.chunked_array([pa.ListArray.from_arrays(pa.array(np.arange(len(chunk) + 1), pa.int32()), chunk)
                             for chunk in texts.chunks], TEXTS)  # fmt: skip


def as_paths(names: pa.ChunkedArray) -> pa.ChunkedArray:
    """`str(PurePosixPath(name))` of each."""
    is_unusual = pc.match_substring_regex(names, _UNUSUAL)
    if not pc.any(is_unusual).as_py():
        return names
    unusual = names.filter(is_unusual).to_pylist()
    plain = pa.array([str(PurePosixPath(name)) for name in unusual], names.type)
    return pc.replace_with_mask(names, is_unusual.combine_chunks(), plain)


def without_extensions(paths: pa.ChunkedArray) -> pa.ChunkedArray:
    """`names.without_extension` of each."""
    return pc.replace_substring_regex(paths, _EXTENSION, r"\1")


def last_names(paths: pa.ChunkedArray) -> pa.ChunkedArray:
    """What comes after the last slash of each."""
    return pc.replace_substring_regex(paths, _FOLDERS, "")
