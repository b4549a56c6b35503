"""Any text of a user comes back from the written files as it was, and no comment becomes a key."""

import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from deepfloyd_core.config.data_blocks import CaptionTable
from deepfloyd_core.preflight.load import load_run
from deepfloyd_core.project.captions import CaptionsSeen
from deepfloyd_core.project.choose import choose
from deepfloyd_core.project.look import FolderLook, Seen
from deepfloyd_core.project.machine import MachineLook
from deepfloyd_core.project.write import data_text, run_text, safe_name, write_project

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=200).filter(
    lambda text: bool(text.strip())
)
ODD = "a \"quoted\" 'name' \\ # [x]\r\n= 1\n\u2028\x00\x7f\x85\t猫 \U0001f600"
MACHINES = (MachineLook("cpu", "", 8 << 30, False), MachineLook("cuda", ODD, 24 << 30, True))


def prompt_of(caption: str) -> str:
    """A run file may hold no zero byte."""
    return caption.replace("\0", "").strip()


def look(folder: Path, captions: CaptionsSeen, examples: tuple[str, ...] = ()) -> FolderLook:
    seen = tuple(Seen(f"{number}.png", 300, 400, "PNG") for number in range(8))
    return FolderLook(
        folder, files=9, opened=9, pictures=8, seen=seen, unusable=(("corrupt", 1),), examples=examples, others="",
        subfolders=0, detects="", captions=captions,
    )  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(name=TEXTS, caption=TEXTS, machine=st.sampled_from(MACHINES))
@example(name=ODD, caption=ODD, machine=MACHINES[1])
@example(name="..", caption='"""', machine=MACHINES[0])
def test_any_name_and_any_caption_round_trip(name: str, caption: str, machine: MachineLook) -> None:
    table = CaptionTable(path=f"x/{name}", filename_column=name, caption_column=caption)  # type: ignore[call-arg]
    for captions in (
        CaptionsSeen("textfile", ((caption,),) * 7, 1, fault=f"{name}: {caption}"),
        CaptionsSeen("csv", ((caption,),) * 8, table=table),
        CaptionsSeen("instanceprompt", (), beside=caption),
    ):
        choices = choose(
            look(Path(f"/{name}"), captions, (f"{name}: {caption}",)), machine, safe_name(name), f"/{name}"
        )
        run = tomllib.loads(run_text(choices))
        (entry,) = json.loads(_without_comments(data_text(choices)))
        assert set(run) <= {
            "workspace", "data_backend_config", "max_rejected_share", "mixed_precision", "text_encoder_streaming",
            "validation_prompt", "validation_resolution", "stage1", "stage2",
        }  # fmt: skip
        assert entry["instance_data_dir"] == f"/{name}" and entry["id"] == safe_name(name)
        if captions.texts:
            assert run.get("validation_prompt", [""]) == [prompt_of(caption)]
        if captions.table:
            assert entry["parquet"]["filename_column"] == name and entry["parquet"]["caption_column"] == caption


def _without_comments(text: str) -> str:
    return "\n".join(line for line in re.split("\r\n?|\n", text) if not line.lstrip().startswith("#"))


@settings(max_examples=25, deadline=None)
@given(caption=TEXTS)
@example(caption=ODD)
def test_a_run_loads_what_is_written(caption: str) -> None:
    """Through the run's own readers, from any folder: paths in the files are whole."""
    with TemporaryDirectory() as made:
        folder = Path(made)
        (folder / "pictures").mkdir()
        found = look(folder / "pictures", CaptionsSeen("textfile", ((caption,),) * 8))
        file, data = write_project(choose(found, MACHINES[1], "x", str(folder / "pictures")), folder)
        run = load_run(file, (f"data_backend_config={data}", f"workspace={folder / 'workspace'}"))
    assert (run.config.validation_prompt or ("",)) == (prompt_of(caption),) and run.notes == ()


def _names() -> Iterator[tuple[str, str]]:
    yield from {
        "My dog Rex!": "My-dog-Rex",
        "..": "pictures",
        "": "pictures",
        "-rf": "rf",
        "a/b\\c\n": "a-b-c",
        "猫_01": "猫-01",
        "e\u0301te\u0301": "été",
        "x" * 300: "x" * 40,
        "$(reboot);": "reboot",
    }.items()


@pytest.mark.parametrize(("name", "safe"), _names())
def test_a_files_name_is_plain_in_a_shell_and_on_any_disk(name: str, safe: str) -> None:
    assert safe_name(name) == safe


@given(TEXTS)
def test_a_files_name_has_letters_digits_and_hyphens_alone(name: str) -> None:
    safe = safe_name(name)
    assert re.fullmatch(r"[^\W_](?:[^\W_]|-)*", safe) and len(safe.encode()) <= 200 and safe_name(safe) == safe
