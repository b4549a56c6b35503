"""Plots and sheets for the eye."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage import measure

from deepfloyd_core.pictures.sheets import save_loss_curve

BLUE = np.array([0x1F, 0x4E, 0x99])


@pytest.mark.parametrize("held_out", [[], [(0, 0.04), (1, 0.035)]])
@pytest.mark.parametrize("losses", [[0.03], [0.03, 0.02], [0.03, 0.05, 0.02, 0.04, 0.01], [0.0]])
def test_each_loss_of_a_few_steps_is_a_point_to_see(
    losses: list[float], held_out: list[tuple[int, float]], tmp_path: Path
) -> None:
    save_loss_curve(losses, "", tmp_path / "loss.png", held_out)
    picture = np.asarray(Image.open(tmp_path / "loss.png").convert("RGB"), int)
    blue = measure.label(np.abs(picture - BLUE).max(-1) < 30)
    assert blue.max() >= 2, "the points, and the line of the legend"
