"""The learning rate as a pure function of the step, so that a resumed run needs no scheduler state.

Agrees with `diffusers.optimization.get_scheduler` for the schedules that it has, when the final rate is zero.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from deepfloyd_core.config.stage import StageConfig


@dataclass(frozen=True)
class Shape:
    """Shape of the learning rate over the run."""

    # (rate - end) / (peak - end) after a share (0 to 1) of the decay. None: the rate stays at the peak.
    left: Callable[[StageConfig, float], float] | None
    warms_up: bool = True


# By the value of `lr_scheduler`.
SCHEDULES = {
    "constant": Shape(None, warms_up=False),
    "constant_with_warmup": Shape(None),
    "linear": Shape(lambda config, done: 1 - done),
    "cosine": Shape(lambda config, done: 0.5 * (1 + math.cos(math.pi * done))),
    "cosine_with_restarts": Shape(
        lambda config, done: 0.5 * (1 + math.cos(math.pi * (config.lr_num_cycles * done % 1)))
    ),
    "polynomial": Shape(lambda config, done: float((1 - done) ** config.lr_power)),
    "sine": Shape(lambda config, done: math.cos(0.5 * math.pi * done)),  # slow at first, steepest at the end
}


def learning_rate_at(config: StageConfig, step: int) -> float:
    """Learning rate of optimizer step `step`, 0 <= step < steps.

    Linear warm-up from 0 over `lr_warmup_steps` (not for `constant`), then from `learning_rate` to the last rate.
    """
    peak, end, schedule = config.learning_rate, config.final_learning_rate, SCHEDULES[config.schedule]
    if schedule.warms_up and step < config.lr_warmup_steps:
        return peak * step / config.lr_warmup_steps
    if schedule.left is None:
        return peak
    done = (step - config.lr_warmup_steps) / max(1, config.steps - config.lr_warmup_steps)
    return end + (peak - end) * schedule.left(config, done)
