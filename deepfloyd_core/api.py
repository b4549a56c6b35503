"""The stable interface: model cards, docs and notebooks import from here. Loads torch."""

from deepfloyd_core.adapters.controlnet import load_control
from deepfloyd_core.config.flavours import FLAVOURS
from deepfloyd_core.diffusion.back_projection import back_projecting
from deepfloyd_core.diffusion.conditioning import as_conditioning, conditioning_picture
from deepfloyd_core.models.folders import resolve
from deepfloyd_core.store.artifacts import Artifact
from deepfloyd_core.text.embeds import Embeds

__all__ = [
    "FLAVOURS",
    "Artifact",
    "Embeds",
    "as_conditioning",
    "back_projecting",
    "conditioning_picture",
    "load_control",
    "resolve",
]
