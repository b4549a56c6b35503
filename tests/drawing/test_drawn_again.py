"""A picture that is drawn again, by its record: what is said of it is what was done."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from draws_here import draw_in_this_process
from PIL import Image
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


def test_what_is_other_than_the_last_pictures_is_told_by_the_options_of_the_command(
    small_run: SmallRun, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    draw_in_this_process(monkeypatch)
    folder, lines = small_run.folder, list[str]()
    for name, shade in (("image", 90), ("other", 200), ("mask", 255)):
        Image.new("L", (64, 64), shade).convert("RGB").save(folder / f"{name}.png")
    varied: dict[str, Any] = {"image": folder / "image.png", "strength": 0.6}
    for changed in (
        {}, varied, {**varied, "strength": 1.0}, {**varied, "image": folder / "other.png", "strength": 1.0},
        {**varied, "mask": folder / "mask.png"}, {**varied, "style": "in oil"}, {"prompts": ("a star",)},
    ):  # fmt: skip
        caplog.clear()
        with caplog.at_level("INFO"):
            generate(
                small_run.config, GenerateOptions(**{"prompts": ("x",), "version": "base", "stages": "1", **changed})
            )
        lines += [line.partition(": ")[2] for line in caplog.messages if ": other than the last ones: " in line]
    assert lines == [
        f"other than the last ones: {words}"
        for words in (
            "--image added", "--strength 0.6 -> 1", "--image changed",
            "--image changed; --mask added; --strength 1 -> 0.6", "--mask removed; --style added",
            "other pictures are asked for; --image removed; --style removed",
        )
    ]  # fmt: skip
