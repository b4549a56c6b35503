"""Loads several LoRAs into a stock pipeline, each at its weight, whatever program wrote its file."""

import json
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from safetensors.torch import load_file

from deepfloyd_core.adapters.lora_file import METADATA, adaptable_layers, lora_settings
from deepfloyd_core.adapters.lora_formats import DIFFUSERS, our_names
from deepfloyd_core.adapters.mixed import MixedLora
from deepfloyd_core.errors import ModelError
from deepfloyd_core.models.headers import read_header


def load_loras(pipeline: Any, loras: Sequence[MixedLora]) -> None:
    """Add each LoRA as an adapter of its own. With weights w the layer's product is W x + sum of w alpha / rank B A x."""
    unet, names = pipeline.unet, list[str]()
    shapes = {name: tuple(param.shape) for name, param in unet.named_parameters()}
    layers = list(adaptable_layers(shapes))
    for number, lora in enumerate(loras):
        state, metadata = _read(lora, layers)
        names.append(f"lora{number}")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several is what is wanted
            try:
                unet.load_lora_adapter(state, prefix="unet", adapter_name=names[-1], metadata=metadata)
            except (KeyError, TypeError, ValueError, RuntimeError) as error:
                told = str(error).splitlines()[:1]
                raise ModelError(
                    f"{lora.file.path} cannot be loaded: {type(error).__name__}: {' '.join(told)}."
                ) from None
    unet.set_adapters(names, [lora.weight for lora in loras])
    unet.eval()  # a loaded adapter starts in training mode


def _read(lora: MixedLora, layers: list[str]) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
    """Tensors by diffusers' names, and peft's settings. Where a file has none, B is multiplied by alpha / rank."""
    file = lora.file.checked("is a LoRA to draw with")
    if lora.settings is not None:
        lora.settings.checked("has the settings of a LoRA to draw with")
    header, saved = read_header(file), load_file(file)
    names = our_names(saved, layers)
    state = {f"unet.{ours}": saved[name] for name, ours in names.tensors.items()}
    if names.formats == (DIFFUSERS,) and METADATA in header.metadata:
        metadata: dict[str, Any] = json.loads(header.metadata[METADATA])
        return state, metadata
    scales = {layer: float(saved[name]) for name, layer in names.alphas.items()}
    settings = {} if names.alphas else lora_settings(file, header, names)
    for ours in names.tensors.values():
        layer, _, part = ours.rpartition(".lora_")
        if part == "B.weight":
            up = state[f"unet.{ours}"]
            rank = up.shape[1]
            alpha = scales.get(layer, float(settings.get("lora_alpha", rank)))
            by = alpha / (rank**0.5 if settings.get("use_rslora") else rank)
            state[f"unet.{ours}"] = up if by == 1 else up.float() * by
    return state, None
