"""Compares two UNets by their outputs for a fixed input: equal outputs mean that both make the same pictures."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from deepfloyd_core.errors import ArtifactError
from deepfloyd_core.models.identity import ROUNDING
from deepfloyd_core.models.unet import ProjectedUNet, load_text_modules

EDGE_PX = 64  # Stage II's too: every weight takes part at any size, and at 256 px it takes 16 times as long


def output_change(
    unet: UNet2DConditionModel, folder: Path, dtype: torch.dtype, more: dict[str, Any] | None = None
) -> Callable[[], float]:
    """Record a UNet's output for the fixed input, in eval mode. Returns a function that gives the largest difference
    since then.

    `dtype`: of its base; only fp32 is compared, the difference in another dtype is 0.0. `folder`: of its base model.
    `more`: further arguments of the UNet.
    """
    unet.eval()
    if dtype != torch.float32:
        return lambda: 0.0
    probe = _probe_input(unet, folder) | (more or {})
    before = _output_of(unet, probe)
    return lambda: float((_output_of(unet, probe) - before).abs().max())


def small_change(change: Callable[[], float], prefix: str) -> float:
    """The difference that `output_change` measures. Raises ArtifactError, beginning with `prefix`, unless it is rounding
    alone.
    """
    difference = change()
    if not difference <= ROUNDING:
        raise ArtifactError(f"{prefix} differs by {difference:g}.")
    return difference


def _probe_input(unet: UNet2DConditionModel, folder: Path) -> dict[str, Any]:
    """A fixed input in fp32, as the UNet's arguments. `folder` lends text modules to a UNet that has none."""
    generator = torch.Generator().manual_seed(0)
    modules = load_text_modules(folder, torch.float32).to(unet.device) if isinstance(unet, ProjectedUNet) else None
    layer = (modules or unet).get_submodule("encoder_hid_proj")
    width = layer.get_parameter("weight").shape[1]
    x = torch.randn((1, unet.config.in_channels, EDGE_PX, EDGE_PX), generator=generator).to(unet.device)
    text, pooled = torch.randn((1, 77, width), generator=generator).to(unet.device), None
    if modules is not None:
        with torch.inference_mode():
            text, pooled = modules["encoder_hid_proj"](text), modules["add_embedding"](text)
    return {
        "sample": x,
        "timestep": torch.tensor([500], device=unet.device),
        "encoder_hidden_states": text,
        "class_labels": torch.tensor([250], device=unet.device) if unet.config.class_embed_type else None,
        "added_cond_kwargs": {"pooled": pooled},
    }


def _output_of(unet: UNet2DConditionModel, probe: dict[str, Any]) -> torch.Tensor:
    """The UNet's output: (1, 6, H, W)."""
    with torch.inference_mode(), frozen(unet):
        return torch.as_tensor(unet(**probe)[0])


@contextmanager
def frozen(unet: UNet2DConditionModel) -> Iterator[None]:
    """No parameter is trainable in this block: torch rounds a convolution differently when its weights may have
    gradients, also under no_grad.
    """
    params = [param for param in unet.parameters() if param.requires_grad]
    for param in params:
        param.requires_grad_(False)
    try:
        yield
    finally:
        for param in params:
            param.requires_grad_(True)
