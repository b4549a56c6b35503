"""A picture that is drawn again, by its record: what is said of it is what was done."""

import shutil
from pathlib import Path

import pytest
from draws_here import draw_in_this_process
from small_run import SmallRun

from deepfloyd_core.api import GenerateOptions, generate
from deepfloyd_core.preflight.generate import recorded_options


def drawn_again(run: SmallRun, picture: Path) -> Path:
    """The picture that its record makes."""
    options, keys = recorded_options(GenerateOptions(), picture)
    (file,) = generate(run.config, options, keys)
    return file


def test_a_copy_of_what_is_kept_is_compared_and_else_it_is_drawn(
    small_run: SmallRun, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    requests = draw_in_this_process(monkeypatch)
    (made,) = generate(small_run.config, GenerateOptions(("a red circle",), "base", stages="1"))
    copy = Path(shutil.copy(made, small_run.folder / "copy.png"))
    assert drawn_again(small_run, copy) == made and len(requests) == 1
    compared = f"{copy} was not drawn again, but compared with {made}, which the same record has drawn before: "
    assert caplog.messages[-1] == f"{compared}every byte is equal"
    copy.write_bytes(copy.read_bytes() + b" ")
    drawn_again(small_run, copy)
    assert caplog.messages[-1].startswith(f"{compared}it has other bytes") and len(requests) == 1
    shutil.copy(made, copy)
    shutil.rmtree(made.parent)
    assert drawn_again(small_run, copy).read_bytes() == copy.read_bytes() and len(requests) == 2
    assert caplog.messages[-1] == f"{copy} was drawn again: every byte is equal"
    drawn_again(small_run, made)
    assert "there is nothing to draw again" in caplog.messages[-1]
