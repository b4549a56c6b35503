"""The ways to fine-tune a UNet, each as what the trainer and the sampler do with it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import UNet2DConditionModel

from deepfloyd_core.bitfit import free_biases, load_biases, reload_biases, restore_biases, save_biases
from deepfloyd_core.flavours import Stage
from deepfloyd_core.lora import ADAPTER, add_lora, reload_saved, remove_lora, save_lora
from deepfloyd_core.products import BITFIT_FILE, product_file
from deepfloyd_core.stage_config import StageConfig


@dataclass(frozen=True)
class Method:
    """One way to fine-tune."""

    prepare: Callable[[UNet2DConditionModel, StageConfig, int], None]  # with a seed
    save: Callable[[UNet2DConditionModel, Stage, Path], None]
    reload: Callable[[UNet2DConditionModel, Stage, Path, Path], float]  # base folder, saved folder
    remove: Callable[[UNet2DConditionModel, Path], None]  # with the base folder


LORA = Method(add_lora, save_lora, reload_saved, remove_lora)
BITFIT = Method(free_biases, save_biases, reload_biases, restore_biases)


def method_of(config: StageConfig) -> Method:
    """The way that a stage's settings ask for."""
    return BITFIT if config.use_bitfit else LORA


def load_product(pipeline: Any, out: Path) -> None:
    """Load what training saved in a folder into a stock pipeline."""
    if product_file(out) == BITFIT_FILE:
        load_biases(pipeline.unet, out)
    else:
        pipeline.load_lora_weights(out, adapter_name=ADAPTER)
