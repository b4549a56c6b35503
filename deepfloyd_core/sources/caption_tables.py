"""Captions in a table beside the pictures: Parquet, CSV or JSON lines, in SimpleTuner's `parquet` block.

A picture has several captions when the table has several columns, a list in a cell, or several rows for it. The table
is read once a scan, column by column where its cells are texts or lists of texts, else cell by cell. The data's
fingerprint contains the captions picture by picture, so rows of missing pictures change nothing.
"""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from deepfloyd_core.config.data_blocks import CaptionTable
from deepfloyd_core.config.data_sets import ImageDataset
from deepfloyd_core.errors import DataError
from deepfloyd_core.sources.columns import as_paths, is_text, last_names, lists_at, told, without_extensions
from deepfloyd_core.sources.listing import cell_text
from deepfloyd_core.sources.tables import Column, Columns, column_names, table_columns, table_path

log = logging.getLogger(__name__)

_TEXT = pa.large_string()  # a column of a string may have 2 GiB
_TEXTS = pa.large_list(_TEXT)


class TableTexts(NamedTuple):
    """The captions of a table, by name."""

    names: pa.Array  # large_string, trimmed, in the table's order
    texts: pa.Array  # of each a list of large_string, none of them blank

    def by_name(self) -> "TableTexts":
        """Each name once, where it is first, with the texts of all its rows in their order."""
        coded = self.names.dictionary_encode()
        if len(coded.dictionary) == len(self.names):
            return self
        codes = coded.indices.to_numpy()
        lengths = np.bincount(codes, weights=pc.list_value_length(self.texts).to_numpy())
        texts = self.texts.take(pa.array(np.argsort(codes, kind="stable"))).flatten()
        return TableTexts(coded.dictionary, _lists(lengths, texts))


def told_by_table(dataset: ImageDataset, sources: pa.ChunkedArray) -> pa.Table:
    """TOLD of pictures by a data set's table, which has them by their path below its directory, else by name alone.

    Raises ConfigError for a missing column, DataError for a file that cannot be read or has none of the pictures: a
    wrong column or a wrong kind of name.
    """
    assert dataset.parquet is not None
    table, path = dataset.parquet, table_path(dataset)
    where = f"{dataset.id}: {path}"
    names, texts = table_texts(table, path, dataset.caption_strategy, where)
    slashed = pc.replace_substring(names, "\\", "/")
    names, texts = TableTexts(as_paths(pa.chunked_array([slashed])).combine_chunks(), texts).by_name()
    paths = as_paths(sources.cast(_TEXT))
    paths = paths if table.identifier_includes_extension else without_extensions(paths)
    places = pc.index_in(paths, value_set=names)
    if places.null_count:
        places = pc.coalesce(places, pc.index_in(last_names(paths), value_set=names))
    raw = lists_at(texts, places)
    if len(names) and len(sources) and not pc.any(pc.greater(pc.list_value_length(raw), 0)).as_py():
        raise DataError(
            f"{where} has no caption for any of the {len(sources)} pictures: its column "
            f"{table.filename_column!r} holds names such as {names[0].as_py()!r}, the directory "
            f"{sources[0].as_py()!r}, and identifier_includes_extension is {table.identifier_includes_extension}. "
            "Correct one of them, or caption_column."
        )
    return told(raw)


def table_texts(table: CaptionTable, path: Path, kind: str, where: str) -> TableTexts:
    """The names and the captions of a table's rows; `kind`: the file's type, if its extension does not tell.

    Raises ConfigError for a missing column, DataError for a file that cannot be read.
    """
    columns = [table.filename_column, *column_names(table.caption_column), *column_names(table.fallback_caption_column)]
    nameless, names, texts = 0, [pa.array([], _TEXT)], [pa.array([], _TEXTS)]
    for block in table_columns(path, kind, list(dict.fromkeys(columns)), where):
        trimmed, of_rows = _names(block[table.filename_column]), _captions(table, block)
        if trimmed.null_count:
            nameless += trimmed.null_count
            named = trimmed.is_valid()
            trimmed, of_rows = trimmed.filter(named), of_rows.filter(named)
        names.append(trimmed)
        texts.append(of_rows)
    if nameless:
        log.warning("%s: %d rows with an empty %r are left out", where, nameless, table.filename_column)
    return TableTexts(pa.concat_arrays(names), pa.concat_arrays(texts))


def _names(column: Column) -> pa.Array:
    """Trimmed; null where there is none."""
    if isinstance(column, list) or not is_text(column.type):
        cells = column if isinstance(column, list) else column.to_pylist()
        # JSON can hold half of a surrogate pair.
        texts = (_name(cell) for cell in cells)
        column = pa.array(texts, _TEXT)
    trimmed = pc.utf8_trim_whitespace(column.cast(_TEXT))
    return pc.if_else(pc.equal(trimmed, ""), pa.scalar(None, _TEXT), trimmed)


def _name(cell: Any) -> str:
    text = cell.decode("utf-8", "backslashreplace") if isinstance(cell, bytes) else "" if cell is None else str(cell)
    return text.encode("utf-8", "backslashreplace").decode()


def _captions(table: CaptionTable, block: Columns) -> pa.Array:
    """Of each row the texts of its columns, or of the fallback columns where those have none."""
    first, other = (
        [_cells(block[name]) for name in column_names(names)]
        for names in (table.caption_column, table.fallback_caption_column)
    )
    if len(first) == 1 and not other:
        return first[0]
    every = [*first, *other]
    if not every:
        return _lists(np.zeros(len(next(iter(block.values()))), np.int64), pa.array([], _TEXT))
    offsets = np.stack([cells.offsets.to_numpy() for cells in every], axis=1)  # (rows + 1, columns)
    lengths = np.diff(offsets, axis=0)
    lengths[:, len(first) :][lengths[:, : len(first)].any(1)] = 0
    values = [cells.values for cells in every]
    starts = offsets[:-1] + np.cumsum([0, *map(len, values[:-1])])
    ends = np.cumsum(lengths)
    take = np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts.ravel() - ends + lengths.ravel(), lengths.ravel())
    return _lists(lengths.sum(1), pa.concat_arrays(values).take(pa.array(take)))


def _cells(column: Column) -> pa.Array:
    """The texts of each cell that are not blank."""
    if isinstance(column, list):
        texts = [list(_texts_of(cell)) for cell in column]
        return pa.array(texts, _TEXTS)
    if is_text(column.type):
        trimmed = pc.utf8_trim_whitespace(column.cast(_TEXT))
        kept = pc.fill_null(pc.not_equal(trimmed, ""), False)
        return _lists(kept.to_numpy(zero_copy_only=False), trimmed.filter(kept))
    parts = _cells(column.flatten())
    ends = np.cumsum(pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False))
    return pa.LargeListArray.from_arrays(parts.offsets.take(pa.array(np.append(0, ends))), parts.values)


def _texts_of(cell: Any) -> Iterator[str]:
    if isinstance(cell, list):
        for part in cell:
            yield from _texts_of(part)
        return
    if text := cell_text(cell).strip():
        yield text


def _lists(lengths: np.ndarray, texts: pa.Array) -> pa.Array:
    """Lists of so many texts each."""
    return pa.LargeListArray.from_arrays(pa.array(np.append(0, np.cumsum(lengths)).astype(np.int64)), texts)
