"""The data and the loss of the pre-training: drawn pictures, noise, and the weighted error in epsilon."""

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from deepfloyd_core.measures import drawn_world as world
from deepfloyd_core.tiny.make import models

CAPTIONS = [*world.BASE_CAPTIONS, ""]  # the last one is the dropped caption of classifier-free guidance
DROPPED = len(CAPTIONS) - 1


@dataclass(frozen=True)
class Phase:
    """A run of steps at one size."""

    side_px: int
    batch: int
    steps: int
    learning_rate: float  # at the start; the cosine ends at 2 % of it
    noise_power: float = 1.0  # Stage II's noise levels are 1000 u^power: 1 as IF was trained, 3 has its median at 125
    blind: float = 0.0  # share of nudged samples whose picture is taken away altogether, see `nudge`
    late: float = 0.0  # size of the nudges at low noise, relative to those at high noise
    rolled: float = 0.0  # share of samples that start from the model's own guess, see `epsilon_loss`
    strange: float = 0.0  # share of pictures of unnamed things, without a caption, see `world.draw_strange`


def alpha_bars() -> torch.Tensor:
    """Cumulative signal (1000,) of the cosine schedule; 1 = clean."""
    bars: torch.Tensor = models.noising_scheduler().alphas_cumprod
    return bars


def add_noise(x_0: torch.Tensor, noise: torch.Tensor, alpha_bar: torch.Tensor) -> torch.Tensor:
    """Sample q(x_t | x_0), Ho et al. 2020 eq. 4. alpha_bar: (B,), 1 = clean."""
    alpha_bar = alpha_bar.view(-1, 1, 1, 1)
    return alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * noise


def loss_weight(alpha_bar: torch.Tensor) -> torch.Tensor:
    """Min-SNR-5 weights (Hang et al. 2023), lifted at high noise by SNR^-0.5, at most 8 times.

    Flat shapes show their colour at an SNR near 1/400, where an epsilon loss hardly sees it: without the lift, colours
    are the last thing that follows the caption.
    """
    snr = alpha_bar / (1 - alpha_bar)
    return torch.clamp(5 / snr, max=1.0) * torch.clamp(snr**-0.5, 1.0, 8.0)


def nudge(x_0: torch.Tensor, alpha_bar: torch.Tensor, max_snr: float, phase: Phase) -> torch.Tensor:
    """Smooth colour offsets (B, 3, H, W) for half of the samples whose SNR is below `max_snr`, zero for the others.

    Sampling starts from noise without the picture's mean colour, and a small model trusts its input: the whole picture
    drifts. Trained to undo such offsets, it takes its colours from the caption or from the low-res input. A share of
    `phase.blind` loses the picture itself (offset -x_0), as in the first of few sampling steps, where only the low-res
    input shows what to make. Smaller offsets (`phase.late`) up to an SNR of 50 teach the later steps to correct the
    errors of the earlier ones: without them grounds end 0.05 too dark, which costs Stage II 5 dB.
    """
    snr = alpha_bar / (1 - alpha_bar)
    flat = 0.5 * torch.randn(len(x_0), 3, 1, 1)
    smooth = 0.3 * F.interpolate(torch.randn(len(x_0), 3, 3, 3), x_0.shape[-2:], mode="bilinear")
    blind = (torch.rand(len(x_0)) < phase.blind) & (snr < max_snr)
    offset = torch.where(blind.view(-1, 1, 1, 1), -x_0, flat + smooth)
    size = torch.where(snr < max_snr, 1.0, phase.late) * (snr < 50) * (torch.rand(len(x_0)) < 0.5)
    return offset * size.view(-1, 1, 1, 1)


def epsilon_loss(
    unet: torch.nn.Module, x_0: torch.Tensor, rows: torch.Tensor, phase: Phase, low: torch.Tensor | None = None
) -> torch.Tensor:
    """Weighted epsilon loss. x_0 (B, 3, H, W) in [-1, 1]; `low`, the upsampled low-res, turns it into Stage II's loss.

    A nudged input keeps the clean picture as its target: the target is the epsilon that leads back to x_0. The same
    applies to a share `phase.rolled`, whose x_t is made from the model's own estimate of x_0 from 50 to 350 timesteps
    earlier: so it learns to correct its own errors while sampling, instead of passing them on from step to step.
    """
    bars = alpha_bars()
    labels = noised_low = None
    t = torch.randint(0, 1000, (len(x_0),))
    noise = torch.randn_like(x_0)
    if low is not None:
        labels = (1000 * torch.rand(len(x_0)) ** phase.noise_power).long()
        noised_low = add_noise(low, torch.randn_like(low), bars[labels])
    max_snr = 0.25 if low is None else 1.0

    def predicted(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        x_in = x_t if noised_low is None else torch.cat([x_t, noised_low], dim=1)
        eps: torch.Tensor = unet(x_in, t, rows, class_labels=labels).sample[:, :3]
        return eps

    offset = nudge(x_0, bars[t], max_snr, phase)
    if phase.rolled:
        earlier = (t + torch.randint(50, 351, (len(x_0),))).clamp(max=999)
        bar = bars[earlier]
        x_t = add_noise(x_0 + nudge(x_0, bar, max_snr, phase), torch.randn_like(x_0), bar)
        bar = bar.view(-1, 1, 1, 1)
        with torch.no_grad():
            guess = ((x_t - (1 - bar).sqrt() * predicted(x_t, earlier)) / bar.sqrt()).clamp(-1, 1)
        chosen = (torch.rand(len(x_0)) < phase.rolled).view(-1, 1, 1, 1)
        offset = torch.where(chosen, guess - x_0, offset)
    bar = bars[t]
    target = noise + offset * (bar / (1 - bar)).sqrt().view(-1, 1, 1, 1)
    error = (predicted(add_noise(x_0 + offset, noise, bar), t) - target).square().mean(dim=(1, 2, 3))
    loss: torch.Tensor = (error * loss_weight(bar)).mean()
    return loss


def draw_batch(
    rng: np.random.Generator, count: int, side_px: int, strange: float, any_ground: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures (count, 3, side, side) in [-1, 1] and the numbers of their captions; the share `strange` has none."""
    numbers = rng.integers(0, len(world.BASE_CAPTIONS), count)
    if strange:
        numbers[rng.random(count) < strange] = DROPPED

    def drawn(caption: str) -> world.Picture:
        return world.draw(rng, caption, side_px) if caption else world.draw_strange(rng, side_px, any_ground)

    pictures = np.stack([drawn(CAPTIONS[number]) for number in numbers])
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    return pixels, torch.from_numpy(numbers)


def upsampled_low(pictures: torch.Tensor) -> torch.Tensor:
    """Stage II's input at inference: antialiased 4x smaller, then bilinear with align_corners, as in the pipeline."""
    side = pictures.shape[-1]
    low = F.interpolate(pictures, (side // 4, side // 4), mode="bicubic", antialias=True).clamp(-1, 1)
    return F.interpolate(low, (side, side), mode="bilinear", align_corners=True)


def draw_windows(rng: np.random.Generator, phase: Phase) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Windows (B, 3, side, side) of 256 px pictures, the same windows of their upsampled low-res, caption numbers.

    The low-res is made from the whole picture, because align_corners shifts pixels by up to half a low-res pixel,
    depending on where they lie. Small windows come two or three from one picture, which saves drawing.
    """
    each = {64: 3, 128: 2, 256: 1}[phase.side_px]
    pictures, numbers = draw_batch(rng, phase.batch // each, 256, phase.strange, any_ground=True)
    both = torch.cat([pictures, upsampled_low(pictures)], dim=1)
    windows = []
    for index in range(phase.batch):
        top, left = rng.integers(0, 256 - phase.side_px + 1, 2)
        window = both[index // each, :, top : top + phase.side_px, left : left + phase.side_px]
        window = window.flip(-1) if rng.random() < 0.5 else window
        windows.append(window.transpose(-1, -2) if rng.random() < 0.5 else window)
    stacked = torch.stack(windows)
    return stacked[:, :3], stacked[:, 3:], numbers.repeat_interleave(each)
