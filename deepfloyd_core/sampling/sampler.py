"""Samples with diffusers' own pipelines, with or without a LoRA; every picture has its own random generator.

So a picture depends on its seed and prompt, and not on the batch (up to the rounding of the machine's matrix products).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DDPMScheduler

from deepfloyd_core.adapters.method import load_product
from deepfloyd_core.adapters.mixed import MixedLora
from deepfloyd_core.adapters.mixing import load_loras
from deepfloyd_core.config.run_machine import Machine
from deepfloyd_core.config.stage import StageConfig
from deepfloyd_core.config.stages import STAGES, UPSCALE, Stage
from deepfloyd_core.diffusion.back_projection import back_projecting
from deepfloyd_core.diffusion.loss import CONTROL_IMAGE
from deepfloyd_core.models.torch_device import pick_device
from deepfloyd_core.models.unet import (
    DTYPES,
    load_scheduler,
    load_unet,
    order_channels_last,
    stock_pipeline,
    trained_scheduler,
)
from deepfloyd_core.sampling.jobs import SampledStage
from deepfloyd_core.sampling.parts import Sampled, so_far
from deepfloyd_core.sampling.schedulers import make_scheduler


@dataclass(frozen=True)
class Sampler:
    """A stage ready to sample."""

    stage: Stage
    config: StageConfig
    pipeline: Any
    scheduler: DDPMScheduler  # the model's own; what it is sampled with is made of it
    device: torch.device
    sampled: Sampled  # called in each step

    def at(self, noise_level: int) -> "Sampler":
        """The same sampler at another noise level of an upscaler's low-res picture."""
        return replace(self, config=self.config.model_copy(update={"validation_noise_level": noise_level}))


def make_sampler(
    one: SampledStage, trained: Path | None, machine: Machine, sampled: Sampled, loras: Sequence[MixedLora] = (),
    gpu: int = 0,
) -> Sampler:  # fmt: skip
    """Load a stage's base model in a stock pipeline and, if a folder is given, its trained weights and scheduler.

    loras: in place of trained weights, all at once. The learned variance is taken when each of them has trained it.
    gpu: as in `Job`.
    """
    device = pick_device(machine.device, gpu)
    unet = load_unet(one.model, DTYPES[one.settings.mixed_precision])
    if loras:
        scheduler = trained_scheduler(one.model, all(lora.learned_variance for lora in loras))
    else:
        scheduler = load_scheduler(one.model if trained is None else trained)
    pipeline = stock_pipeline(one.model, one.stage, unet, scheduler)
    if trained is not None:
        load_product(pipeline, trained)
    if loras:
        load_loras(pipeline, loras)
    order_channels_last(unet)
    return Sampler(one.stage, one.settings, pipeline.to(device), scheduler, device, sampled)


@dataclass(frozen=True)
class Start:
    """Pictures that sampling starts from in place of noise: they are varied, or a part of them is drawn anew."""

    pictures: torch.Tensor  # (N, 3, H, W) in [-1, 1], of the stage's size
    strength: float  # of the noise that is added to them, above 0, at most 1: the share of the steps that are done
    mask: torch.Tensor | None = None  # (1, 1, H, W), 1 where they are drawn anew, 0 where they stay; None: img2img

    def told(self, name: str, part: slice) -> dict[str, Any]:
        """The arguments of the pipeline for some of the pictures, whose own argument has a name."""
        masked = {} if self.mask is None else {"mask_image": self.mask.clone()}  # the pipeline changes it
        return {name: self.pictures[part], "strength": self.strength, **masked}


def sample(
    sampler: Sampler, text: torch.Tensor, negative: torch.Tensor, seeds: list[int], size: tuple[int, int],
    given: torch.Tensor | None = None, start: Start | None = None,
) -> torch.Tensor:  # fmt: skip
    """Pictures of any stage: text and negative (N, T, D), one seed each -> float32 (N, C, H, W) in [-1, 1] on the CPU.

    size: (width, height) of pictures from text; an upscaler's follow from its low-res pictures. given: a ControlNet's
    conditioning, or an upscaler's low-res pictures.
    """
    return SAMPLE_FUNCTIONS[sampler.stage](sampler, text, negative, seeds, size, given, start)


def sample_from_text(
    sampler: Sampler, text: torch.Tensor, negative: torch.Tensor, seeds: list[int], size: tuple[int, int],
    control: torch.Tensor | None = None, start: Start | None = None,
) -> torch.Tensor:  # fmt: skip
    """From text: text and negative (N, T, D), one seed each -> float32 (N, C, H, W) in [-1, 1] on the CPU.

    control: a ControlNet's conditioning, (N, 3, H, W) in [0, 1].
    """
    sampler = _starting(sampler, start)

    def given(part: slice) -> dict[str, Any]:
        follow = {} if control is None else {CONTROL_IMAGE: control[part].to(sampler.device)}
        of_size = {"width": size[0], "height": size[1]} if start is None else start.told("image", part)
        return {**of_size, "cross_attention_kwargs": follow or None}

    return _sample(sampler, text, negative, seeds, given)


def sample_upscaled(
    sampler: Sampler, text: torch.Tensor, negative: torch.Tensor, seeds: list[int], small: torch.Tensor,
    start: Start | None = None,
) -> torch.Tensor:  # fmt: skip
    """By an upscaler: small (N, C, h, w) in [-1, 1] -> (N, C, 4h, 4w) in [-1, 1] on the CPU."""
    sampler = _starting(sampler, start)
    dtype, config = DTYPES[sampler.config.mixed_precision], sampler.config
    size = {"width": small.shape[3] * UPSCALE, "height": small.shape[2] * UPSCALE}

    def given(part: slice) -> dict[str, Any]:
        if config.validation_back_projection:
            sampler.pipeline.scheduler = back_projecting(sampler.pipeline.scheduler, small[part])
        return {
            **(size if start is None else start.told("original_image", part)),
            "image": small[part].to(sampler.device, dtype),
            "noise_level": config.validation_noise_level,
        }

    return _sample(sampler, text, negative, seeds, given)


def _starting(sampler: Sampler, start: Start | None) -> Sampler:
    """The sampler with the pipeline of diffusers that starts from pictures; without them as it is."""
    if start is None:
        return sampler
    kind = STAGES[sampler.stage]
    pipeline = getattr(diffusers, kind.img2img if start.mask is None else kind.inpainting)
    made = pipeline(**sampler.pipeline.components, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    return replace(sampler, pipeline=made)


def _of_low_res(
    sampler: Sampler, text: torch.Tensor, negative: torch.Tensor, seeds: list[int], size: tuple[int, int],
    given: torch.Tensor | None, start: Start | None,
) -> torch.Tensor:  # fmt: skip
    """`sample_upscaled` with the arguments of `sample`; the size follows from the low-res pictures."""
    assert given is not None
    return sample_upscaled(sampler, text, negative, seeds, given, start)


# How each stage samples, with the arguments of `sample`.
SampleFn = Callable[
    [Sampler, torch.Tensor, torch.Tensor, list[int], tuple[int, int], torch.Tensor | None, Start | None], torch.Tensor
]
SAMPLE_FUNCTIONS: dict[Stage, SampleFn] = {1: sample_from_text, 2: _of_low_res}


def _sample(
    sampler: Sampler, text: torch.Tensor, negative: torch.Tensor, seeds: list[int],
    given: Callable[[slice], dict[str, Any]],
) -> torch.Tensor:  # fmt: skip
    """given: the further inputs of a part of the pictures, apart from text and seeds, under the pipeline's names."""
    dtype, parts = DTYPES[sampler.config.mixed_precision], []
    batch, steps = sampler.config.sampled_at_once, sampler.config.validation_num_inference_steps
    sampler.pipeline.scheduler = make_scheduler(sampler.config.validation_noise_scheduler, sampler.scheduler)
    tell = so_far(sampler.sampled)
    for start in range(0, len(seeds), batch):
        part = slice(start, start + batch)
        count = len(seeds[part])
        pictures = sampler.pipeline(
            **given(part),
            prompt_embeds=text[part].to(sampler.device, dtype),
            negative_prompt_embeds=negative[part].to(sampler.device, dtype),
            generator=[torch.Generator().manual_seed(seed) for seed in seeds[part]],
            num_inference_steps=steps,
            guidance_scale=sampler.config.validation_guidance,
            output_type="pt",
            callback=lambda number, t, x_t, before=start, count=count: tell(before + count * (number + 1) / steps),
        ).images
        parts.append(pictures.float().cpu().clamp(-1, 1))
        tell(start + count)  # from pictures there are fewer steps
    return torch.cat(parts)
