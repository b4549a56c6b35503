"""The training loss of every stage: draws, the UNet's inputs and the comparison; and the UNet's epsilon for any draws."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel

from deepfloyd_core.adapters.controlnet import control_of
from deepfloyd_core.config.stage import StageConfig
from deepfloyd_core.config.stages import Stage
from deepfloyd_core.diffusion.back_projection import back_projected
from deepfloyd_core.diffusion.conditioning import as_conditioning, conditioning_picture
from deepfloyd_core.diffusion.degradations import degrade
from deepfloyd_core.diffusion.loss import (
    Text,
    estimate,
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
from deepfloyd_core.diffusion.variance import reverse_steps, vlb_bits
from deepfloyd_core.hashing import caption_id, hash_seed
from deepfloyd_core.models.unet import DTYPES, autocast
from deepfloyd_core.training.batches import Batch, Draws, Rollout, draw
from deepfloyd_core.training.draws import vary
from deepfloyd_core.training.eval_loss import Predict
from deepfloyd_core.training.ranks import ALONE, Ranks
from deepfloyd_core.training.sharded import Shards
from deepfloyd_core.training.turns import Turns, turns_of


@dataclass(frozen=True)
class TrainingContext:
    """Everything that stays the same over a run."""

    stage: Stage
    config: StageConfig
    seed: int
    unet: UNet2DConditionModel
    scheduler: DDPMScheduler
    noising: DDPMScheduler | None  # of an upscaler's low-res pictures; None: the stage is no upscaler
    texts: Callable[[list[str]], Text]  # of caption ids, as the UNet takes them
    device: torch.device
    out: Path
    # The compiled UNet; None: not compiled. Training steps only.
    compiled: Callable[..., Any] | None = None
    has_parent: bool = False  # it starts from trained weights
    is_previewed: bool = False  # `validation_step_interval` is of previews, which are not asked for
    model: Path | None = None  # the folder of the base model, for what is said of it
    ranks: Ranks = ALONE
    shards: Shards | None = None  # the UNet is spread over the ranks; None: each has all of it

    def whole(self) -> "TrainingContext":
        """With a UNet that has all weights as they are now. All ranks call it."""
        if self.shards is None:
            return self
        return replace(self, unet=self.shards.whole_unet(), shards=None, compiled=None)

    @property
    def turns(self) -> Turns:
        """Which part of each step this process computes."""
        return turns_of(self.config, self.ranks.rank, self.ranks.size)


@dataclass(frozen=True)
class UNetInput:
    """The inputs of the UNet for a batch, on the CPU."""

    x: torch.Tensor  # float32 (B, 3 or 6, H, W)
    t: torch.Tensor
    level: torch.Tensor | None  # Stage II's class label
    text: Text
    control: torch.Tensor | None = None  # a ControlNet's conditioning
    small: torch.Tensor | None = None  # Stage II's low-res pictures themselves, complete even if x is a window

    def at(self, x_t: torch.Tensor, t: torch.Tensor) -> "UNetInput":
        """The same batch at another timestep; x_t: (B, C, H, W)."""
        return replace(self, x=torch.cat([x_t, self.x[:, x_t.shape[1] :]], dim=1), t=t)


@dataclass(frozen=True)
class Prepared:
    """The inputs of a forward pass, without the UNet's part."""

    number: int
    image_ids: list[str]
    x_0: torch.Tensor  # float32 (B, C, H, W) in [-1, 1]
    draws: Draws
    fed: UNetInput


def prepare(context: TrainingContext, batch: Batch, number: int, image_ids: list[str]) -> Prepared:
    """Everything that forward pass `number` needs, on the CPU; any thread may make it, before its turn."""
    x_0 = to_model_range(batch.pixels)
    seed = hash_seed(context.seed, context.stage)
    draws = draw(x_0.shape, seed, number, context.config.caption_dropout_probability)
    draws = vary(draws, context.config, seed, number)
    if context.config.random_flip:
        x_0 = _mirrored(x_0, draws)
    hint = None if batch.pairs is None else as_conditioning(batch.pairs)
    if hint is not None and context.config.random_flip:
        hint = _mirrored(hint, draws)
    remakes = None if batch.remakes is None else to_model_range(batch.remakes)
    if remakes is not None and context.config.random_flip:
        remakes = _mirrored(remakes, draws)
    kept = zip(batch.caption_ids, draws.keep_caption.tolist(), strict=True)
    fed = feed(context, x_0, draws, [name if keep else None for name, keep in kept], hint, remakes)
    return Prepared(number, image_ids, x_0, draws, fed)


def feed(
    context: TrainingContext, x_0: torch.Tensor, draws: Draws, captions: list[str | None], hint: torch.Tensor | None = None,
    remakes: torch.Tensor | None = None,
) -> UNetInput:  # fmt: skip
    """The UNet's inputs for drawn noise. x_0: float32 (B, C, H, W); captions: ids, None for the empty one.

    hint: a ControlNet's conditioning, float32 (B, 3, H, W) in [0, 1], if it is not computed from x_0. remakes: Stage
    I's low-res pictures, float32 (B, C, H/4, W/4) in [-1, 1], for the samples that are drawn to have them.
    """
    x = context.scheduler.add_noise(x_0, draws.fed, draws.t)  # in fp32 on the CPU, cast afterwards
    level = small = None
    if context.noising is not None:
        small = low_res(x_0)
        if draws.remade is not None:
            assert remakes is not None  # otherwise it would train on true pictures, whatever the share
            small = torch.where(draws.remade[:, None, None, None], remakes, small)
        if draws.degradation is not None:
            small = degrade(small, draws.degradation)
        upscaled = upscaled_input(small, draws.low_res_noise, draws.level, context.noising)
        x, level = torch.cat([x, upscaled], dim=1), draws.level
    controlnet = control_of(context.unet)
    if controlnet is not None and controlnet.conditioning != "paired":
        hint = conditioning_picture(controlnet.conditioning, x_0)
    assert controlnet is None or hint is not None  # otherwise it would train without conditioning
    text = context.texts([caption_id("") if name is None else name for name in captions])
    return UNetInput(draws.cut(x), draws.t, level, text, hint, small)


def _mirrored(pictures: torch.Tensor, draws: Draws) -> torch.Tensor:
    """Pictures (B, C, H, W); the drawn ones are mirrored."""
    return torch.where(draws.mirror[:, None, None, None], pictures.flip(-1), pictures)


def predict_noise(
    context: TrainingContext, fed: UNetInput, compiled: Callable[..., Any] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The two halves of the UNet's output, epsilon and raw variance, each (B, C, h, w); `compiled`: the compiled UNet,
    if any.
    """
    device, dtype = context.device, DTYPES[context.config.mixed_precision]
    level, control = (None if value is None else value.to(device) for value in (fed.level, fed.control))
    with autocast(device, context.config.mixed_precision):
        x, t, text = fed.x.to(device, dtype), fed.t.to(device), fed.text.to(device, dtype)
        return predict(compiled or context.unet, x, t, text, level, control)


def predictor(context: TrainingContext) -> Predict:
    """The UNet's epsilon for given draws."""

    def predicted(x_0: torch.Tensor, draws: Draws, caption_ids: list[str], pair: torch.Tensor | None) -> torch.Tensor:
        hint = None if pair is None else as_conditioning(pair)
        return predict_noise(context, feed(context, x_0, draws, list(caption_ids), hint))[0]

    return predicted


def batch_loss(context: TrainingContext, prepared: Prepared) -> torch.Tensor:
    """Training loss of a forward pass: a scalar, the mean over its samples."""
    x_0, draws, fed = prepared.x_0, prepared.draws, prepared.fed
    # lora_dropout draws from torch's own state
    torch.manual_seed(hash_seed("dropout", context.seed, context.stage, prepared.number))
    noise = draws.cut(draws.noise)
    if draws.rollout is not None:
        fed, astray = roll_out(context, prepared, draws.rollout)
        noise = noise + astray
    eps, raw = predict_noise(context, fed, context.compiled)
    loss = (_error(context, eps, noise.to(context.device), draws.t) * _weight(context, draws)).mean()
    if context.config.train_variance:
        steps = reverse_steps(context.scheduler.betas, draws.t.to(context.device))
        fed_noise, x_0 = (draws.cut(whole).to(context.device) for whole in (draws.fed, x_0))
        bits = vlb_bits(eps, raw, fed_noise, x_0, steps)
        if draws.rollout is not None:  # it is a bound only for an x_t that is made from x_0
            bits = bits * ~draws.rollout.taken.to(context.device)
        loss = loss + bits.mean()
    return loss


def roll_out(context: TrainingContext, prepared: Prepared, rollout: Rollout) -> tuple[UNetInput, torch.Tensor]:
    """The batch with the model's own errors in it: x_t is made from the model's estimate of x_0 at the rollout's timestep t.

    Sampling goes from estimate to estimate. A model that never saw its own estimates in training accumulates their
    errors (exposure bias). This is scheduled sampling (Bengio et al. 2015; for diffusion Deng et al. 2023) in one step
    of any length, whose estimate gets new noise. The estimate is clipped to [-1, 1] and, if the stage's samples are,
    back-projected. It is the conditional one, by the weights that are being trained.

    The training target is still the true picture. Returns the batch, and the tensor that must be added to its noise so
    that the target epsilon leads from x_t to x_0: (B, C, H, W), on the CPU.
    """
    x_0, draws, bars = prepared.draws.cut(prepared.x_0), prepared.draws, context.scheduler.alphas_cumprod
    if not rollout.taken.any() and context.shards is None:
        return prepared.fed, torch.zeros_like(x_0)
    earlier = context.scheduler.add_noise(x_0, draws.cut(rollout.noise), rollout.t)
    context.unet.eval()  # no dropout, as in sampling
    with torch.no_grad():
        eps, _ = predict_noise(context, prepared.fed.at(earlier, rollout.t))
    context.unet.train()
    guess = estimate(earlier, eps.float().cpu(), bars[rollout.t].reshape(-1, 1, 1, 1))
    if context.config.validation_back_projection:
        assert prepared.fed.small is not None  # Stage I cannot ask for it
        guess = draws.cut(back_projected(draws.put(guess, prepared.x_0), prepared.fed.small))
    guess = torch.where(rollout.taken.reshape(-1, 1, 1, 1), guess, x_0)
    bar = bars[draws.t].reshape(-1, 1, 1, 1)
    x_t = context.scheduler.add_noise(guess, draws.cut(draws.fed), draws.t)
    return prepared.fed.at(x_t, draws.t), (guess - x_0) * (bar / (1 - bar)).sqrt()


def _error(context: TrainingContext, eps: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Each sample's error in epsilon, by the stage's `loss_type`: (B,). t: int64 (B,), on the CPU."""
    config = context.config
    if config.loss_type == "l2":
        return squared_error(eps, noise)
    c = huber_width(config.huber_schedule, config.huber_c, t, context.scheduler.alphas_cumprod[t])
    c = c.to(context.device)
    error = pseudo_huber(eps, noise, c)
    return error / c if config.loss_type == "smooth_l1" else error


def _weight(context: TrainingContext, draws: Draws) -> torch.Tensor:
    """The loss weight of each sample: (B,)."""
    alpha_bar = context.scheduler.alphas_cumprod[draws.t].to(context.device)
    if context.config.use_soft_min_snr:
        return soft_min_snr_weight(alpha_bar, context.config.soft_min_snr_sigma_data)
    return min_snr_weight(alpha_bar, context.config.snr_gamma)
