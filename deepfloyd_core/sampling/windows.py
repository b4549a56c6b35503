"""A UNet for pictures of any size.

In each step the UNet looks through windows that overlap, and their outputs are averaged: so all windows share one noise and
one picture, and no border between them shows (MultiDiffusion: Bar-Tal et al. 2023, eq. 5, with weights that fall off towards
a window's edges).
"""

import math
from typing import Any

import torch

from deepfloyd_core.sampling.wrapped_unet import WrappedUnet

WINDOW_PX, OVERLAP_PX = 256, 64  # of the picture that is made; a window is what the stage was trained at
_UNIT_PX = 32  # to which windows are aligned: the UNet halves so often


class WindowedUnet(WrappedUnet):
    """Takes the place of a pipeline's UNet."""

    def __init__(self, unet: Any, window_px: int = WINDOW_PX, overlap_px: int = OVERLAP_PX) -> None:
        super().__init__(unet)
        self._window, self._overlap = window_px, overlap_px

    def forward(self, sample: torch.Tensor, *arguments: Any, **named: Any) -> Any:
        """sample (B, C, H, W), of any H and W that divide by 32; the rest as for the UNet."""
        height, width = sample.shape[2:]
        if max(height, width) <= self._window:
            return self.unet(sample, *arguments, **named)
        total, weights = None, sample.new_zeros(1, 1, height, width, dtype=torch.float32)
        for top, tall in windows(height, self._window, self._overlap):
            for left, wide in windows(width, self._window, self._overlap):
                part = sample[:, :, top : top + tall, left : left + wide]
                made = self.unet(part, *arguments, **{**named, "return_dict": False})[0]
                fall = (_fall_off(tall, self._overlap)[:, None] * _fall_off(wide, self._overlap)[None]).to(made.device)
                if total is None:
                    total = made.new_zeros(made.shape[0], made.shape[1], height, width, dtype=torch.float32)
                total[:, :, top : top + tall, left : left + wide] += made.float() * fall
                weights[:, :, top : top + tall, left : left + wide] += fall
        assert total is not None
        return (total.div_(weights).to(sample.dtype),)


def windows(length: int, window: int, overlap: int) -> list[tuple[int, int]]:
    """Start and length of windows that cover an edge, px: as few as overlap by at least `overlap`, evenly spread."""
    if length <= window:
        return [(0, length)]
    count = math.ceil((length - overlap) / (window - overlap))
    last = length - window
    starts = [round(last * number / (count - 1) / _UNIT_PX) * _UNIT_PX for number in range(count - 1)]
    return [(start, window) for start in dict.fromkeys([*starts, last])]


def _fall_off(length: int, overlap: int) -> torch.Tensor:
    """Weights along an edge: 1 inside, a raised cosine towards the ends, nowhere 0."""
    ramp = 0.5 - 0.5 * torch.cos(torch.pi * (torch.arange(length) + 0.5) / overlap)
    rising = torch.where(torch.arange(length) < overlap, ramp, torch.ones(length))
    return torch.minimum(rising, rising.flip(0))
