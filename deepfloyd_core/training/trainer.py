"""One trainer for every stage: adapters, biases or all weights, exact to the byte when killed and started again.

Every draw is a function of (seed, forward pass), the learning rate of the step, the batch order of the epoch. So a
checkpoint holds only the trained parameters, their moving average, the optimizer's state and a step number.
"""

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from deepfloyd_core.adapters.lora import trainable
from deepfloyd_core.adapters.method import base_dtype, method_of
from deepfloyd_core.config.stage_run import device_fault
from deepfloyd_core.config.stages import Stage
from deepfloyd_core.crops.rows import held_out_ids
from deepfloyd_core.diffusion.conditioning import as_conditioning
from deepfloyd_core.errors import ConfigError, JobError, Stop
from deepfloyd_core.files import atomic_path
from deepfloyd_core.hashing import hash_seed
from deepfloyd_core.measures.held_out_loss import HeldOutLosses
from deepfloyd_core.models.quantized import frozen_bytes, frozen_numbers, load_base
from deepfloyd_core.models.torch_device import pick_device
from deepfloyd_core.models.unet import (
    load_noising_scheduler,
    load_scheduler,
    order_channels_last,
    trained_scheduler,
    use_repeatable_kernels,
    use_threads,
)
from deepfloyd_core.processes.jobs import Job
from deepfloyd_core.sampling.specs import SampleSpec, sample_specs
from deepfloyd_core.text.projection import Projected, raw_texts
from deepfloyd_core.training.attention import set_attention
from deepfloyd_core.training.batches import Draws, MixedOrder, OrderSettings, TrainingRows
from deepfloyd_core.training.checkpoints import StepMetrics, last_good
from deepfloyd_core.training.compiled import check_backend, compiled_unet
from deepfloyd_core.training.eval_loss import HELD_OUT, GridLoss, LossComparison, compared, grid_pictures, mean_loss
from deepfloyd_core.training.forward import Prepared, TrainingContext, feed, predict_noise, prepare
from deepfloyd_core.training.jobs import VALIDATION_FILE, TrainingSummary, TrainRequest
from deepfloyd_core.training.live_curve import LiveCurve, save_curve, show_at_end
from deepfloyd_core.training.micro_batches import add_gradients, check_separable, keep_size
from deepfloyd_core.training.optimizers import check_savable, set_learning_rate
from deepfloyd_core.training.out_of_memory import out_of_memory
from deepfloyd_core.training.prefetch import Prefetcher
from deepfloyd_core.training.previews import PICTURES, PREVIEWS
from deepfloyd_core.training.recompute import recompute_activations
from deepfloyd_core.training.schedule import learning_rate_at
from deepfloyd_core.training.start import known_pictures
from deepfloyd_core.training.state import CheckpointWriter, TrainingState, averaged, take_averages, training_state
from deepfloyd_core.training.throughput import Throughput
from deepfloyd_core.training.trackers import MetricLogger, open_loggers, show_validation, shown_metrics
from deepfloyd_core.training.validation import (
    Validation,
    published_losses,
    read_losses,
    write_validations,
)  # fmt: skip
from deepfloyd_core.types import Report

METRICS_FILE = "metrics.parquet"


def train(job: Job[TrainRequest]) -> TrainingSummary:
    """Train a stage's LoRA, biases or UNet into job.out, from its newest checkpoint. Returns the manifest's summary."""
    request, inputs, stage, folder = job.request, job.request.inputs, job.request.stage, job.request.model
    use_threads(request.machine.num_threads)
    context = set_up(job)
    held_out, known = held_out_ids(inputs.eval_set), known_pictures(inputs.start)
    rows = TrainingRows(inputs.pixels, held_out, inputs.conditioning, inputs.low_res, known)
    order = _order(request, rows)
    validation = _validation(context, rows, order, job)
    shown = _previews(validation, request) if request.previews else validation
    state, method = training_state(context), method_of(context.config)
    first, last, metrics = state.step, context.config.steps, state.metrics
    sizes = keep_size(job.out, first, context.config)
    listed = {**context.config.model_dump(mode="json"), "seed": request.seed}
    with open_loggers(request.machine.trackers, listed, job.out, metrics[:]) as show:
        seconds = run_steps(context, state, _passes(context, rows, order), shown, show, job.report)
        del state  # the optimizer's states can be twice as large as the model
        trained = sum(param.numel() for param in trainable(context.unet).values())
        frozen = frozen_numbers(context.unet), frozen_bytes(context.unet)
        method.save(context.unet, stage, folder, job.out)
        trained_scheduler(folder, context.config.train_variance).save_pretrained(job.out / "scheduler")
        difference = method.reload(context.unet, stage, folder, job.out)
        tuned, pictures = validation.take(last)
        show_validation(show, last, tuned, pictures)
    show_at_end(metrics, stage, job.out)
    method.remove(context.unet, folder)
    base = validation.losses("of the base")
    change = compared(base, tuned)
    _write_figures(stage, job.out, metrics, write_validations(base, stage, validation.wanted, job.out))
    return TrainingSummary(
        steps=last,
        micro_batches=sizes,
        rows=sum(rows.counts.values()),
        pictures=rows.pictures,
        buckets=tuple(order.buckets()),
        trainable_parameters=trained,
        frozen_parameters=frozen[0],
        frozen_bytes=frozen[1],
        first_loss=metrics[0].loss,
        last_loss=metrics[-1].loss,
        reload_difference=difference,
        steps_of_this_process=last - first,
        samples_per_s=round((last - first) * context.config.samples_per_step / seconds, 2) if first < last else None,
        eval_by_t=change.by_t if change else {},
        start_difference=_start_difference(job),
        **dict(_on_held_out(job, base, tuned, change) if change else HeldOutLosses()),
    )


def _write_figures(stage: Stage, out: Path, metrics: list[StepMetrics], validated: list[tuple[int, float]]) -> None:
    """Write metrics.parquet, a row for each step, and the curve of its losses and the held-out ones."""
    with atomic_path(out / METRICS_FILE) as tmp:
        pq.write_table(pa.Table.from_pylist([vars(row) for row in metrics]), tmp)
    save_curve(metrics, stage, out, validated)


def _on_held_out(
    job: Job[TrainRequest], base: list[GridLoss], tuned: list[GridLoss], change: LossComparison
) -> HeldOutLosses:
    """The losses of the base, of the trained model and of the one that it started from."""
    parent = read_losses(job.out, 0) if job.request.parent else None
    on_parent = compared(parent, tuned) if parent else None
    return HeldOutLosses(
        eval_loss_base=mean_loss(base),
        eval_loss=mean_loss(tuned),
        eval_gain=change.gain,
        eval_overfit_gap=change.overfit_gap,
        eval_loss_parent=mean_loss(parent) if parent else None,
        eval_gain_on_parent=on_parent.gain if on_parent else None,
    )


def _start_difference(job: Job[TrainRequest]) -> float | None:
    """See `TrainingSummary`; None where no picture is held out under the same conditions in both."""
    start = job.request.inputs.start
    if start is None:
        return None
    published = published_losses(start.path / VALIDATION_FILE)
    pairs = [(row.loss, published.get((row.image_id, row.conditions, row.t)))
             for row in read_losses(job.out, 0) if row.part == HELD_OUT]  # fmt: skip
    return max((abs(loss - before) for loss, before in pairs if before is not None), default=None)


def set_up(job: Job[TrainRequest]) -> TrainingContext:
    """The model with its new parts, the text and the schedulers on the device. Raises ConfigError where the device cannot
    do what a key asks for."""
    request, stage, folder = job.request, job.request.stage, job.request.model
    device, previews = pick_device(request.machine.device), {"validation_step_interval": request.previews}
    config = request.settings.model_copy(update=previews if request.previews else {})
    use_repeatable_kernels(device)
    if fault := device_fault(config, "rocm" if torch.version.hip else device.type):
        raise ConfigError(f"stage{stage}.{fault}.")
    check_backend(config.dynamo_backend, device, f"stage{stage}.dynamo_backend is {config.dynamo_backend!r}")
    text = request.inputs.text
    projected = text.kind != "text_embeds"
    parent = request.parent.checked("the training starts from") if request.parent else None
    unet = load_base(folder, projected, base_dtype(config), config.base_model_precision, device)
    method = method_of(config)
    method.prepare(unet, config, hash_seed("lora", request.seed, stage))
    if parent is not None:
        method.start(unet, parent)
    set_attention(unet, config.attention_mechanism)
    check_separable(unet, config)
    if config.gradient_checkpointing:
        recompute_activations(unet)
    unet.to(device)
    order_channels_last(unet)
    noising = load_noising_scheduler(folder, stage)
    texts = Projected(text).batch if projected else raw_texts(text)
    compiled = compiled_unet(unet, config.dynamo_backend)
    return TrainingContext(
        stage, config, request.seed, unet, load_scheduler(folder), noising, texts, device, job.out, compiled,
        has_parent=parent is not None, is_previewed=request.previews > 0, model=folder,
    )  # fmt: skip


def _validation(context: TrainingContext, rows: TrainingRows, order: MixedOrder, job: Job[TrainRequest]) -> Validation:
    request = job.request

    def predict(x_0: torch.Tensor, draws: Draws, caption_ids: list[str], pair: torch.Tensor | None) -> torch.Tensor:
        hint = None if pair is None else as_conditioning(pair)
        return predict_noise(context, feed(context, x_0, draws, list(caption_ids), hint))[0]

    stage, config = context.stage, context.config
    eval_set, pairs = request.inputs.eval_set, request.inputs.eval_conditioning
    wanted = _specs(request) if request.settings.validation_step_interval else []
    grid, negative = grid_pictures(eval_set, rows, order, stage, pairs), request.validation.validation_negative_prompt
    return Validation(
        stage, config, negative, request.model, context.unet, context.texts, predict, context.scheduler.alphas_cumprod,
        grid, wanted, context.out, job.report,
    )  # fmt: skip


def _previews(validation: Validation, request: TrainRequest) -> Validation:
    """What is taken in place of the validations, which are not asked for, while it trains."""
    kept = validation.out if request.parent else None
    previews = replace(validation, wanted=_specs(request)[:PICTURES], out=validation.out / PREVIEWS, kept=kept)
    previews.out.mkdir(exist_ok=True)
    return previews


def _specs(request: TrainRequest) -> list[SampleSpec]:
    """The pictures of a validation."""
    inputs = request.inputs
    return sample_specs(
        request.stage, request.settings, request.validation, request.prompts, inputs.eval_set, inputs.eval_conditioning
    )


def _passes(context: TrainingContext, rows: TrainingRows, order: MixedOrder) -> Callable[[int], Prepared]:
    """A function that makes the inputs of a forward pass from its number."""

    def make(number: int) -> Prepared:
        batch = rows.take(*order.batch(number))
        return prepare(context, batch, number, rows.image_ids(batch))

    return make


def run_steps(
    context: TrainingContext, state: TrainingState, make: Callable[[int], Prepared], validation: Validation,
    show: MetricLogger, report: Report,
) -> float:  # fmt: skip
    """The loop, from the steps that the state has done; `make` prepares a pass. Returns the seconds that the steps took.

    Raises Stop after the checkpoint of the current step when the process was asked to end.
    """
    config, seconds = context.config, 0.0
    asked, pace, checkpoints = _StopRequest(), Throughput(context.device), CheckpointWriter(state, config, context.out)
    passes, curve = config.steps * config.gradient_accumulation_steps, LiveCurve(context.stage, context.out)
    with Prefetcher(make, config.dataloader_num_workers, passes) as ahead:
        for step in range(state.step, config.steps):
            if _due(context, step) and not validation.taken(step):
                checkpoints.write()
                with asked.at_once(), averaged(state):
                    show_validation(show, step, *validation.take(step))
                pace = Throughput(context.device)
            context.unet.train()
            began = time.monotonic()
            state.metrics.append(take_step(context, state, ahead, step))
            seconds += time.monotonic() - began
            pace.step(config.samples_per_step)
            _tell(report, config.steps, state.metrics[-1], pace, show)
            curve.step(state.metrics)
            finished, stop = step + 1 == config.steps, asked.stop
            if finished or stop or checkpoints.due:
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


def take_step(context: TrainingContext, state: TrainingState, ahead: Prefetcher[Prepared], step: int) -> StepMetrics:
    """One optimizer step, `step` counted from 0. Returns its metrics.

    Raises JobError when memory runs out or anything is not finite, or after the first step when the optimizer's state could
    not be saved.
    """
    config, lr = context.config, learning_rate_at(context.config, step)
    set_learning_rate(state.optimizer, lr, config.learning_rate)
    loss, shown = 0.0, list[str]()
    for micro in range(config.gradient_accumulation_steps):
        number = step * config.gradient_accumulation_steps + micro
        prepared = ahead.take(number)
        try:
            loss += add_gradients(context, prepared)
        except torch.OutOfMemoryError:
            raise out_of_memory(context, prepared, step) from None
        shown += prepared.image_ids
    norm = float(torch.nn.utils.clip_grad_norm_(state.params.values(), config.max_grad_norm or math.inf))
    if not (math.isfinite(loss) and math.isfinite(norm)):
        left, batch = last_good(context.out), ", ".join(shown)
        raise JobError(f"Step {step + 1}: loss is {loss}, gradient norm {norm}. The batch was {batch}. {left}")
    state.optimizer.step()
    if step == 0:
        check_savable(state.optimizer, config.optimizer)
    state.optimizer.zero_grad(set_to_none=True)
    if state.ema is not None:
        state.ema.step(state.params.values())
    return StepMetrics(step + 1, loss, lr, norm)


def _order(request: TrainRequest, rows: TrainingRows) -> MixedOrder:
    config = request.settings
    settings = OrderSettings(
        config.train_batch_size, config.gradient_accumulation_steps, config.steps,
        hash_seed(request.seed, request.stage), request.sampling == "auto-weighting", request.new_share,
    )  # fmt: skip
    return MixedOrder(rows, dict(request.shares), settings)


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
