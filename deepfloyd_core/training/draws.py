"""How a stage's settings change its random draws: which timesteps are more frequent, which noise is added.

Each option draws from its own generator, so that switching one on changes no other draw of the run.
"""

from dataclasses import replace

import torch

from deepfloyd_core.config.stage import StageConfig
from deepfloyd_core.config.stages import UPSCALE
from deepfloyd_core.diffusion.degradations import draw_degradation
from deepfloyd_core.hashing import hash_seed
from deepfloyd_core.training.batches import Draws, Rollout

TIMESTEPS = 1000


def vary(draws: Draws, config: StageConfig, seed: int, number: int) -> Draws:
    """The draws of forward pass `number` changed by a stage's settings; unchanged if all options are off."""
    if config.timestep_bias_strategy != "none":
        weights, generator = timestep_weights(config), _generator("timesteps", seed, number)
        draws = replace(draws, t=torch.multinomial(weights, len(draws.t), replacement=True, generator=generator))
    if (config.noise_level_begin, config.noise_level_end) != (0, TIMESTEPS):
        generator, band = _generator("levels", seed, number), (config.noise_level_begin, config.noise_level_end)
        draws = replace(draws, level=torch.randint(*band, draws.level.shape, generator=generator))
    if config.low_res_stage1_share:
        drawn = torch.rand(draws.level.shape, generator=_generator("low-res of stage 1", seed, number))
        draws = replace(draws, remade=drawn < config.low_res_stage1_share)
    if config.degrades_low_res:
        draws = replace(draws, degradation=draw_degradation(draws.noise.shape, config, seed, number))
    if config.stage2_patch:
        draws = replace(draws, windows=_windows(draws.noise.shape, config.stage2_patch, seed, number))
    if config.offset_noise:
        draws = replace(draws, noise=draws.noise + _offset(draws, config, _generator("offset", seed, number)))
    strength = perturbation(config, number // config.gradient_accumulation_steps)
    if strength:
        extra = torch.randn(draws.noise.shape, generator=_generator("perturbation", seed, number))
        draws = replace(draws, fed_noise=draws.noise + strength * extra)
    if config.scheduled_sampling_max_step_offset:
        draws = replace(draws, rollout=_rollout(draws, config, _generator("rollout", seed, number)))
    return draws


def _rollout(draws: Draws, config: StageConfig, generator: torch.Generator) -> Rollout:
    """The offset towards noise is uniform from 1 to the largest; a timestep beyond the last one becomes pure noise."""
    offset = torch.randint(1, config.scheduled_sampling_max_step_offset + 1, draws.t.shape, generator=generator)
    taken = torch.rand(draws.t.shape, generator=generator) < config.scheduled_sampling_probability
    noise = torch.randn(draws.noise.shape, generator=generator)
    return Rollout((draws.t + offset).clamp(max=TIMESTEPS - 1), noise, taken)


def _windows(shape: torch.Size, edge: int, seed: int, number: int) -> tuple[tuple[slice, slice], ...]:
    """Rows and columns of a square in each of B pictures, (B, C, H, W), at a random place; shorter if a picture is.

    Windows start at a pixel of the low-res picture, so that window and low-res picture are aligned as at inference.
    """
    generator = _generator("windows", seed, number)
    sides = [min(edge, whole) for whole in shape[-2:]]
    starts = [
        (UPSCALE * torch.randint(0, (whole - side) // UPSCALE + 1, shape[:1], generator=generator)).tolist()
        for whole, side in zip(shape[-2:], sides, strict=True)
    ]
    height, width = sides
    return tuple((slice(top, top + height), slice(left, left + width)) for top, left in zip(*starts, strict=True))


def timestep_weights(config: StageConfig) -> torch.Tensor:
    """How often each timestep is drawn: float32 (1000,), sum 1. A larger timestep is a noisier one."""
    portion = int(config.timestep_bias_portion * TIMESTEPS)
    favoured = {
        "none": slice(0, 0),
        "earlier": slice(0, portion),
        "later": slice(TIMESTEPS - portion, TIMESTEPS),
        "range": slice(config.timestep_bias_begin, config.timestep_bias_end),
    }[config.timestep_bias_strategy]
    weights = torch.ones(TIMESTEPS)
    weights[favoured] *= config.timestep_bias_multiplier
    return weights / weights.sum()


def perturbation(config: StageConfig, step: int) -> float:
    """Strength of the input perturbation (Ning et al. 2023) in an optimizer step; it can fall linearly to zero."""
    if not config.input_perturbation_steps:
        return config.input_perturbation
    return config.input_perturbation * max(0.0, 1 - step / config.input_perturbation_steps)


def _offset(draws: Draws, config: StageConfig, generator: torch.Generator) -> torch.Tensor:
    """One random number for each colour of a sample, (B, C, 1, 1): it teaches a model to change a picture's mean brightness.

    Guttenberg 2023, "Diffusion with offset noise". Zero for the samples that the probability leaves out.
    """
    size, colours = draws.noise.shape[:2]
    drawn = torch.randn((size, colours, 1, 1), generator=generator)
    taken = torch.rand((size, 1, 1, 1), generator=generator) < config.noise_offset_probability
    return config.noise_offset * drawn * taken


def _generator(purpose: str, seed: int, number: int) -> torch.Generator:
    return torch.Generator().manual_seed(hash_seed(purpose, seed, number))
