"""Loads models with the library's own classes from a resolved model folder; names of dtypes and devices.

safetensors only; a `.bin` is a pickle and is never read.
"""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from safetensors import safe_open

from deepfloyd_core.config.flavours import TEXT_MODULES
from deepfloyd_core.config.stage import StageConfig
from deepfloyd_core.config.stages import STAGES, Stage
from deepfloyd_core.errors import ModelError
from deepfloyd_core.models.headers import UNET_WEIGHTS, weight_files
from deepfloyd_core.types import Json

DTYPES = {"fp32": torch.float32, "no": torch.float32, "bf16": torch.bfloat16}
_GIVEN_BACK = 1 << 27  # bytes that are freed until they are given back to the system
_WITHOUT_TEXT = dict.fromkeys(("encoder_hid_dim", "encoder_hid_dim_type", "addition_embed_type"))
PIPELINES = {stage: getattr(diffusers, kind.pipeline) for stage, kind in STAGES.items()}


class ProjectedUNet(UNet2DConditionModel):  # type: ignore[misc]
    """A UNet without its text modules. Pass their outputs as encoder_hidden_states, and as the added "pooled"."""

    _keys_to_ignore_on_load_unexpected: ClassVar = [rf"^{name}\." for name in TEXT_MODULES]

    def get_aug_embed(
        self, emb: torch.Tensor, encoder_hidden_states: torch.Tensor, added_cond_kwargs: dict[str, Any]
    ) -> torch.Tensor:
        """The vector that is added to the time embedding: (B, E)."""
        return torch.as_tensor(added_cond_kwargs["pooled"])


def autocast(device: torch.device, mixed_precision: str) -> torch.autocast:
    """bf16 for the products of a UNet, fp32 for the trained parameters."""
    return torch.autocast(device.type, torch.bfloat16, enabled=mixed_precision == "bf16")


def use_threads(count: int | None) -> None:
    """Set torch's CPU threads; None leaves its own choice."""
    if count is not None:
        torch.set_num_threads(count)


def use_repeatable_kernels(device: torch.device) -> None:
    """Make torch use only deterministic GPU kernels, in the whole process.

    By default cuDNN's convolutions and attention may add gradients in the order in which threads finish: then a resumed
    training would end with different bytes than an unbroken one. An operation without a deterministic kernel raises
    RuntimeError when it is called. On a CPU nothing changes: all operations there are deterministic.
    """
    if device.type == "cuda":
        torch.use_deterministic_algorithms(True)
        # It would also fill new memory with NaN, to show reads that come too early, at the cost of a pass over every tensor.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def load_unet(folder: Path, dtype: torch.dtype) -> UNet2DConditionModel:
    """The UNet of a pipeline folder, frozen, in eval mode."""
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", torch_dtype=dtype, use_safetensors=True)
    unet.requires_grad_(False)
    return unet.eval()


def load_projected_unet(folder: Path, dtype: torch.dtype) -> UNet2DConditionModel:
    """The UNet of a pipeline folder without its text modules, frozen, in eval mode."""
    unet = ProjectedUNet.from_pretrained(
        folder, subfolder="unet", torch_dtype=dtype, use_safetensors=True, **_WITHOUT_TEXT
    )
    unet.requires_grad_(False)
    return unet.eval()


def empty_unet(folder: Path, projected: bool) -> UNet2DConditionModel:
    """The UNet of a pipeline folder on torch's `meta` device: no weight is read. `projected`: without its text modules."""
    return unet_on_meta(UNet2DConditionModel.load_config(folder, subfolder="unet"), projected)


def unet_on_meta(config: Json, projected: bool) -> UNet2DConditionModel:
    """The same from a UNet's config."""
    with torch.device("meta"):
        if projected:
            return ProjectedUNet.from_config(config, **_WITHOUT_TEXT)
        return UNet2DConditionModel.from_config(config)


def load_text_modules(folder: Path, dtype: torch.dtype) -> torch.nn.ModuleDict:
    """The two text modules of a folder's UNet by name, frozen; none of its other tensors is read.

    Raises ModelError when it has no text modules of IF's kind.
    """
    unet = empty_unet(folder, projected=False)
    kinds = unet.config.encoder_hid_dim_type, unet.config.addition_embed_type  # older files do not say the first
    if kinds != ("text_proj", "text"):
        raise ModelError(f"{folder}/unet takes its text by {kinds}; a UNet of DeepFloyd IF has ('text_proj', 'text').")
    modules = torch.nn.ModuleDict({name: getattr(unet, name) for name in TEXT_MODULES})
    found = unet_weights(folder, lambda name: name.split(".")[0] in TEXT_MODULES)
    state = {name: tensor.to(dtype) for name, tensor in found.items()}
    lacking = modules.load_state_dict(state, strict=False, assign=True).missing_keys
    if lacking:
        raise ModelError(f"{folder}/unet lacks the weights {', '.join(lacking)}.")
    return modules.requires_grad_(False).eval()


def unet_weights(folder: Path, wanted: Callable[[str], bool]) -> dict[str, torch.Tensor]:
    """Tensors of a folder's UNet by name, as they are stored; other tensors are not read."""
    return dict(each_unet_weight(folder, wanted))


def each_unet_weight(folder: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, torch.Tensor]]:
    """The same tensors one after the other, each read only when it is used."""
    for file in weight_files(folder / "unet", UNET_WEIGHTS):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                if wanted(name):
                    yield name, tensors.get_tensor(name)


def order_channels_last(unet: UNet2DConditionModel) -> None:
    """Store a UNet's frozen convolutions, and so its activations, in channels-last order, which their kernels prefer.

    Results differ in their last bits. Trained parameters are not changed: fused and 8-bit optimizers read weights and
    moments as they lie in memory, and a checkpoint keeps no strides. peft's DoRA of a convolution cannot view its own
    weights in this order, so its UNet stays unchanged. On a CPU, weights that were mapped from their file become the
    process's own.
    """
    freed = 0
    for nbytes in order_frozen_channels_last(unet):
        freed += nbytes
        if freed > _GIVEN_BACK:
            give_back_memory()
            freed = 0
    give_back_memory()


def order_frozen_channels_last(unet: UNet2DConditionModel) -> Iterator[int]:
    """The same, convolution by convolution: yields the bytes of each."""
    if any("lora_magnitude_vector" in name and param.ndim == 4 for name, param in unet.named_parameters()):
        return
    for param in unet.parameters():
        if param.ndim == 4 and not param.requires_grad:
            param.data = param.data.contiguous(memory_format=torch.channels_last)
            yield param.data.nbytes


def give_back_memory() -> None:
    """Give what was freed back to the system, on Linux: glibc keeps it, 0.7 GiB where a UNet of 1.6 GiB was reordered."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def load_scheduler(folder: Path, name: str = "scheduler", **changes: Any) -> DDPMScheduler:
    """A DDPM scheduler of a pipeline folder; `changes` override its config."""
    return DDPMScheduler.from_pretrained(folder, subfolder=name, **changes)


def load_noising_scheduler(folder: Path, stage: Stage) -> DDPMScheduler | None:
    """The scheduler that adds noise to an upscaler's low-res picture; None for a stage that is no upscaler."""
    name = STAGES[stage].noising_scheduler
    return None if name is None else load_scheduler(folder, name)


def trained_scheduler(folder: Path, learned_variance: bool) -> DDPMScheduler:
    """The scheduler for sampling a LoRA: if training left the variance half unchanged, the variance is fixed_small."""
    return load_scheduler(folder, variance_type="learned_range" if learned_variance else "fixed_small")


def stock_pipeline(folder: Path, stage: Stage, unet: UNet2DConditionModel, scheduler: DDPMScheduler) -> Any:
    """diffusers' own pipeline of a stage around a UNet, without text encoder, safety checker and watermarker."""
    absent = dict.fromkeys(("tokenizer", "text_encoder", "safety_checker", "feature_extractor", "watermarker"))
    parts: dict[str, Any] = {**absent, "unet": unet, "scheduler": scheduler, "requires_safety_checker": False}
    parts |= {name: load_scheduler(folder, name) for name in STAGES[stage].schedulers if name not in parts}
    pipeline = PIPELINES[stage](**parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def adapter_dtype(config: StageConfig) -> torch.dtype:
    """The dtype of the trained parameters."""
    return torch.bfloat16 if config.optimizer_kind.bf16_weights else torch.float32
