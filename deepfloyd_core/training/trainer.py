"""One trainer for every stage: adapters, biases or all weights, exact to the byte when killed and started again.

Every draw is a function of (seed, forward pass), the learning rate of the step, the batch order of the epoch. So a
checkpoint holds only the trained parameters, their moving average, the optimizer's state and a step number.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from diffusers import UNet2DConditionModel

from deepfloyd_core.adapters.lora import trainable
from deepfloyd_core.adapters.method import base_dtype, method_of
from deepfloyd_core.config.stage import StageConfig
from deepfloyd_core.config.stage_run import device_fault
from deepfloyd_core.config.stages import Stage
from deepfloyd_core.crops.rows import held_out_ids
from deepfloyd_core.errors import ConfigError
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
from deepfloyd_core.processes.job_processes import JobFiles
from deepfloyd_core.processes.jobs import Job
from deepfloyd_core.sampling.specs import SampleSpec, sample_specs
from deepfloyd_core.text.projection import Projected, raw_texts
from deepfloyd_core.training.attention import set_attention
from deepfloyd_core.training.batches import MixedOrder, OrderSettings, TrainingRows
from deepfloyd_core.training.checkpoints import StepMetrics
from deepfloyd_core.training.compiled import check_backend, compiled_unet
from deepfloyd_core.training.eval_loss import HELD_OUT, GridLoss, LossComparison, compared, grid_pictures, mean_loss
from deepfloyd_core.training.forward import Prepared, TrainingContext, predictor, prepare
from deepfloyd_core.training.jobs import VALIDATION_FILE, TrainingSummary, TrainRequest
from deepfloyd_core.training.live_curve import save_curve, show_at_end
from deepfloyd_core.training.micro_batches import KeptSizes, check_separable, keep_sizes
from deepfloyd_core.training.previews import PICTURES, PREVIEWS
from deepfloyd_core.training.ranks import ALONE, Ranks, joined, threads_of_rank
from deepfloyd_core.training.recompute import recompute_activations
from deepfloyd_core.training.sharded import Shards
from deepfloyd_core.training.start import known_pictures
from deepfloyd_core.training.state import TrainingState, training_state
from deepfloyd_core.training.steps import run_steps
from deepfloyd_core.training.trackers import open_loggers, show_validation
from deepfloyd_core.training.validation import (
    Validation,
    published_losses,
    read_losses,
    write_validations,
)  # fmt: skip

METRICS_FILE = "metrics.parquet"


def train(job: Job[TrainRequest]) -> TrainingSummary | None:
    """Train a stage's LoRA, biases or UNet into job.out, from its newest checkpoint. Returns the manifest's summary; None in
    a rank that does not write it.
    """
    request, machine = job.request, job.request.machine
    use_threads(threads_of_rank(machine.num_threads, request.ranks))
    device, meeting = pick_device(machine.device, request.rank), JobFiles(job.out, request.job).meeting
    with joined(request.rank, request.ranks, machine.exact_ranks, device, meeting) as ranks:
        return _train(job, set_up(job, ranks))


def _train(job: Job[TrainRequest], context: TrainingContext) -> TrainingSummary | None:
    request, stage, ranks = job.request, job.request.stage, context.ranks
    rows = _rows(request)
    order = _order(request, rows)
    validation = _validation(context, rows, order, job)
    shown = _previews(validation, request) if request.previews else validation
    state = _state(context)
    first, last, metrics = state.step, context.config.steps, state.metrics
    sizes = keep_sizes(job.out, first, context) if ranks.leads else KeptSizes()
    listed = {**context.config.model_dump(mode="json"), "seed": request.seed}
    with open_loggers(request.machine.trackers if ranks.leads else (), listed, job.out, metrics[:]) as show:
        seconds = run_steps(context, state, _passes(context, rows, order), shown, show, job.report)
        context = context.whole()
        validation = validation.of(context)
        del state, shown  # the optimizer's states can be twice as large as the model
        params = list(trainable(context.unet).values())
        ranks.check_alike(params, f"Stage {stage}, step {last}: the trained model")
        trained = sum(param.numel() for param in params)
        frozen = frozen_numbers(context.unet), frozen_bytes(context.unet)
        difference = _saved(context, request.model)
        tuned, pictures = validation.take(last)
        show_validation(show, last, tuned, pictures)
    method_of(context.config).remove(context.unet, request.model)
    base = validation.losses("of the base")
    if not ranks.leads:
        return None
    show_at_end(metrics, stage, job.out)
    change = compared(base, tuned)
    _write_figures(stage, job.out, metrics, write_validations(base, stage, validation.wanted, job.out))
    return TrainingSummary(
        steps=last,
        micro_batches=sizes.micro_batches,
        ranks=sizes.ranks,
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


def _state(context: TrainingContext) -> TrainingState:
    """From where the training goes on, which all ranks must have alike."""
    state = training_state(context)
    if not state.shards:
        what = f"Stage {context.stage}, step {state.step + 1}: what the training goes on from"
        context.ranks.check_alike(list(state.params.values()), what)
    return state


def _saved(context: TrainingContext, folder: Path) -> float:
    """Write the product, and load it in place of the trained weights. folder: of the base model. Returns the difference that
    this makes.
    """
    method, stage, out = method_of(context.config), context.stage, context.out
    if context.ranks.leads:
        method.save(context.unet, stage, folder, out)
        trained_scheduler(folder, context.config.train_variance).save_pretrained(out / "scheduler")
    context.ranks.wait()  # for its files
    return method.reload(context.unet, stage, folder, out)


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


def set_up(job: Job[TrainRequest], ranks: Ranks = ALONE) -> TrainingContext:
    """The model with its new parts, the text and the schedulers on the device. Raises ConfigError where the device cannot
    do what a key asks for."""
    request, stage, folder = job.request, job.request.stage, job.request.model
    device, previews = pick_device(request.machine.device, ranks.rank), {"validation_step_interval": request.previews}
    config = request.settings.model_copy(update=previews if request.previews else {})
    use_repeatable_kernels(device)
    if fault := device_fault(config, "rocm" if torch.version.hip else device.type):
        raise ConfigError(f"stage{stage}.{fault}.")
    check_backend(config.dynamo_backend, device, f"stage{stage}.dynamo_backend is {config.dynamo_backend!r}")
    unet = _unet(request, config, device)
    check_separable(unet, config, ranks.size)
    if config.gradient_checkpointing:
        recompute_activations(unet)
    order_channels_last(unet)
    spreads = config.model_type == "full" and ranks.size > 1
    shards = Shards(unet, ranks.size, device, lambda: _unet(request, config, device)) if spreads else None
    text = request.inputs.text
    noising = load_noising_scheduler(folder, stage)
    texts = raw_texts(text) if text.kind == "text_embeds" else Projected(text).batch
    compiled = compiled_unet(unet, config.dynamo_backend)
    return TrainingContext(
        stage, config, request.seed, unet, load_scheduler(folder), noising, texts, device, job.out, compiled,
        has_parent=request.parent is not None, is_previewed=request.previews > 0, model=folder,
        ranks=ranks, shards=shards,
    )  # fmt: skip


def _unet(request: TrainRequest, config: StageConfig, device: torch.device) -> UNet2DConditionModel:
    """The base model with its new parts, from which the training starts."""
    projected, method = request.inputs.text.kind != "text_embeds", method_of(config)
    parent = request.parent.checked("the training starts from") if request.parent else None
    unet = load_base(request.model, projected, base_dtype(config), config.base_model_precision, device)
    method.prepare(unet, config, hash_seed("lora", request.seed, request.stage))
    if parent is not None:
        method.start(unet, parent)
    set_attention(unet, config.attention_mechanism)
    return unet.to(device)


def _validation(context: TrainingContext, rows: TrainingRows, order: MixedOrder, job: Job[TrainRequest]) -> Validation:
    request = job.request
    stage, config = context.stage, context.config
    eval_set, pairs = request.inputs.eval_set, request.inputs.eval_conditioning
    wanted = _specs(request) if request.settings.validation_step_interval else []
    grid, negative = grid_pictures(eval_set, rows, order, stage, pairs), request.validation.validation_negative_prompt
    return Validation(
        stage, config, negative, request.model, context.unet, context.texts, predictor(context),
        context.scheduler.alphas_cumprod, grid, wanted, context.out, job.report, ranks=context.ranks,
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
    """A function that makes the inputs of a forward pass from the number of its turn."""

    def make(turn: int) -> Prepared:
        number = context.turns.number(turn)
        batch = rows.take(*order.batch(number))
        return prepare(context, batch, number, rows.image_ids(batch))

    return make


def _rows(request: TrainRequest) -> TrainingRows:
    inputs = request.inputs
    held_out, known = held_out_ids(inputs.eval_set), known_pictures(inputs.start)
    return TrainingRows(inputs.pixels, held_out, inputs.conditioning, inputs.low_res, known)


def _order(request: TrainRequest, rows: TrainingRows) -> MixedOrder:
    config = request.settings
    settings = OrderSettings(
        config.train_batch_size, config.gradient_accumulation_steps, config.steps,
        hash_seed(request.seed, request.stage), request.sampling == "auto-weighting", request.new_share,
    )  # fmt: skip
    return MixedOrder(rows, dict(request.shares), settings)
