"""Back-projection: corrects each sampling step so that the picture's downscale is closer to the given low-res picture.

With few sampling steps the picture drifts away from the low-res picture: each step trusts the colours and edges of the
step before. So each step's estimate of the picture is corrected before the step continues from it: the difference
between the low-res picture and the estimate's downscale is upscaled and added (Irani and Peleg 1991). This is the
null-space sampling of Wang, Yu and Zhang 2022 (DDNM, eq. 13) with bicubic interpolation in place of the pseudo-inverse.
It helps any model, trained for it or not; it costs 2 ms a step of 256 px.
"""

import copy
from functools import partial
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F

from deepfloyd_core.diffusion.loss import estimate, low_res


def back_projected(pictures: torch.Tensor, small: torch.Tensor) -> torch.Tensor:
    """Pictures (B, C, H, W) in [-1, 1], corrected towards their low-res pictures (B, C, h, w): the difference between
    `small` and their downscale is upscaled bicubically and added. Detail beyond the low-res size stays.
    """
    # antialias changes nothing in enlarging but Keys' a from -0.75 to -0.5: Pillow's BICUBIC, as in `low_res`.
    lacks = small - low_res(pictures)
    enlarged = F.interpolate(lacks, pictures.shape[-2:], mode="bicubic", align_corners=False, antialias=True)
    return (pictures + enlarged).clamp(-1, 1)


def back_projecting(scheduler: Any, small: torch.Tensor) -> Any:
    """A copy of a diffusers scheduler for one call of a stock pipeline: the picture of every step is back-projected.

    small: the low-res pictures (B, C, h, w) in [-1, 1] of that call, one for each picture. The scheduler's model
    predicts epsilon; its other output channels pass through.
    """
    wrapped = copy.copy(scheduler)
    wrapped.step = partial(_step, wrapped, small)
    return wrapped


def _step(
    scheduler: Any, small: torch.Tensor, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor,
    generator: Any = None, return_dict: bool = True,
) -> Any:  # fmt: skip
    """`scheduler.step`. Its parameters have the same names, because pipelines inspect the names."""
    channels = sample.shape[1]
    alpha_bar = scheduler.alphas_cumprod[int(timestep)].to(sample.device)
    x_t, eps = sample.float(), model_output[:, :channels].float()
    x_0 = back_projected(estimate(x_t, eps, alpha_bar), small.to(x_t))
    eps = (x_t - alpha_bar.sqrt() * x_0) / (1 - alpha_bar).sqrt()
    model_output = torch.cat([eps.to(model_output.dtype), model_output[:, channels:]], dim=1)
    step = type(scheduler).step
    noise = {"generator": generator} if "generator" in signature(step).parameters else {}
    return step(scheduler, model_output, timestep, sample, **noise, return_dict=return_dict)
