"""Captions from every source, as the ledger lists them: tables, filters, shuffled tags, several for one picture."""

import csv
import json
import re
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from artifact_rows import shown_rows
from data_world import DataWorld
from hypothesis import given, settings
from hypothesis import strategies as st

from deepfloyd_core.config.data_blocks import CaptionShuffle
from deepfloyd_core.config.data_sets import ImageDataset
from deepfloyd_core.config.source_keys import SOURCE_TYPES
from deepfloyd_core.errors import ConfigError, DataError
from deepfloyd_core.index.captions import STRATEGIES, compiled_filters, filtered, shuffled
from deepfloyd_core.index.identity import index_request
from deepfloyd_core.index.ledger import Row, caption_counts, captions_left_out, read_index
from deepfloyd_core.index.scan import scan
from deepfloyd_core.index.summary import IndexSummary
from deepfloyd_core.preflight.load import load_run
from deepfloyd_core.text.embeds import run_captions

ours = settings(deadline=None, database=None, derandomize=True, max_examples=100)


def add_pictures(world: DataWorld, *names: str, caption: str | None = None) -> None:
    for number, name in enumerate(names):
        world.add(name, np.full((64, 64, 3), number, np.uint8), caption)


def rows_of(world: DataWorld, *entries: dict[str, Any], **keys: Any) -> dict[str, Row]:
    run = world.load(*entries, stages=(1,), max_rejected_share=1.0, **keys)
    return {row.source: row for row in read_index(world.index(run))}


def captions(world: DataWorld, **keys: Any) -> dict[str, list[str]]:
    return {source: row.captions for source, row in rows_of(world, keys).items()}


def write_table(path: Path, records: list[dict[str, Any]]) -> None:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    elif path.suffix == ".jsonl":
        path.write_text("\n\n".join(json.dumps(record) for record in records), encoding="utf-8")
    else:
        with path.open("w", newline="", encoding="utf-8") as handle:
            writer = csv.DictWriter(handle, list(records[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(records)


# ---- tables -----------------------------------------------------------------------------------------------------------

RECORDS = [
    {"name": "a", "text": "an apple,\nred", "tags": "fruit"},
    {"name": "b", "text": "", "tags": "tree"},
    {"name": "deep/c", "text": "Füchse", "tags": "fox"},
    {"name": "gone", "text": "of a picture that is not there", "tags": ""},
]
BLOCK = {"filename_column": "name", "caption_column": "text", "fallback_caption_column": "tags",
         "width_column": "width", "height_column": "height", "identifier_includes_extension": False}  # fmt: skip


@pytest.mark.parametrize(
    ("strategy", "file"),
    [("parquet", "t.parquet"), ("csv", "t.csv"), ("csv", "t.tsv"), ("jsonl", "t.jsonl"), ("parquet", "t.jsonl"),
     ("csv", "table")],
)  # fmt: skip
def test_a_table_gives_each_picture_its_caption_and_the_others_a_reason(
    world: DataWorld, strategy: str, file: str
) -> None:
    add_pictures(world, "a.png", "b.jpg", "deep/c.png", "d.png", caption="not this one")
    write_table(world.folder / file, RECORDS)
    block = {**BLOCK, "path": str(world.folder / file)}
    rows = rows_of(world, {"caption_strategy": strategy, "parquet": block, "metadata_backend": "parquet"})
    assert {source: (row.reason, row.captions) for source, row in rows.items()} == {
        "a.png": (None, ["an apple,\nred"]), "b.jpg": (None, ["tree"]), "deep/c.png": (None, ["Füchse"]),
        "d.png": ("caption_missing", []),
    }  # fmt: skip


def test_lists_columns_and_rows_are_several_captions(world: DataWorld) -> None:
    add_pictures(world, "1.png", "2.png", "3.png")
    records: list[dict[str, Any]] = [
        {"id": 1, "short": "one", "long": ["uno", " ", "eins"]},
        {"id": 2, "short": None, "long": []},
        {"id": 2, "short": "two", "long": None},
        {"id": 2, "short": "deux", "long": ["zwei"]},
    ]
    write_table(world.folder / "t.parquet", records)
    block = {"path": str(world.folder / "t.parquet"), "caption_column": ["short", "long"]}
    assert captions(world, caption_strategy="parquet", parquet=block) == {
        "1.png": ["one", "uno", "eins"], "2.png": ["two", "deux", "zwei"], "3.png": [],
    }  # fmt: skip


@pytest.mark.parametrize("names", ["{}.png", "./{}.png", "sub\\{}.png", "sub/{}.png"])
def test_names_with_an_extension_match_the_path_or_the_name(world: DataWorld, names: str) -> None:
    add_pictures(world, "sub/x.png", "sub/y.v2.png")
    write_table(world.folder / "t.csv", [{"f": names.format(name), "t": name} for name in ("x", "y.v2")])
    block = {"path": str(world.folder / "t.csv"), "filename_column": "f", "caption_column": "t",
             "identifier_includes_extension": True}  # fmt: skip
    found = captions(world, caption_strategy="csv", parquet=block)
    assert found == {"sub/x.png": ["x"], "sub/y.v2.png": ["y.v2"]}


def test_a_table_inside_the_directory_is_found_there_and_is_no_picture(world: DataWorld) -> None:
    add_pictures(world, "a.png")
    write_table(world.folder / "pictures" / "t.csv", [{"id": "a", "caption": "from the table"}])
    assert captions(world, caption_strategy="csv", parquet={"path": "t.csv"}) == {"a.png": ["from the table"]}


def test_rows_of_other_pictures_do_not_change_the_data_s_fingerprint(world: DataWorld) -> None:
    add_pictures(world, "a.png")
    entry = {"caption_strategy": "jsonl", "parquet": {"path": "t.jsonl"}}

    def fingerprint(*records: dict[str, str]) -> str:
        write_table(world.folder / "pictures" / "t.jsonl", list(records))
        run = world.load(entry, stages=(1,))
        return index_request(run, scan(run)).fingerprint

    mine = {"id": "a", "caption": "mine"}
    assert fingerprint(mine) == fingerprint(mine, {"id": "b", "caption": "other"})
    assert fingerprint(mine) != fingerprint({"id": "a", "caption": "other"})


@pytest.mark.parametrize(
    ("text", "keys", "error", "says"),
    [
        ("id,caption\na,x\n", {"caption_column": "capt"}, ConfigError, "no column 'capt'; did you mean 'caption'"),
        ("id,caption\na,x\n", {"filename_column": "name"}, ConfigError, "no column 'name'"),
        ("id,caption\na,x\n", {"fallback_caption_column": "tags"}, ConfigError, "no column 'tags'"),
        ("id,caption\na,x\n", {"path": "nowhere.csv"}, ConfigError, "there is no file nowhere.csv or"),
        (
            "id,caption\nb.png,x\n",
            {},
            DataError,
            "names such as 'b.png', the directory 'a.png', and identifier_includes",
        ),
        ("id,caption\na,\xff\n", {}, DataError, "cannot be read as csv"),
    ],
)
def test_a_table_that_cannot_be_used_is_one_clear_error(
    world: DataWorld, text: str, keys: dict[str, Any], error: type[Exception], says: str
) -> None:
    add_pictures(world, "a.png")
    (world.folder / "pictures" / "t.csv").write_bytes(text.encode("latin-1"))
    run = world.load({"caption_strategy": "csv", "parquet": {"path": "t.csv", **keys}}, stages=(1,))
    with pytest.raises(error, match=says):
        scan(run)


@pytest.mark.parametrize(
    ("file", "data", "says"),
    [("t.jsonl", b'{"id": "a", "caption": "x"}\n{"id": ', "line 2"), ("t.jsonl", b"[1]\n", "line 1 is list"),
     ("t.parquet", b"PAR1 not really", "cannot be read as parquet")],
)  # fmt: skip
def test_a_broken_table_names_the_place(world: DataWorld, file: str, data: bytes, says: str) -> None:
    add_pictures(world, "a.png")
    (world.folder / "pictures" / file).write_bytes(data)
    run = world.load({"caption_strategy": file[2:], "parquet": {"path": file}}, stages=(1,))
    with pytest.raises(DataError, match=says):
        scan(run)


@pytest.mark.parametrize(
    ("file", "text", "says"),
    [
        (
            "t.csv",
            "id,caption\n\n00011,a dog\n00012,a, cat\n",
            "line 4 has 3 cells, and the first line 2. Put double quotes",
        ),
        ("t.csv", 'id,caption\n1,"two\nlines"\n2,a cat\non a mat\n', "line 5 has 1 cells"),
        ("t.tsv", "id\tcaption\n1\ta\tcat\n", "line 2 has 3 cells.*quotes around a text with a tab"),
        ("t.tsv", 'id\tcaption\n1\t"big" cat\n', "line 2: .*Write a double quote inside quotes twice"),
        ("t.csv", 'id,caption\n1,a dog\n2,"never closed\n3,a cat\n', "line 3: unexpected end of data"),
        ("t.csv", "id;caption\n1;a\n", "no column 'id'; its first line has 1 other. Is ';' its separator"),
        ("t.csv", "id,caption,caption\n1,a,b\n", "2 columns 'caption'"),
        ("t.jsonl", '{"id": 1, "caption": "a"}\n{"caption": "b"}\n', "line 2 has no 'id'; it has 'caption'"),
        ("t.jsonl", '{"caption": "b"}\n{"id": 1, "caption": "a"}\n', "line 1 has no 'id'; it has 'caption'"),
        ("t.jsonl", '{"caption": "b"}\n', "no column 'id'; it has 'caption'"),
        ("t.csv", f"id,caption\n1,{'a' * 140_000}\n", r"field limit \(131072\)\. Is a double quote not closed\?$"),
        ("t.jsonl", '{"id": 1, "caption": "a", "id": 2}\n', "line 1: a name occurs twice: id, caption, id"),
    ],
)
@pytest.mark.parametrize("urls", [False, True])
def test_a_row_that_does_not_fit_its_header_is_an_error_with_its_line(
    world: DataWorld, file: str, text: str, says: str, urls: bool
) -> None:
    """As the captions of a folder, and as a table of URLs."""
    add_pictures(world, "1.png")
    table = world.folder / "pictures" / file
    table.write_text(text, encoding="utf-8")
    entry: dict[str, Any] = {"caption_strategy": file[2:].replace("tsv", "csv"), "parquet": {"path": file}}
    if urls:
        place = {"csv_file": str(table), "csv_cache_dir": str(world.folder / "kept"), "csv_url_column": "id"}
        entry = {"type": "csv", "caption_strategy": "csv", **place}
    run = world.load(entry, stages=(1,))
    with pytest.raises((DataError, ConfigError), match=says):
        scan(run)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be"])
@pytest.mark.parametrize("file", ["t.csv", "t.tsv", "t.jsonl"])
def test_a_table_is_read_as_its_first_bytes_say(world: DataWorld, file: str, encoding: str) -> None:
    add_pictures(world, "a.png")
    table = world.folder / "pictures" / file
    write_table(table, [{"id": "a", "caption": "Füchse, \u2028 rot"}])
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    table.write_bytes((mark + table.read_text(encoding="utf-8")).encode(encoding))
    assert captions(world, caption_strategy=file[2:].replace("tsv", "csv"), parquet={"path": file}) == {
        "a.png": ["Füchse, \u2028 rot"]
    }


def test_blank_lines_of_a_table_are_passed_over(world: DataWorld) -> None:
    add_pictures(world, "a.png")
    (world.folder / "pictures/t.csv").write_text("id,caption\n \na,x\n\n   \n,\n")
    assert captions(world, caption_strategy="csv", parquet={"path": "t.csv"}) == {"a.png": ["x"]}


def test_rows_without_a_name_are_counted(world: DataWorld, caplog: pytest.LogCaptureFixture) -> None:
    add_pictures(world, "a.png")
    write_table(world.folder / "pictures/t.csv", [{"id": name, "caption": "x"} for name in ("a", "", " ")])
    assert captions(world, caption_strategy="csv", parquet={"path": "t.csv"}) == {"a.png": ["x"]}
    assert any("2 rows with an empty 'id' are left out" in line for line in caplog.messages)


# ---- text files beside the pictures -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "data"),
    [
        ("a.txt", "Füchse".encode("utf-8-sig")), ("a.txt", "Füchse".encode("utf-16")),
        ("a.txt", b"\xfe\xff" + "Füchse".encode("utf-16-be")), ("a.txt", "Füchse".encode("utf-32")),
        ("a.TXT", "Füchse".encode()), ("a.JPG.txt", "Füchse".encode()), ("a.caption", "Füchse".encode()),
        ("a.JPG.Caption", "Füchse".encode()),
    ],
)  # fmt: skip
@pytest.mark.parametrize("place", ["local", "webdataset"])
def test_a_caption_is_found_and_read_where_that_is_sure(world: DataWorld, file: str, data: bytes, place: str) -> None:
    add_pictures(world, "deep/a.png")
    (world.folder / "pictures/deep/a.png").rename(world.folder / "pictures/deep/a.JPG")
    (world.folder / "pictures/deep" / file).write_bytes(data)
    entry: dict[str, Any] = {"caption_strategy": "textfile", "type": place}
    if place == "webdataset":
        (world.folder / "tars").mkdir()
        with tarfile.open(world.folder / "tars/0.tar", "w") as tar:
            tar.add(world.folder / "pictures/deep", "deep")
        entry["instance_data_dir"] = str(world.folder / "tars")
    (row,) = rows_of(world, entry).values()
    assert (row.reason, row.captions) == (None, ["Füchse"])


def test_the_nearest_name_is_the_caption(world: DataWorld) -> None:
    add_pictures(world, "a.png")
    names = ["a.caption", "a.png.txt", "a.TXT", "a.txt"]
    for name in names:
        (world.folder / "pictures" / name).write_text(name)
        assert captions(world, caption_strategy="textfile") == {"a.png": [name]}


@pytest.mark.parametrize(
    "data",
    ["café".encode("cp1252"), "日本".encode("shift-jis"), "a cat".encode("utf-16-le"), b"\xff\xfea", b"\x00\xd8bin"],
)
def test_a_caption_that_cannot_be_read_for_sure_is_named(world: DataWorld, data: bytes) -> None:
    """Also when it came to a picture whose row was known, and after it was mended."""
    add_pictures(world, "other.png", caption="so that not all are rejected")
    add_pictures(world, "a.png")
    assert (rows_of(world, {})["a.png"].detail or "").startswith("there is no a.txt beside it")
    text = world.folder / "pictures" / "a.txt"
    text.write_bytes(data)
    for _ in range(2):
        row = rows_of(world, {})["a.png"]
        assert row.reason == "caption_missing" and re.match(
            r"a.txt is no UTF-\d+ text .*save it as UTF-8", row.detail or ""
        )
    text.write_text("a cat")
    row = rows_of(world, {})["a.png"]
    assert (row.reason, row.detail, row.captions) == (None, None, ["a cat"])


def test_only_line_ends_cut_a_text_into_captions(world: DataWorld) -> None:
    inside = "one\u2028still \u0085one\x0cstill\x1cone\u2029 end"
    add_pictures(world, "a.png")
    (world.folder / "pictures/a.txt").write_bytes(f"{inside}\r\ntwo\rthree\nfour".encode())
    assert captions(world, caption_strategy="textfile") == {"a.png": [inside, "two", "three", "four"]}
    (world.folder / "f.txt").write_bytes("still \u0085\none".encode())
    entry = {"caption_strategy": "textfile", "caption_filter_list": str(world.folder / "f.txt")}
    assert captions(world, **entry)["a.png"][0] == "still\x1c\u2029 end"


def test_captions_that_no_pass_shows_are_said(world: DataWorld) -> None:
    add_pictures(world, "a.png", "b.png", caption="one\ntwo\nthree")
    add_pictures(world, "c.png", caption="one")
    run = world.load({"repeats": 1}, stages=(1,))
    counts = world.index(run).summary(IndexSummary).captions_per_picture
    assert counts == {"set": {1: 1, 3: 2}}
    (line,) = captions_left_out(counts, {"set": 1})
    assert line.startswith(
        "set: 2 pictures have up to 3 captions, and with repeats = 1 the first 2 are trained. Set repeats = 2"
    )
    assert captions_left_out(counts, {"set": 2}) == []


def test_half_a_surrogate_pair_is_no_crash(world: DataWorld) -> None:
    add_pictures(world, "a.png")
    (world.folder / "pictures" / "t.jsonl").write_text('{"id": "a", "caption": "x \\ud800 y"}')
    assert captions(world, caption_strategy="jsonl", parquet={"path": "t.jsonl"}) == {"a.png": ["x ? y"]}


# ---- strategies -------------------------------------------------------------------------------------------------------


def test_captions_that_lie_with_the_pictures_are_read_by_their_source() -> None:
    """The scan reuses them by the stamps of its listing, which are of the files of `sources.names`: what other code reads
    from other files would be taken for unchanged.
    """
    beside = {name for kind in SOURCE_TYPES.values() for name in kind.captions}
    assert {STRATEGIES[name].read for name in beside} == {STRATEGIES["textfile"].read}


def test_every_strategy_that_a_data_file_may_name_has_a_reader() -> None:
    assert set(get_args(ImageDataset.model_fields["caption_strategy"].annotation)) == STRATEGIES.keys()


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"caption_strategy": "textfile"}, "there is no b.txt beside it; without such files set caption_strategy"),
        ({"caption_strategy": "csv", "parquet": {"path": "t.csv"}}, "the table has no row for it, or no caption in it"),
        ({"caption_strategy": "filename", "caption_filter_list": ["b"]}, "caption_filter_list leaves nothing"),
    ],
)
def test_a_picture_without_a_caption_is_told_what_its_strategy_lacks(
    world: DataWorld, keys: dict[str, Any], expected: str
) -> None:
    add_pictures(world, "a.png", caption="one")
    add_pictures(world, "b.png")
    (world.folder / "pictures" / "t.csv").write_text("id,caption\na,one\n")
    row = rows_of(world, keys)["b.png"]
    assert row.reason == "caption_missing" and str(row.detail).startswith(expected)


# ---- prompts and text files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"caption_strategy": "instanceprompt", "instance_prompt": ["a fox", " a red fox "]}, ["a fox", "a red fox"]),
        ({"only_instance_prompt": True, "instance_prompt": ["a fox", "foxes"]}, ["a fox", "foxes"]),
        ({"prepend_instance_prompt": True, "instance_prompt": ["sks", "tok"]},
         ["sks one", "tok one", "sks two", "tok two"]),
        ({"disable_multiline_split": True}, ["one\ntwo"]),
    ],
)  # fmt: skip
def test_prompts_may_be_lists_and_text_files_one_caption(
    world: DataWorld, keys: dict[str, Any], expected: list[str]
) -> None:
    add_pictures(world, "a.png", caption="one\ntwo\n")
    assert captions(world, **keys) == {"a.png": expected}


# ---- filters ----------------------------------------------------------------------------------------------------------


def test_filters_remove_replace_and_never_touch_the_prompt(world: DataWorld) -> None:
    add_pictures(world, "a.png", caption="The image shows an arafed cat, a cat\nthere is\nCaption: a dog there is")
    filters = ["The image .*? an ", "arafed ", "^there is", "^Caption: ", "s/cat/kitten/", r"s/(do)g/\1ggy/"]
    keys = {"caption_filter_list": filters, "instance_prompt": "arafed", "prepend_instance_prompt": True}
    assert captions(world, **keys) == {"a.png": ["arafed kitten, a cat", "arafed a doggy there is"]}
    world.add("b.png", np.zeros((64, 64, 3), np.uint8), "there is")
    assert rows_of(world, keys)["b.png"].reason == "caption_missing", "nothing is left of it"


def test_a_picture_set_has_the_filters_of_its_text_embeds(world: DataWorld) -> None:
    add_pictures(world, "a.png", caption="red green blue cyan")
    (world.folder / "f.txt").write_text("red \n\n")
    (world.folder / "f.json").write_text('["green "]')
    backends = [
        {
            "id": "plain",
            "dataset_type": "text_embeds",
            "caption_filter_list": str(world.folder / "f.txt"),
            "default": True,
        },
        {"id": "other", "dataset_type": "text_embeds", "caption_filter_list": str(world.folder / "f.json")},
    ]

    def found(**keys: Any) -> list[str]:
        common = {"type": "local", "instance_data_dir": str(world.folder / "pictures"), "caption_strategy": "textfile"}
        (world.folder / "data.json").write_text(json.dumps([{"id": "set", **common, **keys}, *backends]))
        return [row.captions[0] for row in read_index(world.index(load_run(world.folder / "run.json")))]

    world.load(stages=(1,))
    assert found() == ["green blue cyan"]
    assert found(text_embeds="other") == ["red blue cyan"]
    assert found(text_embeds="other", caption_filter_list=["blue "]) == ["red cyan"]


@pytest.mark.parametrize("line", ["a(b", "*", "s/a(/b/", r"s/a/\7/"])
def test_a_filter_that_is_no_regular_expression_is_named(line: str) -> None:
    with pytest.raises(ConfigError, match="is no regular expression"):
        compiled_filters((line,))


@ours
@given(st.text(), st.lists(st.sampled_from(["a", "b+", "^c", "d$", "[ef] ", "s/g/h/"])))
def test_filters_only_take_away_but_for_replacements(caption: str, lines: list[str]) -> None:
    made = filtered(caption, compiled_filters(tuple(lines)))
    assert len(made) <= len(caption)
    if "b+" in lines:
        assert "b" not in made


# ---- shuffled tags ----------------------------------------------------------------------------------------------------

TAGS = st.lists(st.text("abcdef", min_size=1, max_size=3), min_size=1, max_size=7)


@ours
@given(TAGS, st.integers(1, 8), st.integers(0, 3), st.booleans(), st.integers(0, 99))
def test_shuffled_captions_have_the_same_tags_and_keep_the_first(
    tags: list[str], count: int, fixed: int, original: bool, seed: int
) -> None:
    caption = ", ".join(tags)
    keys = {"enable": True, "count": count, "position_start": fixed, "include_original": original}
    shuffle = CaptionShuffle.model_validate(keys)
    made = shuffled(caption, shuffle, seed)
    assert made == shuffled(caption, shuffle, seed)
    assert 1 <= len(made) <= count + original
    assert len(set(made)) == len(made)
    for variant in made:
        assert Counter(variant.split(", ")) == Counter(tags)
        assert variant.split(", ")[:fixed] == tags[:fixed]
    if original or len(set(tags[fixed:])) < 2:
        assert made[0] == caption
    else:
        assert caption not in made


def test_shuffling_splits_on_commas_spaces_or_periods_and_follows_its_seed() -> None:
    def made(caption: str, run_seed: int = 1, **keys: Any) -> list[str]:
        return shuffled(caption, CaptionShuffle(enable=True, **keys), run_seed)

    assert made("one two", split_on="space") == ["one two", "two one"]
    assert made("A cat. On a mat.", split_on="period") == ["A cat. On a mat.", "On a mat. A cat."]
    assert made("a,b", count=9) == ["a,b", "b, a"]
    assert made("a, b, c, d, e, f", 1) != made("a, b, c, d, e, f", 2)
    assert made("a, b, c, d, e, f", 1, seed=3) == made("a, b, c, d, e, f", 2, seed=3)
    assert shuffled("a, b", CaptionShuffle.model_validate({"count": 3}), 1) == ["a, b"], "not enabled"


def test_every_shuffled_caption_is_in_the_ledger_and_has_an_embed(world: DataWorld) -> None:
    add_pictures(world, "a.png", "b.png", caption="dog, park, sunny, grass\ncat, sofa, home, red")
    shuffle = {"enable": True, "count": 2, "position_start": 1}
    entry = {"caption_shuffle": shuffle, "instance_prompt": "sks", "prepend_instance_prompt": True, "repeats": 6}
    run = world.load(entry, stages=(1,))
    index = world.index(run)
    listed = read_index(index)[0].captions
    assert len(listed) == len(set(listed)) == 6
    assert listed[:2] == ["sks dog, park, sunny, grass", "sks cat, sofa, home, red"], "each caption before its variants"
    assert all(caption.startswith(("sks dog, ", "sks cat, ")) for caption in listed)
    assert set(listed) <= set(run_captions(run, caption_counts(index)))
    trained = [row["caption"] for row in shown_rows(world.pixels(run, index, 1))]
    assert Counter(trained) == {caption: 4 if caption == listed[0] else 2 for caption in listed}, "repeat % n"
    other = world.load(entry, stages=(1,), seed=5)
    assert index_request(other, scan(other)).fingerprint != index.fingerprint
