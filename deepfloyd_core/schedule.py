"""The learning rate as a pure function of the step, so that a resumed run needs no scheduler state.

Agrees with `diffusers.optimization.get_scheduler` where that has the schedule and its end is zero.
"""

import math

from deepfloyd_core.config import StageConfig


def learning_rate_at(config: StageConfig, step: int) -> float:
    """Learning rate of optimizer step `step`, 0 <= step < max_train_steps.

    Linear warm-up from 0 over `lr_warmup_steps` (not for `constant`), then the schedule from `learning_rate` to `lr_end`.
    """
    peak, end = config.learning_rate, config.lr_end
    if config.lr_scheduler == "constant":
        return peak
    if step < config.lr_warmup_steps:
        return peak * step / config.lr_warmup_steps
    if config.lr_scheduler == "constant_with_warmup":
        return peak
    done = (step - config.lr_warmup_steps) / max(1, config.max_train_steps - config.lr_warmup_steps)
    return end + (peak - end) * _shape(config.lr_scheduler, done)


def _shape(name: str, done: float) -> float:
    """Share of the way from end to peak that is left when `done` (0 to 1) of the decay is over."""
    if name == "linear":
        return 1 - done
    if name == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    if name == "polynomial":
        return (1 - done) ** 2
    return math.cos(0.5 * math.pi * done)  # sine: slow at first, steepest at the end
