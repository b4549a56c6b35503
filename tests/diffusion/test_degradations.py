"""Degradations of Stage II's low-res pictures, each against a second computation; off, they change no byte."""

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

from deepfloyd_core.config.stage import StageConfig
from deepfloyd_core.diffusion.degradations import blurred, degrade, draw_degradation, spoilt
from deepfloyd_core.diffusion.loss import to_bytes, to_model_range
from deepfloyd_core.training.batches import Draws, draw
from deepfloyd_core.training.draws import vary

SHAPE = torch.Size((40, 3, 32, 48))
SMALL = to_model_range(torch.from_numpy(np.stack([data.astronaut()[n : n + 8, 150:162] for n in range(40)])))


def stage2(**keys: Any) -> StageConfig:
    return StageConfig.model_validate({"model_flavour": "tiny-ii", "mixed_precision": "no", **keys})


def varied(config: StageConfig, number: int = 0) -> Draws:
    return vary(draw(SHAPE, 1, number, 0.1), config, 1, number)


def test_off_nothing_is_drawn() -> None:
    assert draw_degradation(SHAPE, stage2(), 1, 0) is None
    assert varied(stage2()).degradation is None


@pytest.mark.parametrize("deviation", [0.3, 1.0, 2.5])
def test_blur_is_a_gaussian_in_float64(deviation: float) -> None:
    picture = data.astronaut()[:20, :24].astype(np.float64) / 127.5 - 1
    radius = int(np.ceil(3 * deviation))
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / deviation) ** 2)
    expected = np.pad(picture, ((radius,) * 2, (radius,) * 2, (0, 0)), mode="edge")
    for axis in (0, 1):
        expected = np.apply_along_axis(np.convolve, axis, expected, kernel / kernel.sum(), "valid")
    tensor = torch.tensor(picture, dtype=torch.float32).permute(2, 0, 1).repeat(2, 1, 1, 1)
    got = blurred(tensor, torch.tensor([deviation, 0.0]))
    assert got[0].permute(1, 2, 0).numpy() == pytest.approx(expected, abs=1e-5)
    assert torch.allclose(got[1], tensor[1], atol=1e-6), "a deviation of 0 leaves a picture as it is"


def test_each_picture_passes_through_pillows_jpeg_of_its_quality() -> None:
    config = stage2(low_res_jpeg_quality=30)
    how = varied(config).degradation
    assert how is not None and 30 <= int(how.quality.min()) < 45 and 85 < int(how.quality.max()) <= 100
    got = to_bytes(degrade(SMALL, how)).numpy()
    for picture, quality, found in zip(to_bytes(SMALL).numpy(), how.quality.tolist(), got, strict=True):
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "JPEG", quality=quality)
        assert (found == np.asarray(Image.open(buffer))).all()


def test_noise_is_added_in_levels_of_255_of_a_deviation_up_to_the_asked_one() -> None:
    how = varied(stage2(low_res_noise=20.0)).degradation
    assert how is not None and how.noise.shape == SMALL.shape
    spread = how.noise.std((1, 2, 3)).numpy()
    assert spread.max() < 23 and spread.min() < 2 and spread.mean() == pytest.approx(10, abs=3)
    grey = torch.full_like(SMALL, to_model_range(torch.full((1, 1, 1, 3), 128, dtype=torch.uint8)).flatten()[0].item())
    added = to_bytes(degrade(grey, how)).numpy().transpose(0, 3, 1, 2).astype(float) - 128
    assert added == pytest.approx(how.noise.numpy(), abs=0.51)


def test_the_share_alone_is_degraded() -> None:
    config = stage2(low_res_blur=2.0, low_res_noise=9.0, low_res_jpeg_quality=20, low_res_degraded_share=0.25)
    counts = 0
    for number in range(10):
        how = varied(config, number).degradation
        assert how is not None
        taken = how.quality > 0
        assert torch.equal(taken, how.blur > 0) and torch.equal(taken, how.noise.abs().amax((1, 2, 3)) > 0)
        assert torch.allclose(degrade(SMALL, how)[~taken], SMALL[~taken], atol=1e-6)
        counts += int(taken.sum())
    assert 65 <= counts <= 135  # of 400


def test_degradations_repeat_themselves_and_leave_all_other_draws_alone() -> None:
    config = stage2(low_res_blur=1.0, low_res_noise=9.0, low_res_jpeg_quality=20)
    one, two, other, plain = varied(config, 3), varied(config, 3), varied(config, 4), varied(stage2(), 3)
    assert one.degradation is not None and two.degradation is not None and other.degradation is not None
    for name in ("blur", "noise", "quality"):
        mine = getattr(one.degradation, name)
        assert torch.equal(mine, getattr(two.degradation, name))
        assert not torch.equal(mine, getattr(other.degradation, name))
        assert not torch.equal(mine, getattr(vary(plain, config, 2, 3).degradation, name)), "another seed"
    for name in ("noise", "low_res_noise", "t", "level", "keep_caption", "mirror"):
        assert torch.equal(getattr(one, name), getattr(plain, name))
    more = varied(stage2(low_res_blur=1.0), 3).degradation
    assert more is not None and torch.equal(more.blur, one.degradation.blur), "each has a generator of its own"


def test_a_held_out_picture_is_spoilt_alike_whatever_it_is_measured_with() -> None:
    """And all are, whatever the share; the next picture otherwise; noise is as strong as it may be."""
    config = stage2(low_res_noise=20.0, low_res_degraded_share=0.01)
    names = [f"picture {number}" for number in range(40)]
    assert not spoilt(config, names[:1], SMALL[:1]).equal(SMALL[:1])
    all_of_them, backwards = spoilt(config, names, SMALL), spoilt(config, names[::-1], SMALL.flip(0))
    assert torch.equal(all_of_them, backwards.flip(0)) and torch.equal(
        all_of_them[7:8], spoilt(config, names[7:8], SMALL[7:8])
    )
    grey = torch.zeros_like(SMALL)
    spread = 127.5 * spoilt(config, names, grey).std((1, 2, 3)).numpy()
    assert spread.min() > 0 and spread.max() < 23 and spread.mean() == pytest.approx(10, abs=3)
