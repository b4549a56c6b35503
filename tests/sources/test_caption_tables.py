"""Tables by the column say what they say cell by cell: the reading is repeated here with Python's objects and pathlib."""

import csv
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepfloyd_core.config.data_sets import ImageDataset
from deepfloyd_core.errors import DataError
from deepfloyd_core.files import sha256_bytes
from deepfloyd_core.index.captions import raw_captions
from deepfloyd_core.sources import columns, tables
from deepfloyd_core.sources.source import open_source

Row = dict[str, Any]
Told = list[tuple[str, ...] | None]
FORMATS = ("parquet", "csv", "tsv", "jsonl")

texts = st.sampled_from(
    ["", " ", "a dog", " a dog\n", "two\nlines", 'a "quoted", one', "naïve \u2028 ☃ 🐈", "\u3000wide\x85", "\x1cx\x1f",
     "NaN", "None", "0", "\u200bx", "\ufeffx", "null"]
)  # fmt: skip
urls = st.sampled_from(
    ["http://h/a.jpg", " http://h/a.jpg ", "HTTPS://h/b.png", "https://h/ü?x=1", "ftp://h/c", "file:///etc/passwd", "", " ",
     "httpſ://h/s", "http//h", "//h/d", "http://", "x\nhttp://h", "\u00a0http://h/e\u00a0", "0", "nan"]
)  # fmt: skip
paths = st.sampled_from(
    ["a", "a.jpg", "deep/a", "deep//a.jpg", "./deep/a", "deep\\a", "deep/./a.jpg", "/deep/a", "//deep/a", "b/", "b/.", ".b",
     "b.", "b..c", "..b", " b ", ".", "/", "deep/../a", "", "ü/☃.jpg"]
)  # fmt: skip
NAMES = ["a.jpg", "deep/a.jpg", "deep/a", "b.png", ".b", "b.", "b..c.jpg", "..b", "ü/☃.jpg", "other/deep/a.jpg",
         "deep/b.c.jpg", "http://h/a.jpg", "x/./a.jpg", "x//y\n.jpg"]  # fmt: skip
lists: st.SearchStrategy[Any] = st.lists(st.none() | texts, max_size=3)
KINDS = {
    "texts": (pa.string(), st.none() | texts), "large texts": (pa.large_string(), st.none() | texts),
    "categories": (pa.dictionary(pa.int8(), pa.string()), st.none() | texts),
    "lists": (pa.list_(pa.string()), st.none() | lists),
    "large lists": (pa.large_list(pa.large_string()), st.none() | lists),
    "lists of lists": (pa.list_(pa.list_(pa.string())), st.none() | st.lists(st.none() | lists, max_size=3)),
    "pairs": (pa.list_(pa.string(), 2), st.none() | st.tuples(texts, texts).map(list)),
    "numbers": (pa.float64(), st.none() | st.sampled_from([0.0, 1.5, float("nan")])),
    "whole numbers": (pa.int64(), st.none() | st.integers(-2, 2)), "flags": (pa.bool_(), st.none() | st.booleans()),
    "bytes": (pa.binary(), st.none() | st.sampled_from([b"", b"\xff"])), "nothing": (pa.null(), st.none()),
    "records": (pa.struct([("x", pa.string())]), st.none() | texts.map(lambda text: {"x": text})),
}  # fmt: skip
loose = st.recursive(
    st.none() | texts | st.booleans() | st.integers(-2, 2) | st.floats(width=16) | st.just("half \ud83d of a pair"),
    lambda parts: st.lists(parts, max_size=3) | st.dictionaries(st.sampled_from("xy"), parts, max_size=1), max_leaves=4,
)  # fmt: skip


@st.composite
def tables_of(draw: st.DrawFn, names: st.SearchStrategy[str]) -> tuple[str, list[Row], pa.Schema | None]:
    """A format, rows with the columns `name`, `one`, `two` and `other`, and in Parquet their types."""
    form, schema = draw(st.sampled_from(FORMATS)), None
    cells: dict[str, st.SearchStrategy[Any]] = {"name": names, **dict.fromkeys(("one", "two", "other"), texts)}
    if form == "jsonl":
        cells = {"name": st.none() | names | st.integers(0, 1), **dict.fromkeys(("one", "two", "other"), loose)}
    elif form == "parquet":
        named = draw(st.sampled_from(["texts", "large texts", "categories"]))
        kinds = {"name": named, **{name: draw(st.sampled_from(list(KINDS))) for name in ("one", "two", "other")}}
        cells = {name: KINDS[kind][1] for name, kind in kinds.items()} | {"name": st.none() | names}
        schema = pa.schema([(name, KINDS[kind][0]) for name, kind in kinds.items()])
    return form, draw(st.lists(st.fixed_dictionaries(cells), min_size=form == "jsonl", max_size=9)), schema


def write(path: Path, rows: list[Row], schema: pa.Schema | None) -> None:
    if path.suffix == ".parquet":
        arrays = [pa.array([row[field.name] for row in rows], field.type) for field in schema or ()]
        pq.write_table(pa.table(arrays, schema=schema), path, row_group_size=4)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    else:
        with path.open("w", newline="", encoding="utf-8") as handle:
            writer = csv.DictWriter(
                handle, ["name", "one", "two", "other"], delimiter="\t" if path.suffix == ".tsv" else ","
            )
            writer.writeheader()
            writer.writerows(rows)


def keep(folder: Path, url: str) -> os.stat_result:
    """A file as of a download."""
    digest = sha256_bytes(url.encode())
    (folder / digest[:2]).mkdir(parents=True, exist_ok=True)
    (folder / digest[:2] / digest).write_bytes(b"x" * len(url))
    return (folder / digest[:2] / digest).stat()


def cell(value: Any) -> list[str]:
    if isinstance(value, list):
        return [text for part in value for text in cell(part)]
    if value is None or isinstance(value, dict) or (isinstance(value, float) and not math.isfinite(value)):
        return []
    text = (
        value.decode(errors="ignore") if isinstance(value, bytes) else str(value)
    ).strip()  # b"" and b"\xff" are none
    return [text.encode("utf-8", "replace").decode()] if text else []


def row_by_row(rows: list[Row], captions: Sequence[str], fallback: Sequence[str] = ()) -> list[tuple[str, list[str]]]:
    named = []
    for row in rows:
        if row["name"] is not None and (name := str(row["name"]).strip()):
            own = [text for column in captions for text in cell(row[column])]
            named.append((name, own or [text for column in fallback for text in cell(row[column])]))
    return named


def joined(rows: list[tuple[str, list[str]]]) -> dict[str, list[str]]:
    by_name: dict[str, list[str]] = {}
    for name, found in rows:
        by_name.setdefault(name, []).extend(found)
    return by_name


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "LISTED_BLOCK", 3)
    monkeypatch.setattr(tables, "_BLOCK", 2)


@settings(max_examples=120, deadline=None)
@given(tables_of(urls), st.sets(urls, max_size=3))
def test_urls_and_their_captions(table: tuple[str, list[Row], pa.Schema | None], kept: set[str]) -> None:
    form, rows, schema = table
    with TemporaryDirectory() as name:
        folder = Path(name)
        write(folder / f"t.{form}", rows, schema)
        stats = {url: keep(folder / "kept", url) for url in map(str.strip, kept)}
        source = open_source(ImageDataset.model_validate(
            {"id": "set", "type": "csv", "csv_file": str(folder / f"t.{form}"), "csv_cache_dir": str(folder / "kept"),
             "csv_url_column": "name", "csv_caption_column": ["one", "two"], "caption_strategy": "csv"}))  # fmt: skip
        expected = joined(row_by_row(rows, ("one", "two")))
        listed = list(source.listing())
        stats = {
            url.strip(): (
                folder / "kept" / sha256_bytes(url.strip().encode())[:2] / sha256_bytes(url.strip().encode())
            ).stat()
            for url in kept
        }
        is_url = {url: url.lower().startswith(("http://", "https://")) for url in expected}
        there = {url: stats[url] for url in expected if url in stats and is_url[url]}
        assert [(one.source, one.reason) for one in listed] == [
            (url, None if is_url[url] else "not_a_url") for url in expected
        ]
        stamps = {url: f"{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ino}" for url, stat in there.items()}
        assert [(one.bytes, one.stamp) for one in listed] == [
            (there[url].st_size if url in there else 0, stamps.get(url, "")) for url in expected
        ]
        assert {(one.text_stamp, one.detail, one.kind) for one in listed} <= {("", None, "picture")}
        told = source.texts(list(reversed(expected)))
        assert [one.raw for one in told] == [tuple(expected[url]) or None for url in reversed(expected)]


@settings(max_examples=120, deadline=None)
@given(
    tables_of(paths),
    st.booleans(),
    st.sampled_from([("one",), ("one", "two")]),
    st.sampled_from([(), ("other", "two")]),
)
def test_captions_by_path_or_name(
    table: tuple[str, list[Row], pa.Schema | None], whole: bool, captions: tuple[str, ...], fallback: tuple[str, ...]
) -> None:
    form, rows, schema = table
    with TemporaryDirectory() as name:
        write(Path(name) / f"t.{form}", rows, schema)
        keys = {"path": "t." + form, "filename_column": "name", "caption_column": captions,
                "fallback_caption_column": fallback or None, "identifier_includes_extension": whole}  # fmt: skip
        dataset = ImageDataset.model_validate(
            {"id": "set", "type": "local", "instance_data_dir": name, "caption_strategy": "parquet", "parquet": keys}
        )
        named = row_by_row(rows, captions, fallback)
        by_name = joined([(str(PurePosixPath(name.replace("\\", "/"))), found) for name, found in named])
        expected: Told = []
        for source in NAMES:
            path = PurePosixPath(source) if whole else PurePosixPath(source).with_suffix("")
            found = by_name.get(str(path), by_name.get(path.name))
            expected.append(None if found is None else tuple(found))
        sources = pa.chunked_array([NAMES[:5], NAMES[5:]])
        if by_name and not any(expected):
            with pytest.raises(DataError, match="has no caption for any of the 14 pictures"):
                raw_captions(dataset, sources)
            return
        told = raw_captions(dataset, sources)
        assert told["raw"].to_pylist() == [found if found is None else list(found) for found in expected]
        assert told["fault"].null_count == 14 and not pc.any(told["passing"]).as_py()


def test_captions_of_names_are_pathlibs_stems() -> None:
    dataset = ImageDataset(id="set", type="local", instance_data_dir=".", caption_strategy="filename")
    names = [*NAMES, "a_b_c.jpg", "b/", "b/.", "_.png", "https://h/a_b.jpg?x=1.5", "a/..", "x\n_y/z\n.j\npg"]
    told = raw_captions(dataset, pa.chunked_array([names]))["raw"].to_pylist()
    assert told == [[PurePosixPath(name).stem.replace("_", " ")] for name in names]


def test_what_is_trimmed_is_what_python_trims() -> None:
    signs = [chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code < 0xE000]
    trimmed = pc.utf8_trim_whitespace(pa.array([f"{sign}x{sign}" for sign in signs])).to_pylist()
    assert trimmed == [f"{sign}x{sign}".strip() for sign in signs]


@pytest.mark.parametrize("column", ["name", "one"])
def test_texts_that_are_no_utf8_are_told(tmp_path: Path, column: str) -> None:
    cells = {"name": pa.array([b"a", b"b"]), "one": pa.array([b"x", b"y"])}
    cells[column] = pa.array([b"a", b"\xffb"])
    pq.write_table(pa.table({name: each.view(pa.string()) for name, each in cells.items()}), tmp_path / "t.parquet")
    keys = {"path": "t.parquet", "filename_column": "name", "caption_column": "one"}
    dataset = ImageDataset.model_validate(
        {
            "id": "set",
            "type": "local",
            "instance_data_dir": str(tmp_path),
            "caption_strategy": "parquet",
            "parquet": keys,
        }
    )
    with pytest.raises(DataError, match=r"it is no UTF-8 text \('utf-8' codec can't decode byte 0xff in position 0"):
        raw_captions(dataset, pa.chunked_array([["a"]]))
