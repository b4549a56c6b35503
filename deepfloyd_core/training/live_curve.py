"""The loss curve of a training that is under way: for people who look at it before it has ended.

It is drawn after ten seconds and then whenever a tenth of the time has passed, so it costs a few percent of a short
training, and a few seconds an hour.
"""

import time
from pathlib import Path

from deepfloyd_core.config.stages import STAGES, Stage
from deepfloyd_core.pictures.sheets import save_loss_curve
from deepfloyd_core.training.checkpoints import StepMetrics
from deepfloyd_core.training.jobs import LOSS_CURVE
from deepfloyd_core.training.previews import PREVIEWS
from deepfloyd_core.training.validation import held_out_losses

FIRST_S, SHARE = 10.0, 0.1


class LiveCurve:
    """Draws the losses of the steps so far among the previews."""

    def __init__(self, stage: Stage, out: Path) -> None:
        self._stage, self._out = stage, out
        self._began = self._drawn = time.monotonic()

    def step(self, metrics: list[StepMetrics]) -> None:
        """A step has ended; metrics: of all."""
        now = time.monotonic()
        if now - self._drawn >= max(FIRST_S, SHARE * (now - self._began)):
            _draw(metrics, self._stage, self._out)
            self._drawn = time.monotonic()


def show_at_end(metrics: list[StepMetrics], stage: Stage, out: Path) -> None:
    """Draw the whole curve, if there are previews. Unlike the training's own it has the held-out losses of these."""
    if (out / PREVIEWS).exists():
        _draw(metrics, stage, out)


def save_curve(metrics: list[StepMetrics], stage: Stage, folder: Path, validated: list[tuple[int, float]]) -> None:
    """Draw the losses of the steps, and the held-out ones of validated steps."""
    save_loss_curve(
        [row.loss for row in metrics], f"{STAGES[stage].title} training loss", folder / LOSS_CURVE, validated
    )


def _draw(metrics: list[StepMetrics], stage: Stage, out: Path) -> None:
    folder = out / PREVIEWS
    folder.mkdir(exist_ok=True)
    save_curve(metrics, stage, folder, sorted(held_out_losses(out) + held_out_losses(folder)))
