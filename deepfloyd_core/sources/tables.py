"""Reads tables: Parquet, CSV or JSON lines, row by row or column by column, with messages that name the line."""

import csv
import difflib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Union

from deepfloyd_core.config.base import is_file
from deepfloyd_core.config.data_sets import ImageDataset
from deepfloyd_core.errors import ConfigError, DataError
from deepfloyd_core.sources.listing import text_encoding
from deepfloyd_core.store.counts import many

if TYPE_CHECKING:
    import pyarrow as pa

Record = dict[str, Any]
Column = Union["pa.Array", list[Any]]  # texts and lists of texts, all of them UTF-8; or the cells as Python objects
Columns = dict[str, Column]
TABLE_KINDS = {".parquet": "parquet", ".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl"}
_BOM = "\ufeff"
_MOST_NAMES, _SHOWN = 40, 60  # columns that a message names, and characters of each
_LINE = 1 << 24  # characters of a row
_BLOCK = 1 << 16  # rows of a text that are Python objects at once


def table_records(path: Path, needed: Sequence[str], known: Sequence[str], where: str) -> Iterator[Record]:
    """The rows of a table whose columns all have names that are known. `where`: how messages name it.

    Raises ConfigError for a missing column and for one that is not known, DataError for a file that cannot be read.
    """
    for record in _records(path, list(needed), where):
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
        if is_file(place):
            return place
    raise ConfigError(
        f"{dataset.id}: parquet.path is {dataset.parquet.path!r}; there is no file {places[0]} or {places[1]}."
    )


def table_columns(path: Path, kind: str, columns: list[str], where: str) -> Iterator[Columns]:
    """Some columns of a table, block by block; `kind`: the file's type, if its extension does not tell.

    The first column is the one that a row must have. Raises as `table_records`.
    """
    kind = TABLE_KINDS.get(path.suffix.lower(), kind)
    with _named_faults(kind, where):
        if kind == "parquet":
            yield from map(_readable, _parquet(path, columns, where))
        elif kind == "jsonl":
            records = _jsonl(path, columns, where)
            while block := list(islice(records, _BLOCK)):
                yield {name: [record.get(name) for record in block] for name in columns}
        else:
            yield from _text_columns(path, columns, where)


def _records(path: Path, columns: list[str], where: str) -> Iterator[Record]:
    """With the other columns of the file, too."""
    kind = TABLE_KINDS[path.suffix.lower()]
    with _named_faults(kind, where):
        if kind == "parquet":
            for batch in _parquet(path, columns, where, every=True):
                yield from batch.to_pylist()
        elif kind == "jsonl":
            yield from _jsonl(path, columns, where)
        else:
            rows = _csv(path, columns, where)
            head = next(rows)
            yield from (dict(zip(head, cells, strict=False)) for cells in rows)


@contextmanager
def _named_faults(kind: str, where: str) -> Iterator[None]:
    """Raise DataError in place of what a reader raises."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(f"{where} cannot be read as {kind}: it is no UTF-8 text ({error}). Save it as UTF-8.") from None
    except RecursionError:
        raise DataError(f"{where} cannot be read as {kind}: it is nested too deeply.") from None
    # pyarrow's errors are ValueErrors and OSErrors; of a date beyond those of Python OverflowError, of a time zone KeyError,
    # of a text that its column's dictionary lacks IndexError, of a type that Parquet alone knows NotImplementedError.
    except (OSError, ValueError, OverflowError, LookupError, NotImplementedError, csv.Error) as error:
        raise DataError(f"{where} cannot be read as {kind}: {error}") from None


def _parquet(path: Path, columns: list[str], where: str, every: bool = False) -> "Iterator[pa.RecordBatch]":
    import pyarrow.parquet as pq

    with pq.ParquetFile(path, pre_buffer=False) as file:  # it would hold the whole file
        _check_columns(columns, file.schema_arrow.names, where)
        yield from file.iter_batches(columns=None if every else columns)


def _readable(batch: "pa.RecordBatch") -> Columns:
    """The columns of a batch. Raises UnicodeDecodeError for a text that is none."""
    import pyarrow as pa

    columns: Columns = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        cells = column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
        columns[name] = cells if _holds_texts(cells) else column.to_pylist()
    return columns


def _holds_texts(column: "pa.Array") -> bool:
    """Whether it holds texts, or lists of them, of valid UTF-8."""
    import pyarrow as pa

    from deepfloyd_core.sources.columns import is_text

    kind = column.type
    while pa.types.is_list(kind) or pa.types.is_large_list(kind):
        kind = kind.value_type
    if not is_text(kind):
        return False
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


def _text_columns(path: Path, columns: list[str], where: str) -> Iterator[Columns]:
    """Of CSV."""
    import pyarrow as pa

    rows = _csv(path, columns, where)
    head = next(rows)
    while block := list(islice(rows, _BLOCK)):
        # Later columns of the same name count, as in `_records`. Cells beyond the head are empty.
        cells = dict(zip(head, zip(*block, strict=False), strict=False))
        yield {name: pa.array(cells[name], pa.large_string()) for name in columns}


def _csv(path: Path, columns: list[str], where: str) -> Iterator[list[str]]:
    """The cells of the first line, then of each row that is not blank."""
    sign = "\t" if path.suffix.lower() == ".tsv" else ","
    with path.open(encoding=_encoding(path), newline="") as handle:
        reader = csv.reader(_lines(handle), delimiter=sign, strict=True)
        head = next(reader, [])
        _check_columns(columns, head, where, head=True)
        yield head
        line = reader.line_num + 1
        try:
            for cells in reader:
                if any(map(str.strip, cells)):
                    # Anything else would be the caption of another column, or end at a comma or a line break.
                    if len(cells) < len(head) or any(cells[len(head) :]):
                        raise ValueError(
                            f"line {line} has {len(cells)} cells, and the first line {len(head)}. Put double "
                            f"quotes around a text with a {'tab' if sign != ',' else 'comma'} or a line break in it"
                        )
                    yield cells
                line = reader.line_num + 1
        except csv.Error as error:
            long = "field limit" in str(error)
            hint = "Is a double quote not closed?" if long else "Write a double quote inside quotes twice"
            raise ValueError(f"line {line}: {error}. {hint}") from None


def _jsonl(path: Path, columns: list[str], where: str) -> Iterator[Record]:
    seen: dict[str, None] = {}
    name, nameless = columns[0], ""
    decode = json.JSONDecoder(object_pairs_hook=_object).decode  # `json.loads` would make one for each line
    with path.open(encoding=_encoding(path)) as handle:
        for number, line in enumerate(_lines(handle), 1):
            if not line.strip():
                continue
            try:
                record = (json.loads if line[0] == _BOM else decode)(line)  # `json.loads` names the mark
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from None
            except RecursionError:
                raise ValueError(f"line {number} is nested too deeply") from None
            if not isinstance(record, dict):
                raise ValueError(f"line {number} is {type(record).__name__}, not an object")
            seen |= dict.fromkeys(record)
            if name not in record and not nameless:
                nameless = f"line {number} has no {name!r}; it has {_named(record)}"
            if nameless and name in seen:
                raise ValueError(nameless)  # in whichever order; where no line has the name, the column is wrong
            yield record
    _check_columns(columns, list(seen), where)


def _lines(handle: IO[str]) -> Iterator[str]:
    """The lines of a text. One that is too long to be a row is cut, and then is none: it does not fill the memory."""
    return iter(partial(handle.readline, _LINE), "")


def _object(pairs: list[tuple[str, Any]]) -> Record:
    record = dict(pairs)
    if len(record) < len(pairs):
        more = ", ..." if len(pairs) > _MOST_NAMES else ""
        raise ValueError(f"a name occurs twice: {', '.join(name[:_SHOWN] for name, _ in pairs[:_MOST_NAMES])}{more}")
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
            told = _near(name, known) if head else f"it has {_named(known)}."
            raise ConfigError(f"{where} has no column {name!r}; {told}")


def _named(names: Iterable[str]) -> str:
    shown = [repr(name)[:_SHOWN] for name in islice(names, _MOST_NAMES + 1)]
    return ", ".join([*shown[:_MOST_NAMES], *(["..."] if len(shown) > _MOST_NAMES else [])]) or "none"


def _near(name: str, head: list[str]) -> str:
    """The cells of a first line that resemble a column's name. The others are not shown: the file may be no table."""
    if near := difflib.get_close_matches(name, head):
        return f"did you mean {' or '.join(map(repr, near))}?"
    other = next((sign for sign in ";\t|," if len(head) == 1 and sign in head[0]), None)
    hint = f" Is {other!r} its separator? .csv needs a comma, .tsv a tab." if other else ""
    return f"its first line has {many(len(head), 'other')}.{hint}"


def column_names(given: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The names in a key that is one name or several."""
    return (given,) if isinstance(given, str) else given or ()
