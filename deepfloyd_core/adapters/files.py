"""Names of the files and folders that a training leaves, by fine-tuning method."""

from pathlib import Path

LORA_FILE = "pytorch_lora_weights.safetensors"  # the name that diffusers looks for
BITFIT_FILE = "bitfit_biases.safetensors"  # in its place after a training with use_bitfit
CONTROL_FILE = "controlnet_lora.safetensors"  # after a training with controlnet
UNET_FOLDER = "unet"  # after a full fine-tuning; the name that diffusers gives it in a pipeline


def product_name(folder: Path) -> str:
    """Name of what a training left in a folder: a file of weights, or the folder of a whole UNet."""
    return next((name for name in (BITFIT_FILE, CONTROL_FILE, UNET_FOLDER) if (folder / name).exists()), LORA_FILE)
