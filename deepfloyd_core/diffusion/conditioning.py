"""The conditioning picture of a ControlNet.

It is computed from the picture itself (its edges, its luma, or its colours without detail), or is another picture as it
is.
"""

from typing import get_args

import numpy as np
import torch
from PIL import Image

from deepfloyd_core.diffusion.loss import low_res, to_bytes
from deepfloyd_core.types import MadeConditioning

CANNY_SIGMA = 1.0  # px, of the blur before the edges are looked for


def conditioning_picture(kind: MadeConditioning, pictures: torch.Tensor) -> torch.Tensor:
    """The conditioning of pictures (B, 3, H, W) in [-1, 1]: float32 (B, 3, H, W) in [0, 1], on the CPU.

    `canny`: white edges one pixel wide on black (scikit-image's `feature.canny`). `grayscale`: luma as in Pillow's "L".
    `low_res`: downscaled 4 times and upscaled bilinearly, which leaves colours and shapes. Raises ValueError for
    `paired`, which is not computed: use `as_conditioning` of the pair.
    """
    if kind not in get_args(MadeConditioning):
        raise ValueError(
            f"{kind!r} conditioning is not computed from a picture; use as_conditioning of the conditioning picture."
        )
    pictures = pictures.detach().float().cpu()
    if kind == "low_res":
        small = torch.nn.functional.interpolate(low_res(pictures), pictures.shape[2:], mode="bilinear")
        return (small / 2 + 0.5).clamp(0, 1)
    made = np.stack([_luma(array) if kind == "grayscale" else _edges(array) for array in to_bytes(pictures).numpy()])
    return torch.from_numpy(made)[:, None].expand(-1, 3, -1, -1).contiguous()


def as_conditioning(pixels: torch.Tensor) -> torch.Tensor:
    """Pairs as conditioning, unchanged: uint8 (B, H, W, 3) -> float32 (B, 3, H, W) in [0, 1]."""
    return pixels.permute(0, 3, 1, 2).float() / 255


def _luma(array: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(array).convert("L"), np.float32) / 255


def _edges(array: np.ndarray) -> np.ndarray:
    from skimage.feature import canny

    return np.asarray(canny(_luma(array), CANNY_SIGMA), np.float32)
