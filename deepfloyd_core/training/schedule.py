"""The learning rate as a pure function of the step, so that a resumed run needs no scheduler state.

Agrees with `diffusers.optimization.get_scheduler` where that has the schedule and its end is zero.
"""

import math

from deepfloyd_core.config.stage import StageConfig


def learning_rate_at(config: StageConfig, step: int) -> float:
    """Learning rate of optimizer step `step`, 0 <= step < steps.

    Linear warm-up from 0 over `lr_warmup_steps` (not for `constant`), then from `learning_rate` to the last rate.
    """
    peak, end = config.learning_rate, config.final_learning_rate
    if config.schedule == "constant":
        return peak
    if step < config.lr_warmup_steps:
        return peak * step / config.lr_warmup_steps
    if config.schedule == "constant_with_warmup":
        return peak
    done = (step - config.lr_warmup_steps) / max(1, config.steps - config.lr_warmup_steps)
    return end + (peak - end) * _shape(config, done)


def _shape(config: StageConfig, done: float) -> float:
    """Share of the way from end to peak that is left when `done` (0 to 1) of the decay is over."""
    if config.schedule == "linear":
        return 1 - done
    if config.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    if config.schedule == "cosine_with_restarts":
        return 0.5 * (1 + math.cos(math.pi * (config.lr_num_cycles * done % 1)))
    if config.schedule == "polynomial":
        return float((1 - done) ** config.lr_power)
    return math.cos(0.5 * math.pi * done)  # sine: slow at first, steepest at the end
