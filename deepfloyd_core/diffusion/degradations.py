"""Degrades Stage II's low-res pictures in training, like files from elsewhere: blur, then noise, then JPEG.

A model trained on clean downscales alone takes a picture's faults for detail, and sharpens them. Off unless a key asks
for it. JPEG costs 0.3 ms for a picture of 64 px, the others almost nothing.
"""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from deepfloyd_core.config.stage import StageConfig
from deepfloyd_core.config.stages import UPSCALE
from deepfloyd_core.diffusion.loss import to_bytes, to_model_range
from deepfloyd_core.hashing import hash_seed


@dataclass(frozen=True)
class Degradation:
    """The degradation of each of B low-res pictures."""

    blur: torch.Tensor  # float32 (B,), standard deviation of a Gaussian in low-res px; 0: none
    noise: torch.Tensor  # float32 (B, C, h, w), in levels of 255
    quality: torch.Tensor  # int64 (B,), JPEG's, 1 to 100; 0: no JPEG


def draw_degradation(shape: torch.Size, config: StageConfig, seed: int, number: int) -> Degradation | None:
    """Draw for forward pass `number`; shape: (B, C, H, W) of the full-size pictures. None if all options are off.

    Blur and noise are drawn uniformly from 0 to the stage's maximum, JPEG's quality from its minimum to 100, each from
    its own generator. Samples that `low_res_degraded_share` leaves out get none of the three.
    """
    if not config.degrades_low_res:
        return None
    size, (height, width) = shape[0], (edge // UPSCALE for edge in shape[-2:])
    taken = torch.rand(size, generator=_generator("share", seed, number)) < config.low_res_degraded_share
    blur = config.low_res_blur * torch.rand(size, generator=_generator("blur", seed, number))
    generator = _generator("noise", seed, number)
    deviation = config.low_res_noise * torch.rand((size, 1, 1, 1), generator=generator)
    noise = deviation * torch.randn((size, shape[1], height, width), generator=generator)
    quality = torch.zeros(size, dtype=torch.int64)
    if config.low_res_jpeg_quality is not None:
        lowest = config.low_res_jpeg_quality
        quality = torch.randint(lowest, 101, (size,), generator=_generator("jpeg", seed, number))
    return Degradation(blur * taken, noise * taken.reshape(-1, 1, 1, 1), quality * taken)


def degrade(small: torch.Tensor, how: Degradation) -> torch.Tensor:
    """Low-res pictures (B, C, h, w) in [-1, 1] -> the same, degraded."""
    if how.blur.any():
        small = blurred(small, how.blur)
    if how.noise.any():
        small = (small + how.noise / 127.5).clamp(-1, 1)
    pairs = zip(small.unsqueeze(1), how.quality.tolist(), strict=True)
    return torch.cat([through_jpeg(picture, quality) if quality else picture for picture, quality in pairs])


def spoilt(config: StageConfig, image_ids: Sequence[str], small: torch.Tensor) -> torch.Tensor:
    """Held-out low-res pictures (N, C, h, w) in [-1, 1], each degraded by its own draw, the same in every run.

    Drawn as in training, except for `low_res_degraded_share`: all are degraded.
    """
    config = config.model_copy(update={"low_res_degraded_share": 1.0})
    full = torch.Size((1, small.shape[1], small.shape[2] * UPSCALE, small.shape[3] * UPSCALE))

    def made(image_id: str, picture: torch.Tensor) -> torch.Tensor:
        how = draw_degradation(full, config, hash_seed("eval", image_id), 0)
        assert how is not None  # otherwise there is no degradation to apply
        return degrade(picture[None], how)

    return torch.cat([made(*pair) for pair in zip(image_ids, small, strict=True)])


def blurred(pictures: torch.Tensor, deviation: torch.Tensor) -> torch.Tensor:
    """A Gaussian blur for each picture, cut off at three times the largest deviation; edges are padded with their last
    pixels.

    pictures: (B, C, H, W); deviation: (B,) in px, 0 leaves a picture unchanged.
    """
    radius = max(1, math.ceil(3 * float(deviation.max())))
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (offsets / deviation.clamp(min=1e-3).unsqueeze(1)).square())
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(pictures.shape[1], 0)  # one for each channel
    flat = F.pad(pictures, (radius,) * 4, mode="replicate").flatten(0, 1).unsqueeze(0)
    for shape in ((-1, 1, 1, 2 * radius + 1), (-1, 1, 2 * radius + 1, 1)):
        flat = F.conv2d(flat, kernel.reshape(shape), groups=len(kernel))
    return flat.reshape(pictures.shape)


def through_jpeg(picture: torch.Tensor, quality: int) -> torch.Tensor:
    """A picture (1, C, h, w) in [-1, 1], rounded to bytes, after Pillow's JPEG of a quality (1 to 100)."""
    buffer = io.BytesIO()
    Image.fromarray(to_bytes(picture)[0].numpy()).save(buffer, "JPEG", quality=quality)
    return to_model_range(torch.from_numpy(np.array(Image.open(buffer)))[None])


def _generator(purpose: str, seed: int, number: int) -> torch.Generator:
    return torch.Generator().manual_seed(hash_seed(f"low-res {purpose}", seed, number))
