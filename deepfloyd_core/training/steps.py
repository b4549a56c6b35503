"""The loop of a training: steps, and between them checkpoints, validations and the request to end."""

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import torch

from deepfloyd_core.errors import JobError, Stop
from deepfloyd_core.training.checkpoints import StepMetrics, last_good
from deepfloyd_core.training.forward import Prepared, TrainingContext
from deepfloyd_core.training.live_curve import LiveCurve
from deepfloyd_core.training.micro_batches import add_gradients
from deepfloyd_core.training.optimizers import check_savable, set_learning_rate
from deepfloyd_core.training.out_of_memory import out_of_memory
from deepfloyd_core.training.prefetch import Prefetcher
from deepfloyd_core.training.ranks import GradientSum
from deepfloyd_core.training.schedule import learning_rate_at
from deepfloyd_core.training.state import CheckpointWriter, TrainingState, averaged, take_averages
from deepfloyd_core.training.throughput import Throughput
from deepfloyd_core.training.trackers import MetricLogger, show_validation, shown_metrics
from deepfloyd_core.training.validation import Validation
from deepfloyd_core.types import Report


def run_steps(
    context: TrainingContext, state: TrainingState, make: Callable[[int], Prepared], validation: Validation,
    show: MetricLogger, report: Report,
) -> float:  # fmt: skip
    """The loop, from the steps that the state has done; `make` prepares a pass. Returns the seconds that the steps took.

    Raises Stop after the checkpoint of the current step when the process was asked to end.
    """
    config, ranks, seconds = context.config, context.ranks, 0.0
    asked, pace = _StopRequest(), Throughput(context.device)
    checkpoints, curve = CheckpointWriter(state, config, context), LiveCurve(context.stage, context.out)
    with Prefetcher(make, config.dataloader_num_workers, config.steps * context.turns.per_step) as ahead:
        for step in range(state.step, config.steps):
            if _due(context, step) and not ranks.of_first(validation.taken(step)):
                checkpoints.write()
                with asked.at_once(), averaged(state):
                    show_validation(show, step, *validation.of(context.whole()).take(step))
                pace = Throughput(context.device)
            context.unet.train()
            began = time.monotonic()
            metrics, stop = take_step(context, state, ahead, step, is_asked=lambda: asked.stop)
            state.metrics.append(metrics)
            seconds += time.monotonic() - began
            pace.step(config.samples_per_step)
            _tell(report, config.steps, state.metrics[-1], pace, show)
            if ranks.leads:
                curve.step(state.metrics)
            if step + 1 == config.steps or stop or checkpoints.due:
                checkpoints.write()
            if stop:
                asked.release()  # a tracker may take long to close
                raise Stop
    asked.release()  # the rest can be long, and restarts from the last checkpoint
    take_averages(state)
    return seconds


def _due(context: TrainingContext, step: int) -> bool:
    """Whether there is a validation or a preview before a step. Before the first step of a parent, for comparison; of the
    base there are no previews.
    """
    interval = context.config.validation_step_interval or 0
    if step == 0:
        return context.has_parent or (interval > 0 and not context.is_previewed)
    return interval > 0 and step % interval == 0


def _tell(report: Report, steps: int, row: StepMetrics, pace: Throughput, show: MetricLogger) -> None:
    show(row.step, {**shown_metrics(row), "samples_per_s": pace.samples_per_s, "peak_gib": pace.peak_gib}, ())
    line = f"loss {row.loss:.4f} lr {row.lr:.1e} grad {row.grad_norm:.2f}"
    report(row.step, steps, f"{line} {pace.line}")


def take_step(
    context: TrainingContext, state: TrainingState, ahead: Prefetcher[Prepared], step: int, *,
    is_asked: Callable[[], bool] = lambda: False,
) -> tuple[StepMetrics, bool]:  # fmt: skip
    """One optimizer step, `step` counted from 0. Returns its metrics, and whether any rank is asked to end.

    Raises JobError when memory runs out or anything is not finite, or after the first step when the optimizer's state could
    not be saved.
    """
    config, lr = context.config, learning_rate_at(context.config, step)
    set_learning_rate(state.optimizer, lr, config.learning_rate)
    loss, is_asked_by_any, shown = _add_all_gradients(context, state, ahead, step, is_asked)
    norm = _clip(state, config.max_grad_norm or math.inf)
    if not (math.isfinite(loss) and math.isfinite(norm)):
        left, batch = last_good(context.out), ", ".join(shown)
        raise JobError(f"Step {step + 1}: loss is {loss}, gradient norm {norm}. The batch was {batch}. {left}")
    state.optimizer.step()
    if step == 0:
        check_savable(state.optimizer, config.optimizer)
    state.optimizer.zero_grad(set_to_none=True)
    if state.ema is not None:
        state.ema.step(state.params.values())
    return StepMetrics(step + 1, loss, lr, norm), is_asked_by_any


def _clip(state: TrainingState, most: float) -> float:
    """Clip the gradients. Returns their norm before."""
    if state.shards:
        return state.shards.clip(most)
    return float(torch.nn.utils.clip_grad_norm_(state.params.values(), most))


def _add_all_gradients(
    context: TrainingContext, state: TrainingState, ahead: Prefetcher[Prepared], step: int, is_asked: Callable[[], bool]
) -> tuple[float, bool, list[str]]:  # fmt: skip
    """Compute this rank's part of a step, and sum the gradients of all. Returns the step's loss, whether any rank is asked
    to end, and the pictures of this rank's part.
    """
    turns, ranks = context.turns, context.ranks
    summed = ranks.size > 1 and state.shards is None  # shards are summed as they are computed
    total = GradientSum(ranks, list(state.params.values())) if summed else None
    losses, shown = list[float](), list[str]()
    for turn in range(step * turns.per_step, (step + 1) * turns.per_step):
        prepared = ahead.take(turn)
        try:
            losses.append(add_gradients(context, prepared))
        except torch.OutOfMemoryError:
            raise out_of_memory(context, prepared, step) from None
        shown += prepared.image_ids
        if total is not None:
            total.add()
    told = ranks.gathered((losses, total.has if total else b"", is_asked()))
    if total is not None:
        total.finish([has for _, has, _ in told])
    return turns.loss([each for each, _, _ in told]), any(each for *_, each in told), shown


class _StopRequest:
    """Remembers SIGTERM until the current step is done, so that a checkpoint holds complete steps only."""

    def __init__(self) -> None:
        self.stop = False
        self._before = signal.signal(signal.SIGTERM, self._on_signal)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """In this block SIGTERM ends the process at once, as before: the block can be long, and a checkpoint was written."""
        self.release()
        yield
        signal.signal(signal.SIGTERM, self._on_signal)

    def release(self) -> None:
        """Restore the previous handler of the signal."""
        signal.signal(signal.SIGTERM, self._before)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.stop = True
