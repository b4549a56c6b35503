"""What a ControlNet follows, made of the picture itself: its edges, its light and dark, or its colours without detail."""

import numpy as np
import torch
from PIL import Image

from deepfloyd_core.objective import low_res, to_bytes
from deepfloyd_core.types import Conditioning

CANNY_SIGMA = 1.0  # px, of the blur before the edges are looked for


def conditioning_picture(kind: Conditioning, pictures: torch.Tensor) -> torch.Tensor:
    """What to follow for pictures (B, 3, H, W) in [-1, 1]: float32 (B, 3, H, W) in [0, 1], on the CPU.

    `canny`: white edges one pixel wide on black (scikit-image's `feature.canny`). `grayscale`: luma as Pillow's "L" has
    it. `low_res`: downscaled 4 times and bilinearly enlarged, which leaves colours and shapes.
    """
    pictures = pictures.detach().float().cpu()
    if kind == "low_res":
        small = torch.nn.functional.interpolate(low_res(pictures), pictures.shape[2:], mode="bilinear")
        return (small / 2 + 0.5).clamp(0, 1)
    made = np.stack([_luma(array) if kind == "grayscale" else _edges(array) for array in to_bytes(pictures).numpy()])
    return torch.from_numpy(made)[:, None].expand(-1, 3, -1, -1).contiguous()


def _luma(array: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(array).convert("L"), np.float32) / 255


def _edges(array: np.ndarray) -> np.ndarray:
    from skimage.feature import canny

    return np.asarray(canny(_luma(array), CANNY_SIGMA), np.float32)  # type: ignore[no-untyped-call]
