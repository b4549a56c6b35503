"""One upscaled picture and its reference. Values that several measures share are computed once for each picture."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F

from deepfloyd_core.config.stages import UPSCALE
from deepfloyd_core.diffusion.loss import low_res, to_bytes, to_model_range
from deepfloyd_core.measures.pixel import detail_energy


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture and its derived values, each computed at the first use."""

    pixels: np.ndarray  # uint8 (H, W, 3)

    @property
    def downscale(self) -> np.ndarray:
        """The picture downscaled by four, uint8 (H / 4, W / 4, 3)."""
        return self._filtered[0]

    @property
    def low_pass(self) -> np.ndarray:
        """The downscale, upscaled again, uint8 (H, W, 3)."""
        return self._filtered[1]

    @cached_property
    def detail(self) -> float:
        """`detail_energy` of the picture."""
        return detail_energy(self.pixels, self.low_pass)

    @cached_property
    def _filtered(self) -> tuple[np.ndarray, np.ndarray]:
        small = low_res(to_model_range(torch.from_numpy(self.pixels)[None]))
        return to_bytes(small)[0].numpy(), to_bytes(enlarged(small, "bicubic"))[0].numpy()


@dataclass(frozen=True, eq=False)
class Compared:
    """The argument of a measure of one picture."""

    picture: Picture
    reference: Picture  # the ground truth, of the picture's size; a sample of Stage I has none: the sample
    low_res: np.ndarray  # uint8 (H / 4, W / 4, 3): the ground truth's downscale, or the sample


def enlarged(small: torch.Tensor, method: str) -> torch.Tensor:
    """Upscale by interpolation, (N, C, h, w) in [-1, 1] -> (N, C, 4h, 4w). method: bilinear or bicubic."""
    size = (small.shape[-2] * UPSCALE, small.shape[-1] * UPSCALE)
    return F.interpolate(small, size, mode=method, align_corners=False).clamp(-1, 1)
