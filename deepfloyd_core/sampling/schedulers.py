"""Schedulers of diffusers for a model whose own one is DDPM, as IF's is; each with its dynamic thresholding."""

import copy
from functools import partial
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DDPMScheduler

from deepfloyd_core.config.stage_sampling import SCHEDULER_KINDS, NoiseScheduler

MOST_VALUES = 2**24  # that torch.quantile takes


def make_scheduler(name: NoiseScheduler, own: DDPMScheduler) -> Any:
    """A new scheduler with the noise of the model's own one.

    It takes pictures of any size: in diffusers' classes dynamic thresholding ends at 2**24 values, a picture of 2,364 px.
    """
    kind = SCHEDULER_KINDS[name]
    if kind.changes:
        # Not `**changes` of from_config: that drops a change of what the class does not know, and pipelines ask for it.
        known = {key: value for key, value in own.config.items() if not key.startswith("_")}
        scheduler = getattr(diffusers, kind.name).from_config({**known, **kind.changes})
    else:
        scheduler = copy.deepcopy(own)  # pipelines change it
    scheduler._threshold_sample = partial(_threshold_sample, scheduler)
    return scheduler


def _threshold_sample(scheduler: Any, sample: torch.Tensor) -> torch.Tensor:
    """As diffusers' `DDPMScheduler._threshold_sample` (Saharia et al. 2022, section 2.3): (B, C, H, W), each picture by the
    quantile of its own values.
    """
    if sample[0].numel() <= MOST_VALUES:
        found: torch.Tensor = type(scheduler)._threshold_sample(scheduler, sample)
        return found
    most, values = scheduler.config.sample_max_value, sample.float()
    bound = torch.ones(len(values))
    if most > 1:  # else it is 1 whatever the quantile is
        ratio = scheduler.config.dynamic_thresholding_ratio
        quantile = np.quantile(values.abs().flatten(1).cpu().numpy(), ratio, axis=1)
        bound = torch.from_numpy(quantile).float().clamp(1, most)
    bound = bound.to(values.device)[:, None, None, None]
    return (values.clamp(-bound, bound) / bound).to(sample.dtype)
