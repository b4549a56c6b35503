"""Measures how much detail a picture has inside its 8x8 px blocks, on a sample of the blocks; decodes no others.

Two figures, because detail does harm in two ways. Strong detail of any frequency can be clipped while it is downscaled.
Regular detail, at one frequency, can alias in a mean of 8 px: a slower pattern appears that the picture does not have.
"""

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from deepfloyd_core.pictures.faults import PIXEL_ERRORS
from deepfloyd_core.pictures.jpeg_scans import SAMPLE_ROWS, Layout, sample_jpegs

STRIPS, STRIP_PX = 16, (256, 16)  # of a decoded picture
_N = np.arange(8)
_DCT = np.sqrt(np.where(_N[:, None] == 0, 1, 2) / 8) * np.cos((2 * _N + 1) * _N[:, None] * np.pi / 16)
_DCT = _DCT.astype(np.float32)  # orthonormal
_REPEATED = [0, 2, 4, 6, 7]  # near a multiple of 1/8 of a pixel's frequency, which a mean of 8 px takes for 0
_COLOUR_WEIGHT = 3.0  # 1.77 squared: what the blue difference adds to blue (JFIF)
_SETTLED = 3  # a third of a strip of a JPEG's sample may be out of step


@dataclass(frozen=True)
class Detail:
    """Levels of 255, root mean square over blocks, of the strongest channel."""

    contrast: float  # within a block
    regular: float  # of one of the frequencies that a mean of 8 px can take for a slower one


def detail_of_jpeg(data: bytes, layout: Layout | None) -> Detail | None:
    """Measure a JPEG's detail on 12 strips of 256 px; None when its bytes are unusual."""
    samples = sample_jpegs(data, layout) if layout else None
    if not samples:
        return None
    power = np.zeros((8, 8))
    for component, sample in samples:
        try:
            pixels = np.asarray(Image.open(io.BytesIO(sample), formats=("JPEG",)))
        except PIXEL_ERRORS:
            return None
        pixels = pixels.reshape(*pixels.shape[:2], -1)
        first = pixels[: len(pixels) // SAMPLE_ROWS]
        settled = pixels[:, pixels.shape[1] // _SETTLED // 8 * 8 :]
        # The first strip is in step from its start, so it shows what never falls into step elsewhere: one block repeated.
        power += (_COLOUR_WEIGHT if component else 1) * max(_power(first), _power(settled), key=np.sum)
    return _detail(power)


def detail_of(picture: Image.Image | np.ndarray) -> Detail:
    """Measure the detail of a decoded picture, or of its pixels (H, W, 3), on 16 strips of 256x16 px, or as much as there
    is.
    """
    whole = picture.shape[1::-1] if isinstance(picture, np.ndarray) else picture.size
    width, height = (max(8, min(side, px) // 8 * 8) for side, px in zip(whole, STRIP_PX, strict=True))
    strips = []
    for number in range(STRIPS):
        left = (whole[0] - width) * (number * 7 % STRIPS) // (STRIPS - 1)
        top = (whole[1] - height) * number // (STRIPS - 1)
        if isinstance(picture, np.ndarray):
            strips.append(picture[top : top + height, left : left + width])
        else:
            strips.append(np.asarray(picture.crop((left, top, left + width, top + height))))
    return _detail(_power(np.concatenate(strips)))


def _power(pixels: np.ndarray) -> np.ndarray:
    """Mean power of each frequency of 8x8 px blocks, of the channel that has most; the means left out.

    pixels: uint8 (H, W, C), H and W multiples of 8 -> (8, 8), squared levels.
    """
    height, width, channels = pixels.shape
    down = _DCT @ pixels.reshape(height // 8, 8, width * channels).astype(np.float32)
    both = down.reshape(-1, 8 * channels) @ np.kron(_DCT, np.eye(channels, dtype=np.float32)).T
    power = np.square(both).reshape(height // 8, -1).sum(0).reshape(8, width // 8, 8, channels).sum(1)
    power[0, 0] = 0
    strongest: np.ndarray = power[..., power.sum((0, 1)).argmax()] / (height * width)
    return strongest


def _detail(power: np.ndarray) -> Detail:
    return Detail(float(np.sqrt(power.sum())), float(np.sqrt(power[_REPEATED][:, _REPEATED].max())))
