"""The sample pictures that a run makes for people: while a stage is trained, and of the base and the finished model."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from deepfloyd_core.config.run_validation import ValidationKeys
from deepfloyd_core.config.stage import StageConfig
from deepfloyd_core.config.stages import STAGES, Stage
from deepfloyd_core.crops.eval_pictures import EvalPicture, eval_pictures
from deepfloyd_core.diffusion.conditioning import as_conditioning, conditioning_picture
from deepfloyd_core.diffusion.loss import low_res, to_model_range
from deepfloyd_core.hashing import hash_seed
from deepfloyd_core.store.artifacts import Artifact


@dataclass(frozen=True)
class SampleSpec:
    """A picture to make."""

    prompt: str
    seed: int
    size: tuple[int, int]  # of the picture, px
    truth: np.ndarray | None = None  # uint8 (H, W, 3), the source of `input_picture`, or the picture whose pair it is
    input_picture: torch.Tensor | None = None  # an upscaler's low-res picture, or a ControlNet's conditioning


def sample_specs(
    stage: Stage, settings: StageConfig, validation: ValidationKeys, prompts: Sequence[str], eval_set: Artifact,
    pairs: Artifact | None = None,
) -> list[SampleSpec]:  # fmt: skip
    """From text: every prompt, seed and size, the prompts in turn. For an upscaler: the first held-out pictures, as many
    as the run upscales.

    With a ControlNet: the first held-out pictures; each sample has the conditioning (or the pair) and the caption of
    one.
    """
    upscaler = STAGES[stage].is_upscaler
    if not upscaler and not settings.controlnet:
        first, sizes = validation.validation_seed, validation.sample_sizes_px
        seeds = range(first, first + validation.num_validation_images)
        return [SampleSpec(prompt, seed, size) for size in sizes for seed in seeds for prompt in prompts]
    found = []
    count = validation.num_upscaled_images if upscaler else validation.num_validation_images
    for one in eval_pictures(eval_set, stage, pairs)[:count]:
        row, seed = one.row, hash_seed("eval", one.row.image_id) % 2**32
        found.append(SampleSpec(row.caption, seed, (row.width, row.height), one.pixels, _input_picture(one, settings)))
    return found


def _input_picture(one: EvalPicture, settings: StageConfig) -> torch.Tensor:
    """Upscaler: the low-res picture, float32 (1, C, h, w) in [-1, 1]. ControlNet: (1, 3, H, W) in [0, 1]."""
    if one.pair is not None:
        return as_conditioning(torch.from_numpy(one.pair)[None])
    picture = to_model_range(torch.from_numpy(one.pixels)[None])
    if settings.controlnet:
        assert settings.controlnet_conditioning != "paired"  # or there is a pair
        return conditioning_picture(settings.controlnet_conditioning, picture)
    return low_res(picture)
