"""The held-out loss is told alike on the terminal and in the log."""

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from deepfloyd_core.store.artifacts import Artifact
from deepfloyd_core.training.jobs import TrainingSummary
from flows.commands import report
from tasks import endings

MADE: dict[str, Any] = {
    "rows": 20, "trainable_parameters": 1, "frozen_parameters": 1, "frozen_bytes": 1, "first_loss": 0.5, "last_loss": 0.25,
    "buckets": (), "reload_difference": 0.0, "steps_of_this_process": 9,
}  # fmt: skip


def test_a_fall_is_negative_its_interval_ascends_and_the_log_says_what_the_terminal_says(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    training = TrainingSummary(
        **MADE, steps=9, pictures=20, eval_loss_base=0.51234, eval_loss=0.41239, eval_gain=(0.0999, 0.05, 0.15),
        eval_loss_parent=0.40004, eval_gain_on_parent=(-0.01235,), eval_by_t={1: (0.5, 0.4), 999: (0.1, 0.2)},
    )  # fmt: skip
    report.print_losses(Console(width=200), 1, training.changes)
    assert capsys.readouterr().out.splitlines() == [
        "stage I held-out loss  0.5123 -> 0.4124, -0.0999 (-0.1500 to -0.0500, 95 %)",
        "stage I from its parent 0.4000 -> 0.4124, +0.0123",
    ]
    (line,) = endings.ending(Artifact("stage1_lora", "0" * 16, tmp_path), training)
    assert line == "Stage I LoRA: 9 steps on 20 pictures, loss on held-out pictures 0.5123 -> 0.4124"
    assert training.by_timestep == [{"t": 1, "base": 0.5, "tuned": 0.4}, {"t": 999, "base": 0.1, "tuned": 0.2}]


def test_without_held_out_pictures_nothing_is_told(tmp_path: Path) -> None:
    training = TrainingSummary(**MADE, steps=1, pictures=1)
    assert training.changes == [] and training.by_timestep == []
    (line,) = endings.ending(Artifact("stage2_lora", "0" * 16, tmp_path), training)
    assert line == "Stage II LoRA: 1 step on 1 picture"
