"""The command behind `make attack`."""

import runpy
import sys
from pathlib import Path

import pytest
import running
from rows import Row

COMMAND = runpy.run_path(str(Path(running.__file__).with_name("__main__.py")), run_name="attack")


@pytest.fixture
def campaigns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of two campaigns, of which one breaks."""
    whole = "from rows import Row\nSHARE = 3\n\n\ndef attack(seconds, seed, folder):\n"
    (tmp_path / "even.py").write_text(f"{whole}    return [Row('even', int(seconds), 0, [])]\n")
    (tmp_path / "odd.py").write_text("def attack(seconds, seed, folder):\n    raise ValueError('odd')\n")
    (tmp_path / "helper.py").write_text("def other() -> None: ...\n")
    monkeypatch.setattr(running, "HERE", tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_each_campaign_gets_its_share_of_the_time_and_one_that_breaks_is_a_failure(campaigns: Path) -> None:
    assert running.campaigns() == {"even": 3, "odd": 1}
    (campaigns / "left").mkdir()
    rows = [row for name in running.campaigns() for row in running.run_one(name, 12, 1, campaigns / "left" / name)]
    assert rows[0] == Row("even", 12, 0, [])
    assert (rows[1].tried, rows[1].failed) == (1, 1) and "ValueError: odd" in rows[1].failures[0]


def test_the_command_finds_the_campaigns_of_this_folder() -> None:
    assert {"fuzz": 2, "kills": 3}.items() <= running.campaigns().items()


def test_the_table_goes_between_the_markers_and_nothing_else_changes(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- make attack: begin -->\nold\n<!-- make attack: end -->\nb\n")
    text = COMMAND["table"]([Row("x", 1200, 0, []), Row("y", 3, 1, ["z"])])
    COMMAND["write_table"](page, text)
    lines = page.read_text().splitlines()
    assert lines[0] == "a" and lines[-1] == "b" and "old" not in lines
    assert "| x | 1,200 | 0 |" in lines and "| **all** | 1,203 | 1 |" in lines


def test_a_failure_is_the_exit_code_and_keeps_the_inputs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main = COMMAND["main"]
    for failed in (0, 1):
        rows = [Row("x", 1, failed, ["how"][:failed])]
        monkeypatch.setitem(main.__globals__, "run_all", lambda *_, rows=rows: rows)
        assert main(["1"]) == failed
    told = capsys.readouterr()
    kept = Path(told.err.rsplit(" ", 1)[1].strip())
    assert "x: how" in told.err and kept.is_dir() and sys.argv
    kept.rmdir()
