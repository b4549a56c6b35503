"""Damaged texts beside pictures, tables of captions, filters and tars: captions as they are written, or a named outcome."""

import io
import json
import re
import shutil
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from fuzz_folder import data_run, new_world
from mutations import damaged, damaged_text, one_of
from PIL import Image
from trials import Target, Trial, named_error

from deepfloyd_core.errors import DeepFloydError
from deepfloyd_core.index.judge import Entry, Verdict, judge
from deepfloyd_core.index.scan import scan
from deepfloyd_core.preflight.load import load_run

_GOOD = Verdict(format="PNG", width=80, height=80)
_TEXTS = ("a purple star\n", "one\n\ntwo\r\nthree", "\ufeffmit Umlaut: ä, ö\n", "tags, more tags, \U0001f31f", " ")
_ROWS = [{"f": "a", "c": "a star"}, {"f": "b", "c": 'two\nlines, and a "quote"'}, {"f": "c", "c": "no picture"}]


def _picture() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (80, 80), "purple").save(buffer, "PNG")
    return buffer.getvalue()


def said(data: bytes) -> list[str]:
    """The captions in a text beside a picture: its lines that are not blank; none where it is no text of Unicode."""
    marks = {b"\xff\xfe\0\0": "utf-32", b"\0\0\xfe\xff": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
    try:
        text = data.decode(next((name for mark, name in marks.items() if data.startswith(mark)), "utf-8-sig"))
    except UnicodeDecodeError:
        return []
    return [] if "\0" in text else [line.strip() for line in re.split("\r\n|\r|\n", text) if line.strip()]


@contextmanager
def _beside(folder: Path) -> Iterator[Trial]:
    run, dataset = data_run(folder, {})
    (folder / "pictures" / "a.png").write_bytes(_picture())
    file = folder / "pictures" / "a.txt"

    def trial(data: bytes) -> str:
        file.write_bytes(data)
        (row,) = scan(run).to_pylist()
        judged = judge(run, dataset, Entry(**row), _GOOD)
        assert file.read_bytes() == data, "the text was changed"
        assert (judged.captions or []) == said(data), f"{judged.captions} where {said(data)} is written"
        assert judged.captions or (judged.reason == "caption_missing" and judged.detail), str(judged)
        return judged.reason or "accepted"

    yield trial
    shutil.rmtree(folder)


def _table(kind: str) -> Any:
    """Trials of a table of captions for two pictures."""

    @contextmanager
    def opened(folder: Path) -> Iterator[Trial]:
        file = folder / f"t.{kind}"
        block = {
            "path": str(file),
            "filename_column": "f",
            "caption_column": "c",
            "identifier_includes_extension": False,
        }
        world = new_world(folder)
        for name in ("a.png", "b.png"):
            (folder / "pictures" / name).write_bytes(_picture())
        file.write_bytes(b"")
        run = world.load({"caption_strategy": kind, "parquet": block}, stages=(1,))

        def trial(data: bytes) -> str:
            file.write_bytes(data)
            try:
                rows = scan(run).to_pylist()
            except DeepFloydError as error:
                return named_error(error, file.name)
            finally:
                assert file.read_bytes() == data, "the table was changed"
            assert [row["source"] for row in rows] == ["a.png", "b.png"]
            judged = [judge(run, run.datasets[0], Entry(**row), _GOOD) for row in rows]
            for row in judged:
                assert all(text and isinstance(text, str) for text in row.captions or ()), f"captions {row.captions}"
                assert row.captions or (row.reason == "caption_missing" and row.detail), str(row)
            return "accepted" if all(row.captions for row in judged) else "caption_missing"

        yield trial
        shutil.rmtree(folder)

    return opened


def _beside_pictures() -> list[bytes]:
    return [*(text.encode() for text in _TEXTS), _TEXTS[2].encode("utf-16")]


def _csv() -> list[bytes]:
    quoted = 'f,c,other\na,a star,1\nb,"two\nlines, and a ""quote""",2\n'
    return [
        quoted.encode(),
        b"f,c\r\na,one\r\nb,two\r\n",
        "\ufefff,c\na,ä\nb,\U0001f31f\n".encode(),
        quoted.encode("utf-16"),
    ]


def _jsonl() -> list[bytes]:
    several = [{"f": "a", "c": ["one", "two"]}, {"f": "b", "c": None, "x": {"y": [1]}}, {"f": "b", "c": 7}]
    return ["\n".join(map(json.dumps, rows)).encode() for rows in (_ROWS, several)]


def _parquets() -> list[bytes]:
    names = pa.array(["a", "b"])
    columns = [
        pa.array(["a star", "a square"]), pa.array([["one", "two"], None]), pa.array(["x", "x"]).dictionary_encode(),
        pa.array([1.5, 2]), pa.array([b"\xff", b"text"]), pa.array([{"a": 1}, None]),
        pa.array([0, 1], pa.timestamp("us", tz="UTC")),
    ]  # fmt: skip
    found = []
    for number, column in enumerate(columns):
        buffer, pack = io.BytesIO(), ("none", "snappy", "zstd")[number % 3]
        table = pa.table({"f": names, "c": column})
        pq.write_table(table, buffer, compression=pack, use_dictionary=number % 2 == 0, store_schema=number != 1)
        found.append(buffer.getvalue())
    return found


@contextmanager
def _filters(folder: Path) -> Iterator[Trial]:
    file = folder / "filters.txt"
    folder.mkdir(exist_ok=True)
    file.write_text("x")
    world = new_world(folder)
    (folder / "pictures" / "a.png").write_bytes(_picture())
    (folder / "pictures" / "a.txt").write_text("a purple star (best quality), 4k, 4k")
    world.load({"caption_filter_list": str(file)}, stages=(1,))

    def trial(data: bytes) -> str:
        file.write_bytes(data)
        try:
            run = load_run(folder / "run.json")
            (row,) = scan(run).to_pylist()
            judged = judge(run, run.datasets[0], Entry(**row), _GOOD)
        except DeepFloydError as error:
            return named_error(error, file.name)
        assert all(text and text == text.strip() for text in judged.captions or ()), f"captions {judged.captions}"
        return judged.reason or "accepted"

    yield trial
    shutil.rmtree(folder)


def _tars() -> list[bytes]:
    found = []
    for form in (tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
            for name, data in (("a.png", _picture()), ("a.txt", b"a star"), (f"{'deep/' * 30}b.png", _picture())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
        found.append(buffer.getvalue())
    return found


@contextmanager
def _archive(folder: Path) -> Iterator[Trial]:
    run, dataset = data_run(folder, {"type": "webdataset"})
    file = folder / "pictures" / "0.tar"

    def trial(data: bytes) -> str:
        file.write_bytes(data)
        try:
            rows = scan(run).to_pylist()
        except DeepFloydError as error:
            return named_error(error, folder)
        judged = [judge(run, dataset, Entry(**row), _GOOD) for row in rows]
        assert len({row.source for row in judged}) == len(rows)
        assert all(row.sha256 or row.reason for row in (Entry(**each) for each in rows))
        return "accepted" if all(row.captions for row in judged) else "some rejected"

    yield trial
    shutil.rmtree(folder)


_FILTERS = (b"a\nthe\n", b"s/purple/red/\n\\(.*?\\)\n[0-9]+k\n", b"# no comment\n(?i)STAR|, *\n")
_IN_FILTERS = ("s/", "/", "(?:", ")*", "+", "{2,}", "\\", "[^", "(a+)+$")
_text = damaged_text((",", '"', "\n", '""', "\r", ";", "\t"))
_any = one_of(damaged, _text, _text)
TARGETS = (
    Target("texts beside pictures", _beside_pictures, one_of(damaged, _text), _beside),
    Target("tables of captions: CSV", _csv, _any, _table("csv")),
    Target("tables of captions: JSON lines", _jsonl, _any, _table("jsonl")),
    Target("tables of captions: Parquet", _parquets, damaged, _table("parquet")),
    Target("filters of captions", lambda: _FILTERS, damaged_text(_IN_FILTERS), _filters),
    Target("WebDataset tars", _tars, damaged, _archive),
)
