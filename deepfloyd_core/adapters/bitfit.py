"""BitFit (Ben Zaken et al. 2022): only the biases of a UNet are trained, 0.06 % of IF-I-M, without adapters.

The biases of the text modules are not trained, because their outputs are stored. The file uses the names of the stock
UNet's state dict: `unet.load_state_dict(..., strict=False)` loads it, diffusers' `load_lora_weights` does not.
"""

from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors import SafetensorError
from safetensors.torch import load_file

from deepfloyd_core.adapters.files import BITFIT_FILE
from deepfloyd_core.config.flavours import TEXT_MODULES
from deepfloyd_core.config.stage import StageConfig
from deepfloyd_core.config.stages import Stage
from deepfloyd_core.errors import ArtifactError
from deepfloyd_core.models.same_output import output_change, small_change
from deepfloyd_core.models.tensor_files import save_tensors
from deepfloyd_core.models.unet import adapter_dtype, unet_weights


def biases(unet: UNet2DConditionModel) -> dict[str, torch.nn.Parameter]:
    """Every bias outside the text modules, by name."""
    found = ((name, param) for name, param in unet.named_parameters() if name.endswith(".bias"))
    return {name: param for name, param in found if name.split(".")[0] not in TEXT_MODULES}


def free_biases(unet: UNet2DConditionModel, config: StageConfig, seed: int) -> None:
    """Make the biases trainable, in the dtype of their optimizer. Nothing is random: `seed` is not used."""
    dtype = adapter_dtype(config)
    for name, module in unet.named_modules():
        if name.split(".")[0] not in TEXT_MODULES and isinstance(module, torch.nn.GroupNorm | torch.nn.LayerNorm):
            module.to(dtype)  # torch's norms take no bias of another dtype than their weight
    for param in biases(unet).values():
        param.data = param.data.to(dtype)
        param.requires_grad_(True)


def save_biases(unet: UNet2DConditionModel, stage: Stage, folder: Path, out: Path) -> None:
    """Write the biases, of either stage; the same bytes for the same weights."""
    state = {name: param.detach().cpu().contiguous() for name, param in sorted(biases(unet).items())}
    save_tensors(state, out / BITFIT_FILE)


def load_biases(unet: UNet2DConditionModel, file: Path) -> dict[str, torch.Tensor]:
    """Load a saved file's biases into a UNet, and return them. Raises ArtifactError unless the file has all, and
    nothing else.
    """
    try:
        state: dict[str, torch.Tensor] = load_file(file)
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{file} cannot be read: {error}") from None
    missing, extra = sorted(biases(unet).keys() - state.keys()), sorted(state.keys() - biases(unet).keys())
    if missing or extra:
        raise ArtifactError(f"{file} does not fit this UNet: it lacks {missing[:3]} and has extra {extra[:3]}.")
    unet.load_state_dict(state, strict=False)
    return state


def restore_biases(unet: UNet2DConditionModel, folder: Path) -> None:
    """Restore the biases of the base model in `folder`."""
    unet.load_state_dict(unet_weights(folder, biases(unet).__contains__), strict=False)


def reload_biases(unet: UNet2DConditionModel, stage: Stage, folder: Path, out: Path) -> float:
    """Load the saved file in place of the trained biases, into the base model in its own dtype; both must be equal.

    In fp32 the outputs for a fixed input are also compared, and their largest difference is returned. Raises
    ArtifactError on any difference.
    """
    dtype = unet.conv_in.weight.dtype
    trained = {name: param.detach().clone() for name, param in biases(unet).items()}
    change = output_change(unet, folder, dtype)
    restore_biases(unet.to(dtype), folder)
    saved, loaded = load_biases(unet, out / BITFIT_FILE), biases(unet)
    for name, tensor in trained.items():
        if not (torch.equal(tensor, saved[name].to(tensor.device)) and torch.equal(tensor.to(dtype), loaded[name])):
            raise ArtifactError(f"{out}: {name} has other values after reloading.")
    return small_change(change, f"{out}: the output with the reloaded biases")
