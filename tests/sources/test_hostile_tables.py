"""Tables that were made to break a reader: a named error, or a row of the ledger for each cell that is no caption."""

from base64 import b64decode
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zlib import decompress

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_world import DataWorld

from deepfloyd_core.errors import DeepFloydError
from deepfloyd_core.index.scan import scan

Captions = list[list[str] | None]


def parquet(cells: pa.Array) -> Callable[[Path], None]:
    return lambda path: pq.write_table(pa.table({"f": ["a", "b"], "c": cells}), path)


def captions(world: DataWorld, write: Callable[[Path], object], kind: str = "parquet") -> Captions:
    for name in ("a", "b"):
        world.add(f"{name}.png", np.full((80, 90, 3), ord(name), np.uint8), None)
    write(world.folder / f"t.{kind}")
    block: dict[str, Any] = {"path": str(world.folder / f"t.{kind}"), "filename_column": "f", "caption_column": "c"}
    block["identifier_includes_extension"] = False
    run = world.load({"caption_strategy": kind, "parquet": block}, stages=(1,))
    return [row["captions"] or None for row in scan(run).to_pylist()]


def lines(*cells: str) -> Callable[[Path], object]:
    """JSON lines."""
    rows = [f'{{"f": "{name}", "c": {cell}}}' for name, cell in zip("ab", cells, strict=True)]
    return lambda path: path.write_text("\n".join(rows))


@pytest.mark.parametrize(
    "cells",
    [[b"\xff\xfe", b"text"], [float("inf"), None], [{"a": 1}, None], [[b"\xff"], [b"text"]]],
    ids=["bytes", "infinity", "struct", "list of bytes"],
)
def test_a_cell_that_is_no_text_is_no_caption(world: DataWorld, cells: list[Any]) -> None:
    if cells[1] is None:  # a table without any caption is an error of its own
        cells = [cells[0], cells[0]]
        with pytest.raises(DeepFloydError, match="has no caption for any"):
            captions(world, parquet(pa.array(cells)))
    else:
        assert captions(world, parquet(pa.array(cells))) == [None, ["text"]]


@pytest.mark.parametrize("cell", ["1e999", "-Infinity", "NaN", '{"a": 1}', "[1e999]", "null"])
def test_a_value_of_json_that_is_no_text_is_no_caption(world: DataWorld, cell: str) -> None:
    assert captions(world, lines(cell, '["a star", 7, 1e999]'), "jsonl") == [None, ["a star", "7"]]


@pytest.mark.parametrize(
    "cells",
    [
        pa.array([2**31 - 1, 0], pa.int32()).cast(pa.date32()), pa.array([2**63 - 1, 0], pa.int64()).cast(pa.duration("s")),
        pa.array([2**62, 0], pa.int64()).cast(pa.time64("us")), pa.array([0, 0], pa.timestamp("s", tz="No/Where")),
    ],
    ids=["date", "duration", "time", "time zone"],
)  # fmt: skip
def test_a_value_that_python_cannot_hold_is_one_error(world: DataWorld, cells: pa.Array) -> None:
    with pytest.raises(DeepFloydError, match=r"t\.parquet cannot be read as parquet"):
        captions(world, parquet(cells))


# The footer alone, with the schema of Arrow in it: an integer of fewer than 8 bits.
ODD_INTEGER = b64decode(
    b"FQQZTDUAGAZzY2hlbWEVBAAVDCUCGAFmJQBMHAAAADUCGAFjFQIAFQQlAhgBYQAWBBkcGSwmABwVDBklBgAZGAFmFQwWBBZaFmwmCDw2ACgB"
    b"YhgBYRERABkcFQAVABUCADwWBBkGGSYABAAAACYAHBUEGSUGABkoAWMBYRUMFgQWnAEWrgEmdDwYCAEAAAAAAAAAGAgBAAAAAAAAABYCKAgB"
    b"AAAAAAAAABgIAQAAAAAAAAAREQAZHBUAFQAVAgA8KQYZNgIAAgAAABb2ARYEJggWmgIAGRwYDEFSUk9XOnNjaGVtYRigAi8vLy8vOUFBQUFB"
    b"UUFBQUFBQUFLQUF3QUJnQUZBQWdBQ2dBQUFBQUJCQUFNQUFBQUNBQUlBQUFBQkFBSUFBQUFCQUFBQUFJQUFBQjBBQUFBQkFBQUFLVC8vLzhB"
    b"QUFFTkZBQUFBQmdBQUFBRUFBQUFBUUFBQUJBQUFBQUJBQUFBWXdBQUFKai8vLy9NLy8vL0FBQUJBaEFBQUFBY0FBQUFCQUFBQUFBQUFBQUJB"
    b"QUFBWVFBQUFBZ0FEQUFJQUFjQUNBQUFBQUFBQUFGQUFBYUFFQUFVQUFnQUJnQUhBQXdBQUFBUUFCQUFBQUFBQUFFRkVBQUFBQmdBQUFBRUFB"
    b"QUFBQUFBQUFFQUFBQm1BQUFBQkFBRUFBUUFBQUFBQUFBQQAYIHBhcnF1ZXQtY3BwLWFycm93IHZlcnNpb24gMjYuMC4xGSwcAAAcAAAANAIA"
    b"AFBBUjE="
)


# Two rows whose captions have number 21 of a dictionary of one text.
NO_SUCH_TEXT = decompress(b64decode(
    b"eNqFUstKw0AUvRPHoNJFFW/IQIQuNCjURwVFRMGb+qBasS2I6C7GWhXUGh8t4neIS5f+gH6PX+AfCN6ZpD4X3sV95Jx7coaZCtUKKHEQ/TIXGAAY"
    b"fZ58z/VVAQQAhDrtI+AADueZkEUbbW8WRsW+K8L+fkj5vSUAiwcpRJfFvD70ymhhB+4eS+Tav5WEK9p/NeQSSrUwA659GR3VT0OUgJkRyxWHI1D2"
    b"mJJMUTo5Unkq74OHGTUDdlYxETOOdO6cR+Gv+z3fDSv9c0ALOGW5LPC2rXyQLPRDIjISsXMv/FfhPwkj0ma//4g4b8KRfo/zYoHy3AzVals788k5"
    b"3AdrUsdcgziqlMQGUYuCBq0SNahoIAoCohXdXFeY3zLUok4HBq0m+7zEH9eIIlo2czVZMuj2ti4Vw2/p/AklbXCSipYMJa3LBm/oWtK6xa8d4+xW"
    b"+2mTNsv4rpbeTBU75wmCmqm7qW4nTLuXHj344WdxEdxcM4wvrutX41GzOR7G8Xkrd1OPL4/Pz3LTsxNTEwWV58vW9z3Er6TC7/YDAASHXA=="
))  # fmt: skip


def test_a_text_that_its_dictionary_lacks_is_one_error(world: DataWorld) -> None:
    with pytest.raises(DeepFloydError, match=r"t\.parquet cannot be read as parquet: Index 21 out of bounds"):
        captions(world, lambda path: path.write_bytes(NO_SUCH_TEXT))


def test_a_type_that_pyarrow_cannot_read_is_one_error(world: DataWorld) -> None:
    with pytest.raises(DeepFloydError, match=r"t\.parquet cannot be read as parquet: Integers with less than 8 bits"):
        captions(world, lambda path: path.write_bytes(ODD_INTEGER))


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("jsonl", '{"f": "a", "c": ' + "[" * 100_000), ("jsonl", '{"f": "a", "c": ' + '{"a":' * 100_000),
        ("jsonl", '{"f": "a", "c": ' + "1" * 5000 + "}"), ("jsonl", '{"f": "a", "c": "' + "x" * (40 << 20) + '"}'),
        ("jsonl", "{" + ",".join(f'"key_{number}": 1' for number in range(50_000)) + "}"),
        ("jsonl", "{" + ",".join('"key": 1' for _ in range(50_000)) + "}"),
        ("csv", "f,c\na," + "x," * (20 << 20)), ("csv", ",".join(f"key_{number}" for number in range(50_000)) + "\n"),
    ],
    ids=["lists", "objects", "digits", "long line", "keys", "one key", "cells", "columns"],
)  # fmt: skip
def test_a_line_that_breaks_a_reader_is_one_short_error(world: DataWorld, kind: str, text: str) -> None:
    with pytest.raises(DeepFloydError) as error:
        captions(world, lambda path: path.write_text(text), kind)
    assert "t." in str(error.value) and len(str(error.value)) < 4000
