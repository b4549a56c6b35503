"""The style of one text and the content of another, as IF's own library transfers a style to a picture.

The pooled text, which a UNet adds to its timestep, is the style's. The guidance goes towards the content and, with a small
weight, towards the style: eps = u + g ((1 - m) c + m s - u), with the outputs u, c, s for the negative text, the content and
the style (deep-floyd/IF, `style_transfer`; m is the `positive_mixer` of its stages, 0.25 and 0.5).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from deepfloyd_core.sampling.wrapped_unet import WrappedUnet

COLOURS = 3  # channels of the noise that is predicted; the variance follows


class StyledUnet(WrappedUnet):
    """Takes the place of a pipeline's UNet, for sampling with guidance."""

    def __init__(self, unet: Any, style: torch.Tensor, share: float) -> None:
        """style: the hidden states of its text, (1, T, D); share: m, 0 to 1."""
        super().__init__(unet)
        self._style, self._share = style, share

    def forward(
        self, sample: torch.Tensor, timestep: Any, encoder_hidden_states: torch.Tensor, **named: Any
    ) -> tuple[torch.Tensor]:
        """sample (2N, C, H, W): for the negative texts, then for the content; the rest as for the UNet."""
        negative, content = encoder_hidden_states.chunk(2)
        style = self._style.to(content).expand_as(content)
        labels = named.get("class_labels")
        if labels is not None:  # an upscaler's noise levels
            named["class_labels"] = torch.cat([labels, labels.chunk(2)[1]])
        three = torch.cat([sample, sample.chunk(2)[1]])
        with _pooled(self.unet, torch.cat([negative, style, style])):
            made = self.unet(three, timestep, torch.cat([negative, content, style]), **{**named, "return_dict": False})
        unguided, towards, of_style = made[0].chunk(3)
        towards = towards.clone()
        towards[:, :COLOURS].lerp_(of_style[:, :COLOURS], self._share)
        return (torch.cat([unguided, towards]),)


@contextmanager
def _pooled(unet: Any, texts: torch.Tensor) -> Iterator[None]:
    """In this block a UNet adds to its timestep what it makes of these texts."""
    hook = unet.add_embedding.register_forward_pre_hook(lambda module, given: (texts,))
    try:
        yield
    finally:
        hook.remove()
