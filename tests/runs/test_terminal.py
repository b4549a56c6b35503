"""What the command line prints: text of users and file systems as it is, and a sentence where a folder is no workspace."""

import io
import logging
import os
import pty
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from data_world import DataWorld
from PIL import Image
from rich.console import Console
from rich.table import Table
from small_run import SmallRun
from typer.main import get_command

from deepfloyd_core.bundle.measure_words import measure_words
from deepfloyd_core.config.data_file import DataFile, load_data_file
from deepfloyd_core.config.stages import Stage
from deepfloyd_core.index.summary import IndexSummary
from deepfloyd_core.measures.figures import UpscalingFigures
from deepfloyd_core.measures.registry import measures_against
from deepfloyd_core.measures.tables import UPSCALED_BY
from deepfloyd_core.sampling.jobs import GeneratedSummary, SamplesSummary
from deepfloyd_core.store.artifacts import Artifact
from flows.commands import report
from flows.commands.cli import app
from tasks import artifact_page, ui_pages
from tasks.endings import twins_line
from tasks.progress import LogLines, progress
from tasks.terminal import console, is_watched, labelled

ROOT = Path(__file__).parents[2]
ODD = "a[red]b[/x] [link=c] :smile: [/]"


@pytest.mark.parametrize(
    ("pictures", "groups", "words"),
    [(1, 1, "1 picture is a duplicate of 1 other: each group "), (3, 1, "3 pictures are duplicates of 1 other: each group "),
     (1200, 2, "1,200 pictures are duplicates of 2 others: each group ")],
)  # fmt: skip
def test_counts_are_singular_and_plural(pictures: int, groups: int, words: str) -> None:
    line = twins_line(cast(Any, SimpleNamespace(twins=pictures, twin_groups=groups, reasons={})))
    assert line.startswith(words) and "duplicates = first" in line


@pytest.mark.parametrize("command", ["ls", "verify", "show"])
def test_a_folder_that_is_no_workspace_is_a_sentence_and_exit_2(small_run: SmallRun, command: str) -> None:
    folder = small_run.folder / ODD
    folder.mkdir(parents=True)
    for path, said in (
        (folder, "holds no artifacts"),
        (small_run.config, "is no folder"),
        (folder / "x", "is not there"),
    ):
        done = small_run.call_here(command, str(path), *["0" * 16][: command == "show"])
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr == f"error: {path} {said}. Give the folder that `workspace` of the run file names.\n"


def test_an_error_names_a_path_as_it_is(small_run: SmallRun) -> None:
    done = small_run.call_here("run", f"{ODD}.toml")
    assert done.returncode == 2
    assert done.stderr == f"error: {ODD}.toml cannot be read: no such file.\n"


@pytest.mark.parametrize(
    ("command", "read"),
    [
        *((name, "x") for name in ("run", "retrain", "prepare", "embed", "train-stage1", "train-stage2")),
        ("generate --prompt x --version base", ""),
    ],
)
def test_a_command_reads_its_data_file_once_and_one_that_draws_not_at_all(
    small_run: SmallRun, monkeypatch: pytest.MonkeyPatch, command: str, read: str
) -> None:
    """Up to its flow, which no server can begin here: each reading opens every source again."""
    reads = small_run.folder / "reads"
    reads.touch()

    def counted(*arguments: Any) -> DataFile:
        with reads.open("a") as file:
            file.write("x")
        return load_data_file(*arguments)

    monkeypatch.setattr("deepfloyd_core.preflight.load.load_data_file", counted)
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    name, *options = command.split()
    done = small_run.call_here(name, str(small_run.config), *options)
    assert done.returncode == 2 and "no Prefect server answers there" in done.stderr
    assert reads.read_text() == read


def test_text_is_printed_as_it_is_also_in_tables_and_after_a_label() -> None:
    printed = io.StringIO()
    terminal = console()
    terminal.file = printed
    table = Table(ODD)
    table.add_row(f"cell {ODD}")
    for each in (ODD, labelled("error", "bold red", ODD), table):
        terminal.print(each)
    assert printed.getvalue().count(ODD) == 4


def test_only_a_terminal_is_watched_whatever_rich_believes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A log of CI often has FORCE_COLOR, and keeps what is printed."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    terminal = console()
    terminal.file = io.StringIO()
    assert terminal.is_terminal and not is_watched(terminal)
    reader, writer = pty.openpty()
    with os.fdopen(writer, "w") as terminal.file:
        assert is_watched(terminal)
    os.close(reader)


def test_every_console_and_every_column_of_a_bar_is_one_without_markup() -> None:
    sources = [path for layer in ("flows", "tasks") for path in (ROOT / layer).glob("*.py")]
    makers = {path.name for path in sources if re.search(r"\bConsole\(|\(Console\)", path.read_text())}
    assert makers == {"terminal.py"}
    columns = re.findall(r"TextColumn\(.*?\)", (ROOT / "tasks" / "progress.py").read_text())
    assert columns and all("markup=False" in column for column in columns)
    assert not [path for path in sources if re.search(r"\[/?(bold|red|yellow|green|/\])", path.read_text())]


def test_measures_of_stage2_are_told_with_their_unit_and_which_way_is_better(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """On the terminal, and as the rows that the UI and the model card show."""
    of_way = {"consistency": 30.2, "detail_share": 0.03, "colour_shift": 0.2, "colour_spread": 0.1}
    figures = UpscalingFigures(
        noise_level=250, upscaled=dict.fromkeys(UPSCALED_BY, of_way), gain={"bicubic": {"consistency": (1.5,)}}
    )
    samples = SamplesSummary(samples=figures)
    (measured,) = samples.tables((1, 2))
    report.print_measures(Console(width=200), measured)
    printed = capsys.readouterr().out
    for words in ("PSNR of its downscale to the sample, dB, more is better", "levels of 255, less is better",
                  "neither way is better", "tuned over bicubic     consistency +1.50 dB"):  # fmt: skip
        assert words in printed, words
    shown = measure_words(measured)
    assert [row[0] for row in shown.rows] == list(UPSCALED_BY)
    assert shown.heads == (
        "upscaled by",
        *(f"{one.label}{', dB' if one.unit == 'dB' else ''}" for one in measures_against("sample")),
        "noise level",
    )
    assert shown.notes[0].startswith("tuned over bicubic: consistency +1.50 dB")
    assert any("levels of 255, less is better" in note for note in shown.notes)


def test_a_result_in_an_odd_folder_is_printed_as_it_is(
    tmp_path: Path, new_small_run: Callable[[Path], SmallRun]
) -> None:
    run = new_small_run(tmp_path / ODD)
    done = run.call_here("prepare", str(run.config), "--preview", "1")
    assert done.stdout == f"1 picture with its crop: {run.workspace / 'preview.png'}\n", done.stderr
    assert run.workspace.stat().st_mode & 0o777 == 0o700


def test_progress_is_one_line_of_the_log_where_no_bar_is_shown(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    for handlers in ([], [LogLines()]):
        for handler in handlers:
            logging.getLogger("tasks").addHandler(handler)
        try:
            with progress("stage I LoRA") as report:
                report(12, 12, "loss 0.1")
        finally:
            for handler in handlers:
                logging.getLogger("tasks").removeHandler(handler)
        assert capsys.readouterr().err.count("stage I LoRA 12/12") == len(handlers)
    assert caplog.messages == ["stage I LoRA 12/12  loss 0.1"] * 2


@pytest.mark.parametrize("stages", [(1,), (1, 2)])
def test_what_a_stage_cannot_use_of_the_accepted_pictures_is_told_and_shown(
    world: DataWorld, stages: tuple[Stage, ...], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name, edge in (("a", 300), ("b", 90), ("c", 91), ("d", 20)):
        world.add(f"{name}.png", np.random.default_rng(edge).integers(0, 256, (edge, edge, 3), np.uint8))
    index = world.index(world.load(stages=stages, max_rejected_share=0.9))
    pages: list[str] = []
    monkeypatch.setattr(artifact_page, "create_markdown_artifact", lambda page, **_: pages.append(page))
    with caplog.at_level(logging.INFO):
        ui_pages.show_index(index, index.summary(IndexSummary), stages, {})
    words, both = "Stage II cannot use 2 accepted pictures: 2 too_small", stages == (1, 2)
    assert (words in caplog.messages) == both
    rows = [line for line in pages[0].splitlines() if line.startswith("|")]
    assert rows[2:5] == ["| **accepted** |  | 3 |", "| rejected | too small | 1 |", "| **all files** |  | 4 |"]
    assert ("| accepted, not for Stage II | too small | 2 |" in rows) == both
    assert "- `d.png`: too small: 20x20 px, below minimum\\_image\\_size or the training size" in pages[0]
    assert str((index.path / "index.parquet").absolute()) in pages[0] and "Made in " in pages[0]


def test_a_terminal_says_what_is_waited_for_until_a_server_answers(small_run: SmallRun) -> None:
    ours, theirs = pty.openpty()
    command, nobody = small_run.command("prepare", str(small_run.config)), {"PREFECT_API_URL": "http://127.0.0.1:9/api"}
    done = subprocess.run(command, stderr=theirs, env=os.environ | nobody, cwd=small_run.folder, timeout=60)
    shown = os.read(ours, 1 << 16).decode()
    os.close(theirs)
    os.close(ours)
    assert done.returncode == 2
    assert shown.startswith("Prefect: joining a server, or starting one") and "no Prefect server answers" in shown


def test_a_page_names_the_file_of_each_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages: list[str] = []
    monkeypatch.setattr(artifact_page, "create_markdown_artifact", lambda page, **_: pages.append(page))
    names = ["picture-000-seed-7-64x64.png", "picture-001-seed-8-64x64.png"]
    for name in names:
        Image.fromarray(np.random.default_rng(3).integers(0, 256, (900, 900, 3), np.uint8)).save(tmp_path / name)
    monkeypatch.setattr(artifact_page, "tell", lambda *_: None)
    summary = GeneratedSummary(pictures=2, stages=(1,))
    artifact_page.show_artifact(Artifact("generated", "f", tmp_path), summary, *names, "not_there.png")
    titles = [line.strip("*").replace("\\", "") for line in pages[0].splitlines() if line.startswith("**")]
    assert titles == names and pages[0].count("](data:image/jpeg;base64,") == 2
    assert len(pages[0]) < 300_000 and f"in `{tmp_path}`" in pages[0]
    assert "|" not in pages[0], "no empty table"


def test_no_help_has_brackets_which_the_terminal_takes_for_styles() -> None:
    """`[stage3]` in a help text would be printed as nothing."""
    commands: dict[str, Any] = get_command(app).commands  # type: ignore[attr-defined]
    texts = [
        (name, text)
        for name, command in commands.items()
        for text in (command.help, *(getattr(param, "help", None) for param in command.params))
        if text
    ]
    assert len(texts) > 80 and not [(name, text) for name, text in texts if "[" in text]
