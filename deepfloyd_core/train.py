"""One trainer for both stages: LoRA or BitFit on the noise prediction, exact to the byte when killed and started again.

Every draw is a function of (seed, forward pass), the learning rate one of the step, the batch order one of the epoch;
so a checkpoint holds the adapters, their moving average, the optimizer's state and a step number, nothing else.
"""

import math
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import EMAModel

from deepfloyd_core.batches import Batch, Draws, MixedOrder, OrderSettings, TrainingRows, draw
from deepfloyd_core.checkpoints import Checkpoint, load_checkpoint, save_checkpoint
from deepfloyd_core.errors import ConfigError, JobError, Stop
from deepfloyd_core.files import atomic_path
from deepfloyd_core.flavours import Stage
from deepfloyd_core.jobs import Job
from deepfloyd_core.lora import trainable
from deepfloyd_core.methods import method_of
from deepfloyd_core.mixing import Share
from deepfloyd_core.models import (
    DTYPES,
    autocast,
    load_projected_unet,
    load_scheduler,
    load_unet,
    pick_device,
    trained_scheduler,
    use_threads,
)
from deepfloyd_core.objective import (
    Text,
    huber_width,
    low_res,
    min_snr_weight,
    predict,
    pseudo_huber,
    soft_min_snr_weight,
    squared_error,
    to_model_range,
    upscaled_input,
)
from deepfloyd_core.optimizers import make_optimizer, optimizer_state, restore_optimizer, take_average
from deepfloyd_core.projected import Projected, raw_texts
from deepfloyd_core.row_list import eval_ids, shard_files
from deepfloyd_core.schedule import learning_rate_at
from deepfloyd_core.shards import open_shard, read_rows
from deepfloyd_core.sheets import save_loss_curve
from deepfloyd_core.stage_config import StageConfig, device_fault
from deepfloyd_core.types import caption_id, hash_seed
from deepfloyd_core.variance import reverse_steps, vlb_bits
from deepfloyd_core.varied_draws import vary

METRICS_FILE, LOSS_CURVE = "metrics.parquet", "loss.png"
EVAL_TIMESTEPS = (200, 500, 800)


@dataclass(frozen=True)
class Setup:
    """Everything that stays the same over a run."""

    stage: Stage
    config: StageConfig
    seed: int
    unet: UNet2DConditionModel
    scheduler: DDPMScheduler
    noising: DDPMScheduler | None  # Stage II's image_noising_scheduler
    texts: Callable[[list[str]], Text]  # of caption ids, as the UNet takes them
    device: torch.device


def train_job(job: Job) -> dict[str, Any]:
    """Train a stage's LoRA or biases into job.out; resume from its newest checkpoint. Returns the manifest's summary."""
    stage: Stage = job.options["stage"]
    folder = Path(job.options["model"])
    use_threads(job.config.num_threads)
    setup = _set_up(job, stage, folder)
    rows = TrainingRows(job.inputs["pixels"], eval_ids(job.inputs["eval_set"]))
    started = time.monotonic()
    metrics, trained_now = _train(setup, rows, job)
    seconds = time.monotonic() - started
    method = method_of(setup.config)
    sizes = {name: param.numel() for name, param in setup.unet.named_parameters()}
    trained = sum(sizes[name] for name in trainable(setup.unet))
    method.save(setup.unet, stage, job.out)
    trained_scheduler(folder, setup.config.train_variance).save_pretrained(job.out / "scheduler")
    difference = method.reload(setup.unet, stage, folder, job.out)
    with atomic_path(job.out / METRICS_FILE) as tmp:
        pq.write_table(pa.Table.from_pylist(metrics), tmp)
    save_loss_curve([row["loss"] for row in metrics], f"Stage {'I' * stage} training loss", job.out / LOSS_CURVE)
    tuned = _eval_loss(setup, job.inputs["eval_set"])
    method.remove(setup.unet, folder)
    base = _eval_loss(setup, job.inputs["eval_set"])
    batch = setup.config.train_batch_size * setup.config.gradient_accumulation_steps
    return {
        "steps": setup.config.max_train_steps,
        "rows": sum(rows.counts.values()),
        "trainable_parameters": trained,
        "frozen_parameters": sum(sizes.values()) - trained,
        "first_loss": metrics[0]["loss"],
        "last_loss": metrics[-1]["loss"],
        "eval_loss_base": base,
        "eval_loss": tuned,
        "reload_difference": difference,
        "steps_of_this_process": trained_now,
        "samples_per_s": round(trained_now * batch / seconds, 2) if trained_now else None,
    }


def _set_up(job: Job, stage: Stage, folder: Path) -> Setup:
    config = job.config.stage(stage)
    device = pick_device(job.config.device)
    if fault := device_fault(config.optimizer, device.type):
        raise ConfigError(f"stage{stage}.{fault}.")
    text = job.inputs["text"]
    projected = text.kind != "text_embeds"
    unet = (load_projected_unet if projected else load_unet)(folder, DTYPES[config.mixed_precision])
    method_of(config).prepare(unet, config, hash_seed("lora", job.config.seed, stage))
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    unet.to(device)
    noising = load_scheduler(folder, "image_noising_scheduler") if stage == 2 else None
    texts = Projected(text).batch if projected else raw_texts(text)
    return Setup(stage, config, job.config.seed, unet, load_scheduler(folder), noising, texts, device)


def _train(setup: Setup, rows: TrainingRows, job: Job) -> tuple[list[dict[str, Any]], int]:
    """The loop. Returns one metrics row for each step, and how many steps this process did."""
    config, unet = setup.config, setup.unet
    params = trainable(unet)
    optimizer = make_optimizer(config, params.values(), hash_seed(setup.seed, setup.stage))
    order = _order(setup, rows, job)
    ema = make_ema(config, params.values())
    metrics = _resume(params, optimizer, ema, job.out)
    first = len(metrics)
    asked = _StopRequest()
    unet.train()
    for step in range(first, config.max_train_steps):
        lr = learning_rate_at(config, step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss, batches = 0.0, []
        for micro in range(config.gradient_accumulation_steps):
            number = step * config.gradient_accumulation_steps + micro
            batch = rows.take(*order.batch(number))
            part = batch_loss(setup, batch, number) / config.gradient_accumulation_steps
            part.backward()  # type: ignore[no-untyped-call]
            loss += part.item()
            batches.append(batch)
        norm = float(torch.nn.utils.clip_grad_norm_(params.values(), config.max_grad_norm))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            shown = ", ".join(name for batch in batches for name in rows.image_ids(batch))
            raise JobError(f"Step {step + 1}: loss is {loss}, gradient norm {norm}. The batch was {shown}.")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if ema is not None:
            ema.step(params.values())
        metrics.append({"step": step + 1, "loss": loss, "lr": lr, "grad_norm": norm})
        job.report(step + 1, config.max_train_steps, f"loss {loss:.4f}  lr {lr:.2e}  grad {norm:.3f}")
        finished = step + 1 == config.max_train_steps
        if not finished and (asked.stop or (step + 1) % config.checkpointing_steps == 0):
            save_checkpoint(job.out, _checkpoint(params, optimizer, ema, metrics), config.checkpoints_total_limit)
        if asked.stop:
            raise Stop
    take_average(optimizer)
    if ema is not None:
        ema.copy_to(params.values())
    return metrics, config.max_train_steps - first


def _order(setup: Setup, rows: TrainingRows, job: Job) -> MixedOrder:
    config, shares = setup.config, {name: Share(*values) for name, values in job.options.get("shares", {}).items()}
    settings = OrderSettings(
        config.train_batch_size, config.gradient_accumulation_steps, config.max_train_steps,
        hash_seed(setup.seed, setup.stage), job.config.data_backend_sampling == "auto-weighting",
    )  # fmt: skip
    return MixedOrder(rows, shares, settings)


def batch_loss(setup: Setup, batch: Batch, number: int) -> torch.Tensor:
    """Training loss of forward pass `number`."""
    x_0 = to_model_range(batch.pixels)
    seed = hash_seed(setup.seed, setup.stage)
    draws = draw(x_0.shape, seed, number, setup.config.caption_dropout_probability)
    draws = vary(draws, setup.config, seed, number)
    if setup.config.random_flip:
        x_0 = torch.where(draws.mirror[:, None, None, None], x_0.flip(-1), x_0)
    kept = zip(batch.caption_ids, draws.keep_caption.tolist(), strict=True)
    captions = [name if keep else None for name, keep in kept]
    torch.manual_seed(
        hash_seed("dropout", setup.seed, setup.stage, number)
    )  # lora_dropout draws from torch's own state
    eps, raw = _predict(setup, x_0, draws, captions)
    loss = (_error(setup, eps, draws) * _weight(setup, draws)).mean()
    if setup.config.train_variance:
        steps = reverse_steps(setup.scheduler.betas, draws.t.to(setup.device))
        loss = loss + vlb_bits(eps, raw, draws.fed.to(setup.device), x_0.to(setup.device), steps).mean()
    return loss


def _error(setup: Setup, eps: torch.Tensor, draws: Draws) -> torch.Tensor:
    """Each sample's error in epsilon, by the stage's `loss_type`: (B,)."""
    config, noise = setup.config, draws.noise.to(setup.device)
    if config.loss_type == "l2":
        return squared_error(eps, noise)
    c = huber_width(config.huber_schedule, config.huber_c, draws.t, setup.scheduler.alphas_cumprod[draws.t])
    c = c.to(setup.device)
    error = pseudo_huber(eps, noise, c)
    return error / c if config.loss_type == "smooth_l1" else error


def _weight(setup: Setup, draws: Draws) -> torch.Tensor:
    """What each sample's error counts: (B,)."""
    alpha_bar = setup.scheduler.alphas_cumprod[draws.t].to(setup.device)
    if setup.config.use_soft_min_snr:
        return soft_min_snr_weight(alpha_bar, setup.config.soft_min_snr_sigma_data)
    return min_snr_weight(alpha_bar, setup.config.snr_gamma)


def _predict(
    setup: Setup, x_0: torch.Tensor, draws: Draws, captions: list[str | None]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The halves of the UNet's output for drawn noise. x_0: float32 (B, C, H, W); captions: ids, None for the empty one."""
    x = setup.scheduler.add_noise(x_0, draws.fed, draws.t)  # in fp32 on the CPU, cast afterwards
    level = None
    if setup.noising is not None:
        upscaled = upscaled_input(low_res(x_0), draws.low_res_noise, draws.level, setup.noising)
        x, level = torch.cat([x, upscaled], dim=1), draws.level.to(setup.device)
    text = setup.texts([caption_id("") if name is None else name for name in captions])
    dtype = DTYPES[setup.config.mixed_precision]
    x, text, t = x.to(setup.device, dtype), text.to(setup.device, dtype), draws.t.to(setup.device)
    with autocast(setup.device, setup.config.mixed_precision):
        return predict(setup.unet, x, t, text, level)


def make_ema(config: StageConfig, params: Iterable[torch.nn.Parameter]) -> EMAModel | None:
    """The moving average of what is trained; in fp32, because in bf16 steps of 1 - decay would be rounded away."""
    return EMAModel([param.detach().float() for param in params], decay=config.ema_decay) if config.use_ema else None


def _checkpoint(
    params: dict[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    ema: EMAModel | None,
    metrics: list[dict[str, Any]],
) -> Checkpoint:
    def tensors(values: Iterable[torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: value.detach().cpu().contiguous() for name, value in zip(params, values, strict=True)}

    average = {} if ema is None else tensors(ema.shadow_params)
    state, numbers = optimizer_state(optimizer, list(params))
    return Checkpoint(len(metrics), tensors(params.values()), state, numbers, average, metrics)


def _resume(
    params: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer, ema: EMAModel | None, out: Path
) -> list[dict[str, Any]]:
    found = load_checkpoint(out)
    if found is None:
        return []
    with torch.no_grad():
        for name, param in params.items():
            param.copy_(found.adapter[name])
    restore_optimizer(optimizer, list(params), found.optimizer, found.numbers)
    if ema is not None:
        ema.shadow_params = [found.ema[name].to(param.device) for name, param in params.items()]
        ema.optimization_step = found.step
    return list(found.metrics)


def _eval_loss(setup: Setup, eval_set: Any) -> float:
    """Mean loss over a fixed grid of (held-out picture, noise, t): the same draws whenever it is called."""
    setup.unet.eval()
    losses = []
    for file in shard_files(eval_set, setup.stage):
        for picture, row in zip(open_shard(file), read_rows(file), strict=True):
            for t in EVAL_TIMESTEPS:
                x_0 = to_model_range(torch.from_numpy(picture.copy())[None])
                drawn = draw(x_0.shape, hash_seed("eval", row.image_id, t), 0, 0.0)
                level = torch.full((1,), setup.config.validation_noise_level)
                draws = replace(drawn, t=torch.tensor([t]), level=level)
                with torch.inference_mode():
                    eps, _ = _predict(setup, x_0, draws, [row.caption_id])
                losses.append(float(squared_error(eps, draws.noise.to(setup.device))))
    return sum(losses) / len(losses)


class _StopRequest:
    """Remembers SIGTERM until the step in hand is done, so that a checkpoint holds a whole step."""

    def __init__(self) -> None:
        self.stop = False
        signal.signal(signal.SIGTERM, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.stop = True
