"""The pictures that `generate` is asked for: seeds, sizes, files of prompts, and what is wrong with them."""

import json
from itertools import chain
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepfloyd_core.errors import ConfigError
from deepfloyd_core.sampling.pictures import (
    MOST_DRAWN,
    Picture,
    PromptRow,
    batches,
    grid,
    parse_seeds,
    parse_sizes,
    picture_file,
    read_prompts,
    told,
    unused_words,
)

SIZES = ((64, 64), (96, 64))
RANGE = st.tuples(st.integers(0, 2**32 - 2), st.integers(0, 50))


@given(st.lists(RANGE, min_size=1, max_size=6))
def test_seeds_are_those_of_their_ranges_each_once(ranges: list[tuple[int, int]]) -> None:
    ends = [(first, min(first + more, 2**32 - 1)) for first, more in ranges]
    text = " , ".join(f"{first}-{last}" if last > first else str(first) for first, last in ends)
    seeds = parse_seeds(text)
    assert len(set(seeds)) == len(seeds)
    assert set(seeds) == {seed for first, last in ends for seed in range(first, last + 1)}


@pytest.mark.parametrize("text", ["", "a", "3-1", "-1", "1,,2", "1-", "4294967296", "0-99999", "²"])
def test_seeds_that_are_none_are_an_error(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^The seeds are .*0-7,42\.$"):
        parse_seeds(text)


def test_each_prompt_is_drawn_at_each_size_with_each_seed_unless_it_has_its_own() -> None:
    rows = [PromptRow(prompt="a"), PromptRow(prompt="b", negative_prompt="x", seeds=(7,), sizes=((32, 32),))]
    pictures = grid(rows, (0, 1), SIZES, "blurry")
    assert [(one.prompt, one.size, one.seed, one.negative_prompt) for one in pictures] == [
        *(("a", size, seed, "blurry") for size in SIZES for seed in (0, 1)), ("b", (32, 32), 7, "x"),
    ]  # fmt: skip
    assert told(pictures, (1, 2)) == [
        "5 pictures of Stage I and Stage II: 2 prompts, 3 sizes, 3 seeds",
        "- a, 64x64, seeds 0, 1", "- a, 96x64, seeds 0, 1", "- b, 32x32, seed 7",
    ]  # fmt: skip
    assert picture_file(pictures, 2, 4) == "picture-002-seed-0-384x256.png"


def test_of_a_large_grid_the_first_lines_are_told_and_the_rest_is_counted() -> None:
    rows = [PromptRow(prompt=f"{number} of\n{'many' * 50}") for number in range(12)]
    first, *lines, last = told(grid(rows, tuple(range(0, 200, 2)), SIZES[:1], ""), (1,))
    assert first == "1,200 pictures of Stage I: 12 prompts, 1 size, 100 seeds"
    assert len(lines) == 10 and last == "- and 200 more pictures"
    assert lines[0].startswith("- 0 of many") and all("..., 64x64, seeds 0, 2, 4" in line for line in lines)
    assert max(map(len, lines)) < 200


def test_a_picture_twice_and_too_many_are_errors() -> None:
    with pytest.raises(ConfigError, match=r"'a' with seed 1 and size 64x64 is asked for twice"):
        grid([PromptRow(prompt="a"), PromptRow(prompt="a")], (1,), SIZES, "")
    rows = [PromptRow(prompt="a", where=f"p.csv, row {number}") for number in range(1, 20)]
    with pytest.raises(ConfigError) as refused:
        grid(rows[:2], (1,), SIZES[:1], "")
    assert "size 64x64 is asked for twice, by p.csv, row 1 and by p.csv, row 2. For" in str(refused.value)
    with pytest.raises(ConfigError) as refused:
        grid([*rows, PromptRow(prompt="a")], (1, 2), SIZES, "")
    lines = str(refused.value).splitlines()
    assert len(lines) == 12 and lines[-1] == "- 9 more rows like these."
    with pytest.raises(ConfigError, match=f"More than {MOST_DRAWN:,} pictures"):
        grid([PromptRow(prompt="a"), PromptRow(prompt="b")], tuple(range(MOST_DRAWN)), SIZES[:1], "")


def test_pictures_of_one_size_are_drawn_together_and_each_is_drawn_once() -> None:
    pictures = grid([PromptRow(prompt="a"), PromptRow(prompt="b")], (0, 1, 2), SIZES, "")
    made = batches(pictures, 4)
    assert [len(one) for one in made] == [4, 2, 4, 2] and sorted(chain(*made)) == list(range(12))
    assert all(len({pictures[number].size for number in one}) == 1 for one in made)


def written(folder: Path, name: str, rows: list[dict[str, object]]) -> Path:
    path = folder / name
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        sign = "\t" if path.suffix == ".tsv" else ","
        cells = [[f'"{"" if value is None else value}"' for value in row.values()] for row in rows]
        path.write_text("\n".join([sign.join(rows[0]), *(sign.join(row) for row in cells)]) + "\n")
    return path


@pytest.mark.parametrize("name", ["p.csv", "p.tsv", "p.jsonl", "p.parquet"])
def test_a_table_has_seeds_sizes_and_negative_prompts(tmp_path: Path, name: str) -> None:
    path = written(tmp_path, name, [
        {"prompt": " a star, red ", "negative_prompt": "blurry", "seed": "3-4", "size": "64,96x64"},
        {"prompt": "a circle", "negative_prompt": None, "seed": None, "size": None},
    ])  # fmt: skip
    assert read_prompts(path) == [
        PromptRow(prompt="a star, red", negative_prompt="blurry", seeds=(3, 4), sizes=SIZES, where=f"{path}, row 1"),
        PromptRow(prompt="a circle", where=f"{path}, row 2"),
    ]


def test_numbers_of_a_table_are_seeds_and_sizes(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["a", "b"], "seed": [7.0, None], "size": [64, 96]}), tmp_path / "p.parquet")
    first, second = read_prompts(tmp_path / "p.parquet")
    assert (first.seeds, first.sizes, second.seeds, second.sizes) == ((7,), ((64, 64),), None, ((96, 96),))


def test_a_text_has_a_prompt_a_line_and_a_library_has_names(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("\ufeffa star\r\n\n  a circle \n", encoding="utf-8")
    (tmp_path / "p.json").write_text('{"first": "a star", "second": "a circle"}')
    for name, where in (("p.txt", ("line 1", "line 3")), ("p.json", ("'first'", "'second'"))):
        assert read_prompts(tmp_path / name) == [
            PromptRow(prompt=prompt, where=f"{tmp_path / name}, {place}")
            for prompt, place in zip(("a star", "a circle"), where, strict=True)
        ]


def test_a_library_of_simpletuner_has_objects_and_what_is_not_used_of_them_is_told(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    entries = {
        "a": {"prompt": "x", "adapter_strength": 0.5}, "b": "y", "c": {"prompt": "z"},
        "d": {"prompt": "w", "adapter_strength": 1.0},
    }  # fmt: skip
    for library, where in ((entries, f"{path}, 'a'"), (list(entries.values()), f"{path}, entry 1")):
        path.write_text(json.dumps(library))
        rows = read_prompts(path)
        assert [row.prompt for row in rows] == ["x", "y", "z", "w"]
        (told,) = unused_words(rows)
        assert told.startswith(f"adapter_strength 0.5 is not used: {where}. A LoRA's weight is ")
    for wrong in ({"prompt": 3}, {"text": "x"}, {"prompt": "x", "seed": 1}, None, ["x"]):
        path.write_text(json.dumps({"good": "x", "bad": wrong}))
        with pytest.raises(ConfigError, match=r"p\.json, 'bad': this is no library of prompts, which is "):
            read_prompts(path)


@pytest.mark.parametrize(
    ("name", "data", "fault"),
    [
        ("p.txt", b"\n \n", r"has no prompt\.$"),
        ("p.txt", b"\xff\xfe\x00", r"cannot be read: .* Save it as UTF-8\.$"),
        ("p.json", b"[1]", "is no library of prompts"),
        ("p.json", b"{", "is no JSON"),
        (
            "p.csv",
            b"prompt,seeds\na,1\n",
            r"has a column 'seeds'; it may have 'prompt', 'negative_prompt', 'seed', 'size'",
        ),
        ("p.csv", b"text\na\n", "has no column 'prompt'"),
        ("p.csv", b"prompt,seed\na,1\n,2\n", r"p\.csv, row 2: the prompt is empty\.$"),
        ("p.csv", b"prompt,seed\na,x\n", r"p\.csv, row 1: The seeds are 'x'"),
        ("p.csv", b"prompt,size\na,1x2x3\n", r"p\.csv, row 1: The size is '1x2x3'; give sizes"),
        ("p.parquet", b"PAR1", "cannot be read as parquet"),
        ("none.txt", None, r"none\.txt is not there\.$"),
    ],
)
def test_a_file_with_a_fault_is_one_sentence(tmp_path: Path, name: str, data: bytes | None, fault: str) -> None:
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(ConfigError, match=fault):
        read_prompts(tmp_path / name)


def test_half_a_surrogate_pair_does_not_end_the_run(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a \\ud800 star"}\n')
    assert [row.prompt for row in read_prompts(tmp_path / "p.jsonl")] == ["a ? star"]


def test_sizes_that_are_none_are_an_error() -> None:
    assert parse_sizes("64, 96x64,64x64") == SIZES
    with pytest.raises(ConfigError, match=r"^The size is '64xx'; give sizes, for example 64 or 64,96x64\.$"):
        parse_sizes("64xx")


def test_pictures_are_compared_by_all_that_they_are() -> None:
    one = Picture(prompt="a", negative_prompt="", seed=0, size=(64, 64))
    assert one == one.model_copy() and one != one.model_copy(update={"negative_prompt": "b"})
