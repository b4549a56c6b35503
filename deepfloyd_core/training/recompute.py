"""Gradient checkpointing (Chen et al. 2016) of IF's UNets, also of their attentions.

diffusers' own recomputes only the residual blocks of the encoder and decoder: the activations of attentions and of the
mid block stay in memory.
"""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch.utils.checkpoint import checkpoint


def recompute_activations(unet: UNet2DConditionModel) -> None:
    """Keep only the inputs of every residual block and attention; activations inside are recomputed in the backward pass.

    The gradients are the same to the last bit, dropout included. Without gradients nothing changes.
    """
    for module in unet.modules():
        if isinstance(module, Attention | ResnetBlock2D):
            module.forward = _recomputed(module.forward)


def _recomputed(forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def call(*args: Any, **named: Any) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return forward(*args, **named)
        made: torch.Tensor = checkpoint(forward, *args, use_reentrant=False, **named)
        return made

    return call
