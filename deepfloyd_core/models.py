"""Loading: the library's own classes from a resolved model folder, and names of dtypes and devices.

safetensors only; a `.bin` is a pickle and is never read.
"""

from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, IFPipeline, IFSuperResolutionPipeline, UNet2DConditionModel

from deepfloyd_core.flavours import Stage

DTYPES = {"fp32": torch.float32, "no": torch.float32, "bf16": torch.bfloat16}
PIPELINES = {1: IFPipeline, 2: IFSuperResolutionPipeline}


def pick_device(name: str, process: int = 0) -> torch.device:
    """`auto` takes cuda (also rocm), then mps, then the CPU. `process`: of several at once, which take turns at the GPUs."""
    if name == "cuda" or (name == "auto" and torch.cuda.is_available()):
        return torch.device("cuda", process % max(1, torch.cuda.device_count()))
    if name != "auto":
        return torch.device(name)
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def use_threads(count: int | None) -> None:
    """Set torch's CPU threads; None leaves its own choice."""
    if count is not None:
        torch.set_num_threads(count)


def load_unet(folder: Path, dtype: torch.dtype) -> UNet2DConditionModel:
    """The UNet of a pipeline folder, frozen, in eval mode."""
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", torch_dtype=dtype, use_safetensors=True)
    unet.requires_grad_(False)
    return unet.eval()


def load_scheduler(folder: Path, name: str = "scheduler", **changes: Any) -> DDPMScheduler:
    """A DDPM scheduler of a pipeline folder; `changes` override its config."""
    return DDPMScheduler.from_pretrained(folder, subfolder=name, **changes)


def trained_scheduler(folder: Path) -> DDPMScheduler:
    """The scheduler to sample a LoRA with: training leaves the variance half alone, so the variance is fixed_small."""
    return load_scheduler(folder, variance_type="fixed_small")


def stock_pipeline(folder: Path, stage: Stage, unet: UNet2DConditionModel, scheduler: DDPMScheduler) -> Any:
    """diffusers' own pipeline of a stage around a UNet, without text encoder, safety checker and watermarker."""
    absent = dict.fromkeys(("tokenizer", "text_encoder", "safety_checker", "feature_extractor", "watermarker"))
    parts: dict[str, Any] = {**absent, "unet": unet, "scheduler": scheduler, "requires_safety_checker": False}
    if stage == 2:
        parts["image_noising_scheduler"] = load_scheduler(folder, "image_noising_scheduler")
    pipeline = PIPELINES[stage](**parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
