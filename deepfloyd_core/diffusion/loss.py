"""The UNets' training losses and inputs: pure tensor functions; noise, time and noise level are arguments.

Stage I predicts the noise of q(x_t | x_0) (Ho et al. 2020, eq. 4 and 14). Stage II does the same, with the low-res
picture concatenated to x_t: upsampled, with noise at a level of its own, and this level as class label (Ho et al. 2022,
cascaded diffusion; the inputs of `IFSuperResolutionPipeline`). The loss of the learned-variance half is in
`variance.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler

from deepfloyd_core.config.stages import UPSCALE

CONTROL_IMAGE = "control_image"  # among the cross_attention_kwargs of a UNet with a ControlNet


@dataclass(frozen=True)
class Text:
    """B texts as a UNet takes them: for a stock UNet T5's hidden states alone, for a ProjectedUNet its text modules'
    outputs.
    """

    rows: torch.Tensor  # (B, T, D), or projected (B, T, C), C = width of the cross-attention
    pooled: torch.Tensor | None = None  # (B, E), E = width of the time embedding

    def to(self, device: torch.device, dtype: torch.dtype) -> "Text":
        """On a device; hidden states in a dtype, pooled vectors in their own."""
        return Text(self.rows.to(device, dtype), None if self.pooled is None else self.pooled.to(device))


def to_model_range(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 (B, H, W, C), 0 to 255 -> float32 (B, C, H, W) in [-1, 1]."""
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def to_bytes(pictures: torch.Tensor) -> torch.Tensor:
    """float (B, C, H, W) in [-1, 1] -> uint8 (B, H, W, C), rounded and clipped."""
    return ((pictures.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)


def low_res(pictures: torch.Tensor) -> torch.Tensor:
    """The antialiased 4x downscale that Stage II is conditioned on: (B, C, H, W) -> (B, C, H/4, W/4), in [-1, 1].

    Bicubic with antialiasing; equals Pillow's BICUBIC `resize` to within its 8-bit rounding.
    """
    size = (pictures.shape[-2] // UPSCALE, pictures.shape[-1] // UPSCALE)
    return F.interpolate(pictures, size=size, mode="bicubic", align_corners=False, antialias=True).clamp(-1, 1)


def upscaled_input(
    small: torch.Tensor, noise: torch.Tensor, level: torch.Tensor, noising: DDPMScheduler
) -> torch.Tensor:
    """The second half of Stage II's input, bit for bit as `IFSuperResolutionPipeline.__call__` makes it.

    small: (B, C, h, w) in [-1, 1]; noise: (B, C, H, W); level: int64 (B,), 0 to 999. Returns (B, C, H, W).
    """
    upscaled = F.interpolate(small, noise.shape[-2:], mode="bilinear", align_corners=True)
    return torch.as_tensor(noising.add_noise(upscaled, noise, timesteps=level))


def min_snr_weight(alpha_bar: torch.Tensor, gamma: float | None) -> torch.Tensor:
    """Weight of each sample's epsilon loss, min(SNR, gamma) / SNR (Hang et al. 2023, eq. 6). alpha_bar: (B,)."""
    if gamma is None:
        return torch.ones_like(alpha_bar)
    snr = alpha_bar / (1 - alpha_bar)
    return snr.clamp(max=gamma) / snr


def soft_min_snr_weight(alpha_bar: torch.Tensor, sigma_data: float) -> torch.Tensor:
    """Weight of each sample's epsilon loss, gamma / (SNR + gamma) with gamma = 1 / sigma_data^2. alpha_bar: (B,).

    Crowson et al. 2024 (HDiT) weigh the loss on x_0 by SNR gamma / (SNR + gamma), smooth where min(SNR, gamma) has a kink;
    for their sigma_data = 0.5 gamma is 4. In epsilon that is divided by SNR.
    """
    gamma = sigma_data**-2
    return gamma / (alpha_bar / (1 - alpha_bar) + gamma)


def predict(
    unet: Callable[..., Any], x: torch.Tensor, t: torch.Tensor, text: Text, level: torch.Tensor | None,
    control: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Both halves of the UNet's output: epsilon, and the raw values of the log variance; each (B, 3, H, W).

    x: (B, 3 or 6, H, W); level: Stage II's class label; control: a ControlNet's conditioning, (B, 3, H, W) in [0, 1].
    """
    words = {
        "encoder_hidden_states": text.rows,
        "added_cond_kwargs": {"pooled": text.pooled},  # a stock UNet makes its own of the rows
        "cross_attention_kwargs": None if control is None else {CONTROL_IMAGE: control},
    }
    out = unet(x, t, class_labels=level, return_dict=False, **words)[0]
    eps, raw = out.chunk(2, dim=1)
    return torch.as_tensor(eps), torch.as_tensor(raw)


def estimate(x_t: torch.Tensor, eps: torch.Tensor, alpha_bar: torch.Tensor) -> torch.Tensor:
    """The estimate of x_0 from x_t and the predicted noise (Ho et al. 2020, eq. 15), clipped to [-1, 1].

    x_t, eps: (B, C, H, W); alpha_bar: of one timestep, or (B, 1, 1, 1).
    """
    return ((x_t - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()).clamp(-1, 1)


def squared_error(eps: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Mean squared error of each sample: float32 (B,)."""
    return (eps.float() - noise).square().mean(dim=(1, 2, 3))


def pseudo_huber(eps: torch.Tensor, noise: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """Mean of 2c (sqrt(d^2 + c^2) - c) over each sample: d^2 for errors far below c, 2c|d| far above. c: (B,) > 0.

    Khrapov et al. 2024, "Improving Diffusion Models's Data-Corruption Resistance using Scheduled Pseudo-Huber Loss", as
    diffusers' training examples scale it.
    """
    wide, square = c.reshape(-1, 1, 1, 1), (eps.float() - noise).square()
    # sqrt(d^2 + c^2) - c = d^2 / (sqrt(d^2 + c^2) + c), which loses no digits where d is small.
    return (2 * wide * square / ((square + wide.square()).sqrt() + wide)).mean(dim=(1, 2, 3))


def huber_width(schedule: str, c: float, t: torch.Tensor, alpha_bar: torch.Tensor) -> torch.Tensor:
    """The c of each sample, float32 (B,): `constant`, or between 1 for clean samples and c for noisy ones.

    `exponential` c^(t / 1000); `snr` (1 - c) / (1 + sigma)^2 + c with sigma^2 = 1 / SNR (Khrapov et al. 2024). t: (B,).
    """
    if schedule == "exponential":
        return c ** (t / 1000)
    if schedule == "snr":
        return (1 - c) / (1 + ((1 - alpha_bar) / alpha_bar).sqrt()).square() + c
    return torch.full_like(alpha_bar, c)
