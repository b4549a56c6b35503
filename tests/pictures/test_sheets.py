"""Plots and sheets for the eye."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage import measure
from small_disk import PAGE, small_disk

from deepfloyd_core.pictures.sheets import save_loss_curve, save_picture

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


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_a_picture_for_which_the_disk_has_half_the_room_is_an_error_and_no_half_picture(
    suffix: str, tmp_path: Path
) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (200, 200, 3), np.uint8))
    with small_disk(tmp_path / "small", 4 * PAGE) as disk:
        with pytest.raises(OSError, match=f"{disk.folder}/sheet.{suffix}"):
            save_picture(noise, disk.folder / f"sheet.{suffix}")
        assert not list(disk.folder.iterdir())
