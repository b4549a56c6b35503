"""One trainer for both stages: adapters, biases or all weights, exact to the byte when killed and started again.

Every draw is a function of (seed, forward pass), the learning rate one of the step, the batch order one of the epoch;
so a checkpoint holds what is trained, its moving average, the optimizer's state and a step number, nothing else.
"""

import math
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from diffusers.training_utils import EMAModel

from deepfloyd_core.ahead import Ahead
from deepfloyd_core.attention import set_attention
from deepfloyd_core.batches import Draws, MixedOrder, OrderSettings, TrainingRows
from deepfloyd_core.board import Board, open_board, show_validation
from deepfloyd_core.checkpoints import Checkpoint, last_good, load_checkpoint, save_checkpoint
from deepfloyd_core.compiled import check_backend, compiled_unet
from deepfloyd_core.conditioning import as_conditioning
from deepfloyd_core.errors import ConfigError, JobError, Stop
from deepfloyd_core.files import atomic_path
from deepfloyd_core.flavours import Stage
from deepfloyd_core.held_out import compared, grid_pictures, mean_loss
from deepfloyd_core.jobs import Job
from deepfloyd_core.lora import trainable
from deepfloyd_core.methods import base_dtype, method_of
from deepfloyd_core.mixing import Share
from deepfloyd_core.models import (
    load_projected_unet,
    load_scheduler,
    load_unet,
    pick_device,
    trained_scheduler,
    use_threads,
)
from deepfloyd_core.optimizers import make_optimizer, optimizer_state, restore_optimizer, resume_training, take_average
from deepfloyd_core.pace import Pace
from deepfloyd_core.parent import parent_file
from deepfloyd_core.projected import Projected, raw_texts
from deepfloyd_core.recompute import recompute_activations
from deepfloyd_core.row_list import eval_ids
from deepfloyd_core.schedule import learning_rate_at
from deepfloyd_core.sheets import save_loss_curve
from deepfloyd_core.stage_config import StageConfig, device_fault
from deepfloyd_core.stage_loss import Prepared, Setup, batch_loss, feed, predict_noise, prepare
from deepfloyd_core.types import hash_seed
from deepfloyd_core.validation import Validation, read_losses, write_validations
from deepfloyd_core.wanted import wanted_pictures

METRICS_FILE, LOSS_CURVE = "metrics.parquet", "loss.png"


def train_job(job: Job) -> dict[str, Any]:
    """Train a stage's LoRA, biases or UNet into job.out, from its newest checkpoint. Returns the manifest's summary."""
    stage: Stage = job.options["stage"]
    folder = Path(job.options["model"])
    use_threads(job.config.num_threads)
    setup = _set_up(job, stage, folder)
    held_out, inputs = eval_ids(job.inputs["eval_set"]), job.inputs
    rows = TrainingRows(inputs["pixels"], held_out, inputs.get("conditioning"), inputs.get("low_res"))
    order = _order(setup, rows, job)
    validation = _validation(setup, rows, order, job, folder)
    metrics, trained_now, seconds = _train(setup, rows, order, job, validation)
    method = method_of(setup.config)
    sizes = {name: param.numel() for name, param in setup.unet.named_parameters()}
    trained = sum(sizes[name] for name in trainable(setup.unet))
    method.save(setup.unet, stage, folder, job.out)
    trained_scheduler(folder, setup.config.train_variance).save_pretrained(job.out / "scheduler")
    difference = method.reload(setup.unet, stage, folder, job.out)
    with atomic_path(job.out / METRICS_FILE) as tmp:
        pq.write_table(pa.Table.from_pylist(metrics), tmp)
    tuned, pictures = validation.take(setup.config.max_train_steps)
    with open_board(job.config, job.out, setup.config.max_train_steps) as show:
        show_validation(show, setup.config.max_train_steps, tuned, pictures)
    method.remove(setup.unet, folder)
    base = validation.losses()
    validated = write_validations(base, stage, validation.wanted, job.out)
    save_loss_curve(
        [row["loss"] for row in metrics], f"Stage {'I' * stage} training loss", job.out / LOSS_CURVE, validated
    )
    batch = setup.config.train_batch_size * setup.config.gradient_accumulation_steps
    return {
        "steps": setup.config.max_train_steps,
        "rows": sum(rows.counts.values()),
        "buckets": order.buckets(),
        "trainable_parameters": trained,
        "frozen_parameters": sum(sizes.values()) - trained,
        "first_loss": metrics[0]["loss"],
        "last_loss": metrics[-1]["loss"],
        "eval_loss_base": mean_loss(base),
        "eval_loss": mean_loss(tuned),
        **{f"eval_{name}": value for name, value in compared(base, tuned).items()},
        **_against_parent(setup.config, job.out, tuned),
        "reload_difference": difference,
        "steps_of_this_process": trained_now,
        "samples_per_s": round(trained_now * batch / seconds, 2) if trained_now else None,
    }


def _against_parent(config: StageConfig, out: Path, tuned: list[dict[str, Any]]) -> dict[str, Any]:
    """What the trained model has over the one that it started from."""
    if config.init_lora is None:
        return {}
    parent = read_losses(out, 0)
    return {"eval_loss_parent": mean_loss(parent), "eval_gain_on_parent": compared(parent, tuned)["gain"]}


def _set_up(job: Job, stage: Stage, folder: Path) -> Setup:
    config = job.config.stage(stage)
    device = pick_device(job.config.device)
    if fault := device_fault(config, "rocm" if torch.version.hip else device.type):
        raise ConfigError(f"stage{stage}.{fault}.")
    check_backend(config.dynamo_backend, device, f"stage{stage}.dynamo_backend is {config.dynamo_backend!r}")
    text = job.inputs["text"]
    projected = text.kind != "text_embeds"
    parent = parent_file(job.options["parent"]) if job.options.get("parent") else None
    unet = (load_projected_unet if projected else load_unet)(folder, base_dtype(config))
    method = method_of(config)
    method.prepare(unet, config, hash_seed("lora", job.config.seed, stage))
    if parent is not None:
        method.start(unet, parent)
    set_attention(unet, config.attention_mechanism)
    if config.gradient_checkpointing:
        recompute_activations(unet)
    unet.to(device)
    noising = load_scheduler(folder, "image_noising_scheduler") if stage == 2 else None
    texts = Projected(text).batch if projected else raw_texts(text)
    in_steps = compiled_unet(unet, config.dynamo_backend)
    return Setup(
        stage, config, job.config.seed, unet, load_scheduler(folder), noising, texts, device, job.out, in_steps
    )


def _validation(setup: Setup, rows: TrainingRows, order: MixedOrder, job: Job, folder: Path) -> Validation:
    def predict(x_0: torch.Tensor, draws: Draws, captions: list[str], pair: torch.Tensor | None) -> torch.Tensor:
        follow = None if pair is None else as_conditioning(pair)
        return predict_noise(setup, feed(setup, x_0, draws, list(captions), follow))[0]

    wanted, eval_set, pairs = [], job.inputs["eval_set"], job.inputs.get("eval_conditioning")
    if setup.config.validation_steps:
        wanted = wanted_pictures(job.config, setup.stage, job.options["prompts"], eval_set, pairs)
    grid = grid_pictures(eval_set, rows, order, setup.stage, pairs)
    return Validation(job.config, setup.stage, folder, setup.unet, setup.texts, predict, grid, wanted, job.out)


def _train(
    setup: Setup, rows: TrainingRows, order: MixedOrder, job: Job, validation: Validation
) -> tuple[list[dict[str, Any]], int, float]:
    """The loop. Returns one metrics row for each step, how many steps this process did, and the seconds that they took."""
    config, state = setup.config, _new_state(setup)
    metrics = _resume(state, job.out)
    first, seconds = len(metrics), 0.0
    asked, pace = _StopRequest(), Pace(setup.device)
    passes = config.max_train_steps * config.gradient_accumulation_steps

    def make(number: int) -> Prepared:
        batch = rows.take(*order.batch(number))
        return prepare(setup, batch, number, rows.image_ids(batch))

    with (
        open_board(job.config, job.out, first) as show,
        Ahead(make, config.dataloader_num_workers, passes) as ahead,
    ):
        for step in range(first, config.max_train_steps):
            if _due(config, step) and not validation.taken(step):
                job.report(step, config.max_train_steps, "validation")
                if step > first and step % config.checkpointing_steps:
                    save_checkpoint(job.out, _checkpoint(state, metrics), config.checkpoints_total_limit)
                with asked.at_once(), _averaged(state):
                    show_validation(show, step, *validation.take(step))
                pace = Pace(setup.device)
            setup.unet.train()
            began = time.monotonic()
            metrics.append(_step(setup, state, ahead, step))
            seconds += time.monotonic() - began
            pace.step(config.train_batch_size * config.gradient_accumulation_steps)
            _tell(job, metrics[-1], pace, show)
            finished, stop = step + 1 == config.max_train_steps, asked.stop
            if finished or stop or (step + 1) % config.checkpointing_steps == 0:
                save_checkpoint(job.out, _checkpoint(state, metrics), config.checkpoints_total_limit)
            if stop:
                raise Stop
    asked.release()  # what follows can be long, and starts again from the last checkpoint
    take_average(state.optimizer)
    if state.ema is not None:
        state.ema.copy_to(state.params.values())
    return metrics, config.max_train_steps - first, seconds


def _due(config: StageConfig, step: int) -> bool:
    """Whether there is a validation before a step; before the first one also of a parent, to compare with it."""
    return (
        step % config.validation_steps == 0 if config.validation_steps else step == 0 and config.init_lora is not None
    )


def _tell(job: Job, row: dict[str, Any], pace: Pace, show: Board) -> None:
    values = {name: row[name] for name in ("loss", "lr", "grad_norm")}
    show(row["step"], {**values, "samples_per_s": pace.samples_per_s, "peak_gib": pace.peak_gib}, ())
    line = f"loss {row['loss']:.4f} lr {row['lr']:.1e} grad {row['grad_norm']:.2f}"
    job.report(row["step"], job.config.stage(job.options["stage"]).max_train_steps, f"{line} {pace.line}")


def _step(setup: Setup, state: "_State", ahead: Ahead[Prepared], step: int) -> dict[str, Any]:
    """One optimizer step, `step` counted from 0. Returns its metrics row; raises JobError when anything is not finite."""
    config, lr = setup.config, learning_rate_at(setup.config, step)
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    loss, shown = 0.0, list[str]()
    for micro in range(config.gradient_accumulation_steps):
        number = step * config.gradient_accumulation_steps + micro
        prepared = ahead.take(number)
        part = batch_loss(setup, prepared) / config.gradient_accumulation_steps
        part.backward()  # type: ignore[no-untyped-call]
        loss += part.item()
        shown += prepared.image_ids
    norm = float(torch.nn.utils.clip_grad_norm_(state.params.values(), config.max_grad_norm))
    if not (math.isfinite(loss) and math.isfinite(norm)):
        left, batch = last_good(setup.out), ", ".join(shown)
        raise JobError(f"Step {step + 1}: loss is {loss}, gradient norm {norm}. The batch was {batch}. {left}")
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    if state.ema is not None:
        state.ema.step(state.params.values())
    return {"step": step + 1, "loss": loss, "lr": lr, "grad_norm": norm}


@dataclass(frozen=True)
class _State:
    """What a checkpoint holds beside the metrics."""

    params: dict[str, torch.nn.Parameter]  # those that are trained, by name
    optimizer: torch.optim.Optimizer
    ema: EMAModel | None


def _new_state(setup: Setup) -> _State:
    params = trainable(setup.unet)
    optimizer = make_optimizer(setup.config, params.values(), hash_seed(setup.seed, setup.stage))
    return _State(params, optimizer, make_ema(setup.config, params.values()))


@contextmanager
def _averaged(state: _State) -> Iterator[None]:
    """What would be saved now in place of what is being trained, which comes back to the last bit."""
    averages = state.ema is not None or hasattr(state.optimizer, "eval")
    kept = [param.detach().clone() for param in state.params.values()] if averages else []
    take_average(state.optimizer)
    if state.ema is not None:
        state.ema.copy_to(state.params.values())
    yield
    resume_training(state.optimizer)
    with torch.no_grad():
        for param, value in zip(state.params.values(), kept, strict=averages):
            param.copy_(value)


def _order(setup: Setup, rows: TrainingRows, job: Job) -> MixedOrder:
    config, shares = setup.config, {name: Share(*values) for name, values in job.options.get("shares", {}).items()}
    settings = OrderSettings(
        config.train_batch_size, config.gradient_accumulation_steps, config.max_train_steps,
        hash_seed(setup.seed, setup.stage), job.config.data_backend_sampling == "auto-weighting",
    )  # fmt: skip
    return MixedOrder(rows, shares, settings)


def make_ema(config: StageConfig, params: Iterable[torch.nn.Parameter]) -> EMAModel | None:
    """The moving average of what is trained; in fp32, because in bf16 steps of 1 - decay would be rounded away."""
    return EMAModel([param.detach().float() for param in params], decay=config.ema_decay) if config.use_ema else None


def _checkpoint(state: _State, metrics: list[dict[str, Any]]) -> Checkpoint:
    def tensors(values: Iterable[torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: value.detach().cpu().contiguous() for name, value in zip(state.params, values, strict=True)}

    average = {} if state.ema is None else tensors(state.ema.shadow_params)
    kept, numbers = optimizer_state(state.optimizer, list(state.params))
    return Checkpoint(len(metrics), tensors(state.params.values()), kept, numbers, average, metrics)


def _resume(state: _State, out: Path) -> list[dict[str, Any]]:
    """Go back to the newest checkpoint, if there is one. Returns the metrics of the steps before it."""
    found = load_checkpoint(out)
    if found is None:
        return []
    with torch.no_grad():
        for name, param in state.params.items():
            param.copy_(found.adapter[name])
    restore_optimizer(state.optimizer, list(state.params), found.optimizer, found.numbers)
    if state.ema is not None:
        state.ema.shadow_params = [found.ema[name].to(param.device) for name, param in state.params.items()]
        state.ema.optimization_step = found.step
    return list(found.metrics)


class _StopRequest:
    """Remembers SIGTERM until the step in hand is done, so that a checkpoint holds a whole step."""

    def __init__(self) -> None:
        self.stop = False
        self._before = signal.signal(signal.SIGTERM, self._on_signal)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """SIGTERM ends what is done meanwhile as it would have before: it can be long, and a checkpoint was written."""
        self.release()
        yield
        signal.signal(signal.SIGTERM, self._on_signal)

    def release(self) -> None:
        """Give the signal back to whom it was taken from."""
        signal.signal(signal.SIGTERM, self._before)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.stop = True
