"""Configurations that were made to break a reader: each is one error that names its file, in time, and short."""

import json
import time
from typing import Any

import pytest
from releases import deepfloyd
from small_run import SmallRun

from deepfloyd_core.errors import ConfigError

DEEP, NUMBER = "[" * 100_000, "1" * 5000


def said(run: SmallRun, file: str | None = None, text: str = "", *sets: str) -> str:
    """The error of a command on the run, once one of its files has another text."""
    config = run.config
    if file is not None:
        (run.folder / file).write_text(text, encoding="utf-8")
        config = config if file == "data.json" else run.folder / file
    start = time.process_time()
    result = deepfloyd("plan", str(config), *(part for each in sets for part in ("--set", each)))
    assert isinstance(result.exception, ConfigError), repr(result.exception)[:1000]
    assert time.process_time() - start < 30, "not with the square of its size, which took minutes"
    message = str(result.exception)
    assert len(message) < 30_000
    return message


@pytest.mark.parametrize(
    ("file", "text", "says"),
    [
        ("x.toml", f"x = {DEEP}", "nested too deeply"), ("x.toml", "x = " + "{a=" * 5000, "nested too deeply"),
        ("x.toml", f"x = {'[' * 60}{']' * 60}", "nested too deeply"), ("x.json", DEEP, "nested too deeply"),
        ("x.json", '{"x": ' + "[" * 900 + "]" * 900 + "}", "nested too deeply"), ("data.json", DEEP, "nested too deeply"),
        ("x.toml", f"seed = {NUMBER}", "digits"), ("x.toml", f"seed = 0x{NUMBER}", "digits"),
        ("x.json", f'{{"seed": {NUMBER}}}', "digits"), ("data.json", f'[{{"id": {NUMBER}}}]', "digits"),
        ("x.toml", 'workspace = "a\\u0000b"', "zero byte"), ("x.json", '{"a\\u0000b": 1}', "zero byte"),
        ("data.json", '[{"id": "x", "instance_data_dir": "a\\u0000b"}]', "zero byte"),
        ("data.json", f'[{{"id": "x", "type": "local", "instance_data_dir": "{"a" * 300}"}}]', "is not a directory"),
        ("data.json", f'[{{"id": "x", "type": "csv", "csv_cache_dir": "kept", "csv_file": "{"a" * 300}"}}]', "no such file"),
        ("config.env", "MODEL_TYPE=deepfloyd-lora\nOUTPUT_DIR=a\0b", "line 2: a zero byte"),
    ],
)  # fmt: skip
def test_a_file_that_breaks_a_reader_is_one_error(small_run: SmallRun, file: str, text: str, says: str) -> None:
    message = said(small_run, file, text)
    assert says in message and str(small_run.folder / file) in message


@pytest.mark.parametrize(
    ("value", "says"),
    [(DEEP, "nested too deeply"), ("[" * 60 + "]" * 60, "nested too deeply"), (NUMBER, "digits"), (f"0x{NUMBER}", "digits"),
     ('"a\\u0000b"', "zero byte")],
)  # fmt: skip
def test_a_value_on_the_command_line_that_breaks_a_reader_is_one_error(
    small_run: SmallRun, value: str, says: str
) -> None:
    assert says in said(small_run, None, "", f"seed={value}")


@pytest.mark.parametrize(
    "line",
    ["a{99999999999999999999}", "(" * 5000 + ")" * 5000, "[[a]", "(?P<99999999999999999999>", "(?99999999999999)"],
)
def test_a_filter_that_breaks_the_compiler_is_one_error(small_run: SmallRun, line: str) -> None:
    (entry,) = json.loads((small_run.folder / "data.json").read_text())
    message = said(small_run, "data.json", json.dumps([entry | {"caption_filter_list": ["a", line, line + "("]}]))
    assert "line 3 is no regular expression" in message


@pytest.mark.parametrize("file", ["x.json", "data.json"])
def test_so_many_unknown_keys_are_a_short_message(small_run: SmallRun, file: str) -> None:
    values: dict[str, Any] = {f"key_{number}": 1 for number in range(100_000)} | {"z" * 100_000: 1}
    text = json.dumps([values | {"id": "x"}] if file == "data.json" else values | {"stage1": {}})
    assert "more keys are wrong" in said(small_run, file, text)


def test_a_filter_in_a_file_is_named_with_that_file(small_run: SmallRun) -> None:
    (entry,) = json.loads((small_run.folder / "data.json").read_text())
    filters = small_run.folder / "filters.txt"
    filters.write_text("a\n(\n")
    message = said(small_run, "data.json", json.dumps([entry | {"caption_filter_list": str(filters)}]))
    assert f"caption_filter_list in {filters}: line 2 is no regular expression" in message


def test_so_many_faults_are_a_short_message(small_run: SmallRun) -> None:
    message = said(small_run, "data.json", json.dumps([{"id": number} for number in range(20_000)]))
    assert message.startswith("20,000 faults to correct:") and message.endswith("- and 19,900 more")


DOTTED = ".".join(["a"] * 20_000)


@pytest.mark.parametrize("text", [f"{DOTTED} = 1", f"[{DOTTED}]\nx = 1", f"x = {{{DOTTED} = 1}}", f'"b".{DOTTED} = 1'])
def test_a_key_of_so_many_parts_is_one_error_at_once(small_run: SmallRun, text: str) -> None:
    start = time.process_time()
    assert "nested too deeply" in said(small_run, "x.toml", text)
    assert time.process_time() - start < 3, "32 s with the square of their number"


@pytest.mark.parametrize(
    ("override", "says"),
    [
        (f"{DOTTED}=1", "more than 32 tables"),
        ("[" * 30_000 + "=", "removes a key"),
        (f"stage1={{{DOTTED}=1}}", "nested too deeply"),
        ("x" * 50_000, "key=value"),
    ],
    ids=["key", "key to remove", "value", "no value"],
)
def test_an_override_of_so_many_parts_is_one_short_error_at_once(small_run: SmallRun, override: str, says: str) -> None:
    start = time.process_time()
    assert says in said(small_run, None, "", override)
    assert time.process_time() - start < 3


def test_texts_with_many_dots_are_no_deep_keys(small_run: SmallRun) -> None:
    config = small_run.config
    dots = ".".join("abc" * 20)
    config.write_text(config.read_text().replace('"a purple star"', f'"{dots} and {dots}, a star"', 1))
    assert deepfloyd("plan", str(config)).exception is None
