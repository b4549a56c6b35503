"""Full fine-tuning: every weight of the UNet is trained, also those of its text modules.

The text modules change, so the trainer reads T5's own hidden states, as for LoRAs on those modules. The product is a
UNet as diffusers writes one: `unet/` with the base's unchanged config, in the dtype that was trained; for IF-I-M 1.5 GB
in fp32. No second UNet is held in memory: saved and base weights are read one tensor at a time.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.utils import CONFIG_NAME
from safetensors import SafetensorError, safe_open

from deepfloyd_core.adapters.files import UNET_FOLDER
from deepfloyd_core.config.stage import StageConfig
from deepfloyd_core.config.stages import Stage
from deepfloyd_core.errors import ArtifactError
from deepfloyd_core.files import fsync_path
from deepfloyd_core.models.headers import UNET_WEIGHTS, weight_files
from deepfloyd_core.models.same_output import output_change, small_change
from deepfloyd_core.models.tensor_files import save_tensors


def free_all(unet: UNet2DConditionModel, config: StageConfig, seed: int) -> None:
    """Make every weight trainable, in the dtype in which it was loaded. Nothing is random: `seed` is not used."""
    unet.requires_grad_(True)


def save_unet(unet: UNet2DConditionModel, stage: Stage, folder: Path, out: Path) -> None:
    """Write `unet/`, of either stage, with the config of the base model in `folder`; the same bytes for the same weights."""
    target = out / UNET_FOLDER
    target.mkdir(exist_ok=True)
    shutil.copyfile(folder / UNET_FOLDER / CONFIG_NAME, target / CONFIG_NAME)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in unet.state_dict().items()}
    save_tensors(state, target / UNET_WEIGHTS, {"format": "pt"})
    fsync_path(target / CONFIG_NAME)


def load_full(unet: UNet2DConditionModel, file: Path) -> None:
    """Load a saved file's weights into a UNet. Raises ArtifactError unless it has all in their shapes, and nothing else."""
    with _saved(unet, file) as saved, torch.no_grad():
        for name, tensor in unet.state_dict().items():
            tensor.copy_(saved.get_tensor(name))


def restore_unet(unet: UNet2DConditionModel, folder: Path) -> None:
    """Restore the weights of the base model in `folder`."""
    own = unet.state_dict()
    for file in weight_files(folder / UNET_FOLDER, UNET_WEIGHTS):
        with safe_open(file, "pt") as base, torch.no_grad():
            for name in base.keys():  # noqa: SIM118
                own[name].copy_(base.get_tensor(name))


def reload_unet(unet: UNet2DConditionModel, stage: Stage, folder: Path, out: Path) -> float:
    """Load the saved folder into the base model, in place of the trained weights; both must be equal.

    In fp32 the outputs for a fixed input are also compared, and their largest difference is returned. Raises
    ArtifactError on any difference, also of the config.
    """
    if (out / UNET_FOLDER / CONFIG_NAME).read_bytes() != (folder / UNET_FOLDER / CONFIG_NAME).read_bytes():
        raise ArtifactError(f"{out / UNET_FOLDER / CONFIG_NAME} is not the base model's.")
    file = out / UNET_FOLDER / UNET_WEIGHTS
    with _saved(unet, file) as saved:
        for name, tensor in unet.state_dict().items():
            found = saved.get_tensor(name)
            if found.dtype != tensor.dtype or not torch.equal(found.to(tensor.device), tensor):
                raise ArtifactError(f"{out}: {name} has other values after reloading.")
    change = output_change(unet, folder, unet.dtype)
    restore_unet(unet, folder)
    load_full(unet, file)
    return small_change(change, f"{out}: the output of the reloaded UNet")


@contextmanager
def _saved(unet: UNet2DConditionModel, file: Path) -> Iterator[Any]:
    """A saved file's weights, open for reading; they have the names and shapes of the UNet's."""
    try:
        opened = safe_open(file, "pt")
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{file} cannot be read: {error}") from None
    with opened as saved:
        own, found = unet.state_dict(), set(saved.keys())
        missing, extra = sorted(own.keys() - found), sorted(found - own.keys())
        if missing or extra:
            raise ArtifactError(f"{file} does not fit this UNet: it lacks {missing[:3]} and has extra {extra[:3]}.")
        for name, tensor in own.items():
            shape = tuple(saved.get_slice(name).get_shape())
            if shape != tuple(tensor.shape):
                raise ArtifactError(f"{file}: {name} is {shape}; this UNet's is {tuple(tensor.shape)}.")
        yield saved
