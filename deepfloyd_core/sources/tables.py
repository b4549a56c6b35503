"""Captions in a table beside the pictures: Parquet, CSV or JSON lines, in SimpleTuner's `parquet` block.

A picture has several captions when the table has several columns, a list in a cell, or several rows for it. The table
is read once a scan. The data's fingerprint contains the captions picture by picture, so rows of missing pictures change
nothing.
"""

import csv
import difflib
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from deepfloyd_core.config.data_blocks import CaptionTable
from deepfloyd_core.config.data_sets import ImageDataset
from deepfloyd_core.errors import ConfigError, DataError
from deepfloyd_core.sources.listing import text_encoding
from deepfloyd_core.store.counts import many

if TYPE_CHECKING:
    import pyarrow as pa

log = logging.getLogger(__name__)

Record = dict[str, Any]
TABLE_KINDS = {".parquet": "parquet", ".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl"}


class CaptionReader:
    """The captions of a data set's table, by picture."""

    def __init__(self, dataset: ImageDataset) -> None:
        assert dataset.parquet is not None
        self._table, self.path = dataset.parquet, table_path(dataset)
        self._where = f"{dataset.id}: {self.path}"
        self._captions: dict[str, list[str]] = {}
        for name, texts in table_texts(self._table, self.path, dataset.caption_strategy, self._where):
            self._captions.setdefault(_plain(name), []).extend(texts)

    def captions(self, source: str) -> tuple[str, ...] | None:
        """The captions of a picture, found by its path below the data set's directory, else by its name alone."""
        path = PurePosixPath(source)
        if not self._table.identifier_includes_extension:
            path = path.with_suffix("")
        found = self._captions.get(str(path), self._captions.get(path.name))
        return None if found is None else tuple(found)

    def check_match(self, sources: "pa.ChunkedArray") -> None:
        """Raise DataError when the table has none of the pictures: a wrong column or a wrong kind of name."""
        if self._captions and len(sources) and not any(self.captions(source.as_py()) for source in sources):
            raise DataError(
                f"{self._where} has no caption for any of the {len(sources)} pictures: its column "
                f"{self._table.filename_column!r} holds names such as {next(iter(self._captions))!r}, the directory "
                f"{sources[0].as_py()!r}, and identifier_includes_extension is {self._table.identifier_includes_extension}. "
                "Correct one of them, or caption_column."
            )


def table_texts(table: CaptionTable, path: Path, kind: str, where: str) -> Iterator[tuple[str, list[str]]]:
    """The name and the captions of each row that has a name; `kind`: the file's type, if its extension does not tell.

    Raises ConfigError for a missing column, DataError for a file that cannot be read.
    """
    nameless = 0
    for record in _records(path, TABLE_KINDS.get(path.suffix.lower(), kind), _columns(table), where):
        name = record.get(table.filename_column)
        if name is not None and str(name).strip():
            own = [text for column in _names(table.caption_column) for text in _cell(record.get(column))]
            other = () if own else _names(table.fallback_caption_column)
            # JSON can hold half of a surrogate pair.
            yield (
                str(name).encode("utf-8", "backslashreplace").decode(),
                own + [text for column in other for text in _cell(record.get(column))],
            )
        else:
            nameless += 1
    if nameless:
        log.warning("%s: %d rows with an empty %r are left out", where, nameless, table.filename_column)


def table_records(path: Path, needed: Sequence[str], known: Sequence[str], where: str) -> Iterator[Record]:
    """The rows of a table whose columns all have names that are known. `where`: how messages name it.

    Raises ConfigError for a missing column and for one that is not known, DataError for a file that cannot be read.
    """
    for record in _records(path, TABLE_KINDS[path.suffix.lower()], list(needed), where, every=True):
        if strange := next((name for name in record if name not in known), None):
            raise ConfigError(
                f"{where} has a column {strange!r}; it may have {', '.join(map(repr, known))}. Remove it."
            )
        yield record


def table_path(dataset: ImageDataset) -> Path:
    """The table's file. Raises ConfigError when it exists in neither place."""
    assert dataset.parquet is not None
    places = [Path(dataset.parquet.path), Path(dataset.instance_data_dir, dataset.parquet.path)]
    for place in places:
        if place.is_file():
            return place
    raise ConfigError(
        f"{dataset.id}: parquet.path is {dataset.parquet.path!r}; there is no file {places[0]} or {places[1]}."
    )


def _records(path: Path, kind: str, columns: list[str], where: str, every: bool = False) -> Iterator[Record]:
    """every: with the other columns of Parquet, too; text is read whole."""
    readers = {"csv": _csv, "tsv": _csv, "jsonl": _jsonl}
    try:
        yield from _parquet(path, columns, where, every) if kind == "parquet" else readers[kind](path, columns, where)
    except UnicodeDecodeError as error:
        raise DataError(f"{where} cannot be read as {kind}: it is no UTF-8 text ({error}). Save it as UTF-8.") from None
    except (OSError, ValueError, csv.Error) as error:  # pyarrow's errors are ValueErrors and OSErrors
        raise DataError(f"{where} cannot be read as {kind}: {error}") from None


def _parquet(path: Path, columns: list[str], where: str, every: bool) -> Iterator[Record]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path, pre_buffer=False) as file:  # it would hold the whole file
        _check_columns(columns, file.schema_arrow.names, where)
        for batch in file.iter_batches(columns=None if every else columns):
            yield from batch.to_pylist()


def _csv(path: Path, columns: list[str], where: str) -> Iterator[Record]:
    sign = "\t" if path.suffix.lower() == ".tsv" else ","
    with path.open(encoding=_encoding(path), newline="") as handle:
        reader = csv.reader(handle, delimiter=sign, strict=True)
        head = next(reader, [])
        _check_columns(columns, head, where, head=True)
        for line, cells in _numbered(reader):
            # Anything else would be the caption of another column, or end at a comma or a line break.
            if len(cells) < len(head) or any(cells[len(head) :]):
                raise ValueError(
                    f"line {line} has {len(cells)} cells, and the first line {len(head)}. Put double "
                    f"quotes around a text with a {'tab' if sign != ',' else 'comma'} or a line break in it"
                )
            if cells:
                yield dict(zip(head, cells, strict=False))


def _numbered(reader: Any) -> Iterator[tuple[int, list[str]]]:
    """The rows of a csv reader that are not blank, each with the number of its first line."""
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            long = "field limit" in str(error)
            hint = "Is a double quote not closed?" if long else "Write a double quote inside quotes twice"
            raise ValueError(f"line {line}: {error}. {hint}") from None
        if cells is None:
            return
        if any(cell.strip() for cell in cells):
            yield line, cells


def _jsonl(path: Path, columns: list[str], where: str) -> Iterator[Record]:
    seen: dict[str, None] = {}
    name, nameless = columns[0], ""
    with path.open(encoding=_encoding(path)) as handle:
        for number, line in enumerate(handle, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line, object_pairs_hook=_object)
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from None
            if not isinstance(record, dict):
                raise ValueError(f"line {number} is {type(record).__name__}, not an object")
            seen |= dict.fromkeys(record)
            if name not in record and not nameless:
                nameless = f"line {number} has no {name!r}; it has {', '.join(map(repr, record)) or 'nothing'}"
            if nameless and name in seen:
                raise ValueError(nameless)  # in whichever order; where no line has the name, the column is wrong
            yield record
    _check_columns(columns, list(seen), where)


def _object(pairs: list[tuple[str, Any]]) -> Record:
    record = dict(pairs)
    if len(record) < len(pairs):
        raise ValueError(f"a name occurs twice: {', '.join(name for name, _ in pairs)}")
    return record


def _encoding(path: Path) -> str:
    with path.open("rb") as handle:
        return text_encoding(handle.read(4))


def _check_columns(columns: list[str], known: list[str], where: str, head: bool = False) -> None:
    """head: the columns are the cells of a first line."""
    for name in columns:
        if known.count(name) > 1:
            raise ConfigError(f"{where} has {known.count(name)} columns {name!r}. Rename all but one of them.")
        if name not in known:
            told = _near(name, known) if head else f"it has {', '.join(map(repr, known)) or 'none'}."
            raise ConfigError(f"{where} has no column {name!r}; {told}")


def _near(name: str, head: list[str]) -> str:
    """The cells of a first line that resemble a column's name. The others are not shown: the file may be no table."""
    if near := difflib.get_close_matches(name, head):
        return f"did you mean {' or '.join(map(repr, near))}?"
    other = next((sign for sign in ";\t|," if len(head) == 1 and sign in head[0]), None)
    hint = f" Is {other!r} its separator? .csv needs a comma, .tsv a tab." if other else ""
    return f"its first line has {many(len(head), 'other')}.{hint}"


def _columns(table: CaptionTable) -> list[str]:
    names = [table.filename_column, *_names(table.caption_column), *_names(table.fallback_caption_column)]
    return list(dict.fromkeys(names))


def _names(given: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else given or ()


def _cell(value: Any) -> list[str]:
    """The texts of one cell that are not blank."""
    if isinstance(value, list):
        return [text for part in value for text in _cell(part)]
    text = "" if value is None or value != value else str(value).strip()  # NaN is how pandas writes "none"
    text = text.encode("utf-8", "replace").decode()  # JSON can hold half of a surrogate pair
    return [text] if text else []


def _plain(name: str) -> str:
    return str(PurePosixPath(name.strip().replace("\\", "/")))
