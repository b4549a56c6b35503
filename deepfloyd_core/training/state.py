"""The state of a training between two steps, saved to a checkpoint and restored: the only state beside the batch order."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel

from deepfloyd_core.adapters.lora import trainable
from deepfloyd_core.config.stage import StageConfig
from deepfloyd_core.hashing import hash_seed
from deepfloyd_core.training.checkpoints import Checkpoint, StepMetrics, load_checkpoint, save_checkpoint
from deepfloyd_core.training.forward import TrainingContext
from deepfloyd_core.training.optimizers import (
    make_optimizer,
    optimizer_state,
    restore_optimizer,
    resume_training,
    take_average,
)
from deepfloyd_core.training.sharded import Shards
from deepfloyd_core.training.validation import damaged_losses


@dataclass(frozen=True)
class TrainingState:
    """Everything that a checkpoint holds."""

    params: dict[str, torch.nn.Parameter]  # those that are trained, by name
    optimizer: torch.optim.Optimizer
    ema: EMAModel | None
    metrics: list[StepMetrics]  # of each step that is done
    shards: Shards | None = None  # the parameters, and all of their state, are this rank's parts

    @property
    def step(self) -> int:
        """How many steps are done."""
        return len(self.metrics)


def training_state(context: TrainingContext) -> TrainingState:
    """The state of the newest checkpoint, or of a new training."""
    params = context.shards.parts if context.shards else trainable(context.unet)
    optimizer = make_optimizer(context.config, params.values(), hash_seed(context.seed, context.stage))
    state = TrainingState(params, optimizer, make_ema(context.config, params.values()), [], context.shards)
    _resume(state, context.out)
    return state


def make_ema(config: StageConfig, params: Iterable[torch.nn.Parameter]) -> EMAModel | None:
    """The moving average of the trained parameters; in fp32, because in bf16 steps of 1 - decay would be rounded away."""
    return EMAModel([param.detach().float() for param in params], decay=config.ema_decay) if config.use_ema else None


@contextmanager
def averaged(state: TrainingState) -> Iterator[None]:
    """In this block the parameters are the averages that would be saved now; afterwards the trained values return, to
    the last bit.
    """
    averages = state.ema is not None or hasattr(state.optimizer, "eval")
    kept = [param.detach().clone() for param in state.params.values()] if averages else []
    take_averages(state)
    yield
    resume_training(state.optimizer)
    with torch.no_grad():
        for param, value in zip(state.params.values(), kept, strict=averages):
            param.copy_(value)


def take_averages(state: TrainingState) -> None:
    """Replace the trained values by those to be saved: the optimizer's average or the moving average, if any."""
    take_average(state.optimizer)
    if state.ema is not None:
        state.ema.copy_to(state.params.values())


class CheckpointWriter:
    """Writes the state of a training, at most once for a step. All ranks call it, and the first one writes."""

    def __init__(self, state: TrainingState, config: StageConfig, context: TrainingContext) -> None:
        self._state, self._config, self._out, self._ranks = state, config, context.out, context.ranks
        self._written, self._since = state.step, time.monotonic()

    @property
    def due(self) -> bool:
        """Whether `checkpoint_step_interval` asks for one now, or `checkpointing_minutes` since the last or the start."""
        minutes, passed_s = self._config.checkpointing_minutes, time.monotonic() - self._since
        late = minutes is not None and passed_s >= 60 * minutes
        due = late or self._state.step % self._config.checkpoint_step_interval == 0
        return bool(self._ranks.of_first(due)) if self._state.shards else due

    def write(self) -> None:
        """Write the state as it is, if it is not on disk already, and drop the oldest beyond the limit."""
        if self._state.step == self._written or not (self._ranks.leads or self._state.shards):
            return
        checkpoint = _checkpoint(self._state)
        if self._ranks.leads:
            save_checkpoint(self._out, checkpoint, self._config.checkpoints_total_limit)
        self._written, self._since = self._state.step, time.monotonic()


def _checkpoint(state: TrainingState) -> Checkpoint:
    def whole(name: str, value: torch.Tensor) -> torch.Tensor:
        if state.shards and state.shards.is_part(name, value):
            return state.shards.whole(name, value)
        return value.detach().cpu().contiguous()

    def tensors(values: Iterable[torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: whole(name, value) for name, value in zip(state.params, values, strict=True)}

    average = {} if state.ema is None else tensors(state.ema.shadow_params)
    kept, numbers = optimizer_state(state.optimizer, state.params)
    kept = {name: whole(name.rpartition("/")[0], value) for name, value in kept.items()}
    return Checkpoint(state.step, tensors(state.params.values()), kept, numbers, average, state.metrics)


def _resume(state: TrainingState, out: Path) -> None:
    """Go back to the newest checkpoint before which all validations are stored, if there is one."""
    checkpoint = load_checkpoint(out, damaged_losses(out))
    if checkpoint is None:
        return

    def own(name: str, value: torch.Tensor) -> torch.Tensor:
        return state.shards.part(name, value) if state.shards else value

    with torch.no_grad():
        for name, param in state.params.items():
            param.copy_(own(name, checkpoint.adapter[name]))
    kept = {name: own(name.rpartition("/")[0], value) for name, value in checkpoint.optimizer.items()}
    restore_optimizer(state.optimizer, state.params, kept, checkpoint.numbers)
    if state.ema is not None:
        averages = ((own(name, checkpoint.ema[name]), param) for name, param in state.params.items())
        state.ema.shadow_params = [average.to(param.device) for average, param in averages]
        state.ema.optimization_step = checkpoint.step
    state.metrics[:] = checkpoint.metrics
