"""The fine-tuning methods of a UNet: for each the functions that the trainer and the sampler call."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from deepfloyd_core.adapters.bitfit import free_biases, load_biases, reload_biases, restore_biases, save_biases
from deepfloyd_core.adapters.controlnet import (
    add_control,
    load_control,
    reload_control,
    remove_control,
    save_control,
    start_control,
)
from deepfloyd_core.adapters.files import BITFIT_FILE, CONTROL_FILE, LORA_FILE, UNET_FOLDER, product_name, product_of
from deepfloyd_core.adapters.full import free_all, load_full, reload_unet, restore_unet, save_unet
from deepfloyd_core.adapters.lora import ADAPTER, add_lora, load_adapters, reload_saved, remove_lora, save_lora
from deepfloyd_core.config.stage import StageConfig
from deepfloyd_core.config.stages import Stage
from deepfloyd_core.models.headers import UNET_WEIGHTS
from deepfloyd_core.models.unet import DTYPES, adapter_dtype


@dataclass(frozen=True)
class Method:
    """The functions of one fine-tuning method."""

    prepare: Callable[[UNet2DConditionModel, StageConfig, int], None]  # with a seed
    start: Callable[[UNet2DConditionModel, Path], object]  # after that, from a saved file
    save: Callable[[UNet2DConditionModel, Stage, Path, Path], None]  # base folder, folder to save in
    reload: Callable[[UNet2DConditionModel, Stage, Path, Path], float]  # base folder, saved folder
    remove: Callable[[UNet2DConditionModel, Path], None]  # with the base folder
    load: Callable[[Any, Path], object]  # into a stock pipeline, from the saved folder


# By the name of what it leaves; `files.PRODUCTS` has the settings that choose it.
METHODS = {
    LORA_FILE: Method(
        add_lora, load_adapters, save_lora, reload_saved, remove_lora,
        lambda pipeline, out: pipeline.load_lora_weights(out, adapter_name=ADAPTER),
    ),
    BITFIT_FILE: Method(
        free_biases, load_biases, save_biases, reload_biases, restore_biases,
        lambda pipeline, out: load_biases(pipeline.unet, out / BITFIT_FILE),
    ),
    CONTROL_FILE: Method(
        add_control, start_control, save_control, reload_control, remove_control,
        lambda pipeline, out: load_control(pipeline.unet, out / CONTROL_FILE),
    ),
    UNET_FOLDER: Method(
        free_all, load_full, save_unet, reload_unet, restore_unet,
        lambda pipeline, out: load_full(pipeline.unet, out / UNET_FOLDER / UNET_WEIGHTS),
    ),
}  # fmt: skip


def method_of(config: StageConfig) -> Method:
    """The method that a stage's settings choose."""
    return METHODS[product_of(config).name]


def base_dtype(config: StageConfig) -> torch.dtype:
    """The dtype in which a stage's base model is loaded: that of the frozen weights, or of the trained ones."""
    return adapter_dtype(config) if config.model_type == "full" else DTYPES[config.mixed_precision]


def load_product(pipeline: Any, out: Path) -> None:
    """Load the product in a training's folder into a stock pipeline."""
    METHODS[product_name(out)].load(pipeline, out)
