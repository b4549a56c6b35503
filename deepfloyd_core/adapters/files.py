"""The files that a training writes, by fine-tuning method, and the settings that choose the method. No torch."""

from dataclasses import dataclass
from pathlib import Path

from deepfloyd_core.config.stage import StageConfig

LORA_FILE = "pytorch_lora_weights.safetensors"  # the name that diffusers looks for
BITFIT_FILE = "bitfit_biases.safetensors"
CONTROL_FILE = "controlnet_lora.safetensors"
UNET_FOLDER = "unet"  # the name that diffusers gives it in a pipeline


@dataclass(frozen=True)
class Product:
    """The output of one method: a file of weights, or the folder of a whole UNet."""

    name: str
    words: str
    model_type: str
    use_bitfit: bool = False
    controlnet: bool = False

    def unlike(self, config: StageConfig) -> list[str]:
        """The settings that differ from those that train this product, as a run file spells them."""
        keys = {"model_type": self.model_type, "use_bitfit": self.use_bitfit, "controlnet": self.controlnet}
        return [f"{key} = {str(value).lower()}" for key, value in keys.items() if getattr(config, key) != value]


LORA = Product(LORA_FILE, "a LoRA", "lora")
CONTROL = Product(CONTROL_FILE, "a ControlNet-LoRA", "lora", controlnet=True)
BITFIT = Product(BITFIT_FILE, "biases", "lora", use_bitfit=True)
FULL = Product(UNET_FOLDER, "a UNet", "full")
PRODUCTS = (BITFIT, CONTROL, FULL, LORA)


def product_of(config: StageConfig) -> Product:
    """The product that a stage's settings train."""
    return next(product for product in PRODUCTS if not product.unlike(config))


def product_name(folder: Path) -> str:
    """The name of the product in a folder that a training wrote."""
    return next((product.name for product in PRODUCTS if (folder / product.name).exists()), LORA_FILE)
