"""ControlNet-LoRA: a Stage I UNet that is conditioned on a picture as well as on the caption.

A ControlNet (Zhang et al. 2023) is a copy of the UNet's encoder (down and mid blocks). It also takes the conditioning
picture, and adds residuals to the skip connections of the UNet's decoder. Here the copy shares the frozen weights and
differs from them by a LoRA, as in Stability's Control-LoRAs: so the file holds a LoRA and a few small convolutions. The
convolutions at the copy's input and outputs start at zero, so training starts exactly at the base model. diffusers'
`ControlNetModel` does not support IF's blocks; diffusers' UNet accepts the residuals.

The stock pipelines can sample it: they pass `cross_attention_kwargs={"control_image": ...}` to the UNet.
"""

import copy
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from deepfloyd_core.adapters.controlnet_file import HINT_WIDTHS, RECORD, control_record
from deepfloyd_core.adapters.files import CONTROL_FILE
from deepfloyd_core.adapters.lora import ADAPTER, add_lora, fill, plain_settings
from deepfloyd_core.config.flavours import NOT_ON_THE_WAY_DOWN
from deepfloyd_core.config.stage import StageConfig
from deepfloyd_core.config.stages import Stage
from deepfloyd_core.diffusion.loss import CONTROL_IMAGE
from deepfloyd_core.errors import ArtifactError, ConfigError
from deepfloyd_core.models.same_output import EDGE_PX, output_change, small_change
from deepfloyd_core.models.tensor_files import save_tensors
from deepfloyd_core.models.unet import adapter_dtype
from deepfloyd_core.types import Conditioning

_NAMES = ("sample", "timestep", "encoder_hidden_states")  # positional argument names of UNet2DConditionModel.forward


class Control(torch.nn.Module):
    """A second encoder of a UNet: the shared weights, an adapter, and the new convolutions."""

    def __init__(self, unet: UNet2DConditionModel, conditioning: Conditioning) -> None:
        super().__init__()
        self.conditioning = conditioning
        if unet.config.center_input_sample:
            raise ConfigError("A UNet with center_input_sample cannot be given a ControlNet. Use another base model.")
        shared = {id(tensor): tensor for tensor in (*unet.parameters(), *unet.buffers())}
        self.encoder = copy.deepcopy(unet, shared)
        for module in self.encoder.modules():
            module.__dict__.pop("forward", None)  # recompute_activations put one there that calls the original
        for name in NOT_ON_THE_WAY_DOWN:
            if hasattr(self.encoder, name):
                delattr(self.encoder, name)
        first = self.encoder.conv_in.out_channels
        hint: list[torch.nn.Module] = []
        for before, after in zip((3, *HINT_WIDTHS), (*HINT_WIDTHS, first), strict=True):
            hint += [torch.nn.Conv2d(before, after, 3, padding=1), torch.nn.SiLU()]
        self.hint = torch.nn.Sequential(*hint[:-1])
        self.skips = torch.nn.ModuleList([torch.nn.Conv2d(width, width, 1) for width in _skip_widths(self.encoder)])
        for layer in (self.hint[-1], *self.skips):
            torch.nn.init.zeros_(layer.weight)
            torch.nn.init.zeros_(layer.bias)

    def forward(
        self, picture: torch.Tensor, unet: UNet2DConditionModel, sample: torch.Tensor, timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor, added_cond_kwargs: dict[str, Any] | None = None,
    ) -> list[torch.Tensor]:  # fmt: skip
        """The residuals for a UNet's skip connections, the mid block last. picture: (B, 3, H, W); the rest as for the UNet.

        The encoder part of `UNet2DConditionModel.forward`, with the texts from `unet`'s own modules.
        """
        encoder, text = self.encoder, encoder_hidden_states
        emb = encoder.time_embedding(encoder.get_time_embed(sample=sample, timestep=timestep))
        emb = emb + unet.get_aug_embed(emb=emb, encoder_hidden_states=text, added_cond_kwargs=added_cond_kwargs)
        emb = emb if encoder.time_embed_act is None else encoder.time_embed_act(emb)
        text = unet.process_encoder_hidden_states(encoder_hidden_states=text, added_cond_kwargs=added_cond_kwargs)
        hidden = encoder.conv_in(sample)
        kept = next(self.hint.parameters()).dtype
        hidden = hidden + self.hint(picture.to(kept)).to(hidden.dtype)
        skips = [hidden]
        for block in encoder.down_blocks:
            words = {"encoder_hidden_states": text} if getattr(block, "has_cross_attention", False) else {}
            hidden, found = block(hidden_states=hidden, temb=emb, **words)
            skips += found
        skips.append(encoder.mid_block(hidden, emb, encoder_hidden_states=text))
        pairs = zip(self.skips, skips, strict=True)
        return [layer(skip.to(kept)).to(skip.dtype) for layer, skip in pairs]


def add_control(unet: UNet2DConditionModel, config: StageConfig, seed: int) -> None:
    """Give a frozen UNet a new control, trainable, in the dtype of its optimizer.

    Raises ConfigError when no layer of the encoder has a target's name.
    """
    torch.manual_seed(seed)
    control = _attach(unet, Control(unet, config.controlnet_conditioning))
    add_lora(control.encoder, config, seed)
    for part in (control.hint, control.skips):
        part.to(adapter_dtype(config)).requires_grad_(True)


def start_control(unet: UNet2DConditionModel, file: Path) -> None:
    """Load a saved file into the UNet's existing control; the file must have exactly its tensors."""
    fill(_state(_present(unet)), load_file(file))


def control_of(unet: torch.nn.Module) -> Control | None:
    """The control of a UNet; None if it has none."""
    return getattr(unet, "control", None)


def remove_control(unet: UNet2DConditionModel, folder: Path) -> None:
    """Restore the base model."""
    _detach(unet)


def save_control(unet: UNet2DConditionModel, stage: Stage, folder: Path, out: Path) -> None:
    """Write `controlnet_lora.safetensors`; the same bytes for the same weights."""
    control = _present(unet)
    settings = plain_settings({**control.encoder.peft_config[ADAPTER].to_dict(), "lora_dropout": 0.0})
    record = json.dumps({"conditioning": control.conditioning, "lora": settings}, sort_keys=True)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(_state(control).items())}
    save_tensors(state, out / CONTROL_FILE, {RECORD: record})


def load_control(unet: UNet2DConditionModel, file: Path) -> Control:
    """Give a base UNet the control of a file, frozen, for sampling with a stock pipeline.

    Then `pipeline(..., cross_attention_kwargs={"control_image": picture})` is conditioned on `picture`, float32 (B, 3,
    H, W) in [0, 1], from `conditioning.conditioning_picture` (for `paired` from `as_conditioning`): one for all
    pictures of the call, or one for each. It replaces a control that was loaded before. Raises ArtifactError when the
    file does not fit this UNet, ConfigError when accelerate already moves the UNet between devices.
    """
    if hasattr(unet, "_hf_hook"):
        raise ConfigError("The UNet is offloaded already. Call load_control before enable_model_cpu_offload.")
    if control_of(unet) is not None:
        _detach(unet)
    try:
        with safe_open(file, "pt") as saved:
            conditioning, lora = control_record(saved.metadata() or {})
            state = {name: saved.get_tensor(name) for name in saved.keys()}  # noqa: SIM118
        control = Control(unet, conditioning)
        settings = LoraConfig(**{**lora, "inference_mode": False})
    except (SafetensorError, OSError, TypeError, ValueError) as error:
        raise ArtifactError(f"{file} cannot be read as a ControlNet-LoRA: {error}") from None
    control.encoder.add_adapter(settings, adapter_name=ADAPTER)
    own = _state(control)
    differs = [name for name in sorted(own.keys() | state.keys()) if _shape(own, name) != _shape(state, name)]
    if differs:
        name = differs[0]
        raise ArtifactError(f"{file} does not fit: {name} is {_shape(state, name)} in it, {_shape(own, name)} here.")
    _take(control, state)
    return _attach(unet, control.to(unet.device).requires_grad_(False).eval())


def reload_control(unet: UNet2DConditionModel, stage: Stage, folder: Path, out: Path) -> float:
    """Load the saved file's control in place of the trained one; both must be equal.

    In fp32 the outputs for a fixed input are also compared, and their largest difference is returned. Raises
    ArtifactError on any difference.
    """
    trained = _state(_present(unet))
    picture = torch.rand((1, 3, EDGE_PX, EDGE_PX), generator=torch.Generator().manual_seed(0))
    change = output_change(unet, folder, unet.dtype, {"cross_attention_kwargs": {CONTROL_IMAGE: picture}})
    remove_control(unet, folder)
    loaded = _state(load_control(unet, out / CONTROL_FILE))
    for name, tensor in trained.items():
        if not torch.equal(tensor, loaded[name]):
            raise ArtifactError(f"{out}: {name} has other values after reloading.")
    return small_change(change, f"{out}: the output of the reloaded ControlNet-LoRA")


def _take(control: Control, state: dict[str, torch.Tensor]) -> None:
    """Load a file's values into a control; its adapters and convolutions get the file's dtype."""
    dtype = next(iter(state.values())).dtype
    for name, param in control.named_parameters():
        if "lora_" in name or not name.startswith("encoder."):
            param.data = param.data.to(dtype)
    adapters = {name.removeprefix("encoder."): value for name, value in state.items() if name.startswith("encoder.")}
    set_peft_model_state_dict(control.encoder, adapters, adapter_name=ADAPTER)
    new = {name: value for name, value in state.items() if not name.startswith("encoder.")}
    control.load_state_dict(new, strict=False)


def _detach(unet: UNet2DConditionModel) -> None:
    del unet.forward, unet.control


def _attach(unet: UNet2DConditionModel, control: Control) -> Control:
    unet.control = control
    # Not a forward pre-hook: accelerate's offloading moves a model to its device in place of its `forward`, later than that.
    unet.forward = partial(_forward, unet)
    return control


def _forward(unet: UNet2DConditionModel, *args: Any, **kwargs: Any) -> Any:
    return type(unet).forward(unet, *args, **_steered(unet, args, kwargs))


def _steered(unet: UNet2DConditionModel, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A call's named arguments, with the control image replaced by the residuals that diffusers' UNet adds, if there is
    one.
    """
    given = dict(kwargs.get("cross_attention_kwargs") or {})
    picture = given.pop(CONTROL_IMAGE, None)
    kwargs = {**kwargs, "cross_attention_kwargs": given or None}
    if picture is None:
        return kwargs
    called = {**dict(zip(_NAMES, args, strict=False)), **kwargs}
    sample = called["sample"]
    # Guidance doubles the batch: without the text first, then with it.
    if len(picture) not in (1, len(sample), len(sample) / 2):
        raise ValueError(
            f"control_image has {len(picture)} pictures, and the UNet's batch is {len(sample)} (guidance doubles it). "
            "Give one picture, or one for each output picture."
        )
    picture = picture.to(sample.device).repeat(len(sample) // len(picture), 1, 1, 1)
    parts = {name: called[name] for name in (*_NAMES, "added_cond_kwargs") if name in called}
    *skips, middle = _present(unet)(picture, unet, **parts)
    return {**kwargs, "down_block_additional_residuals": tuple(skips), "mid_block_additional_residual": middle}


def _present(unet: UNet2DConditionModel) -> Control:
    control = control_of(unet)
    assert control is not None
    return control


def _skip_widths(encoder: UNet2DConditionModel) -> list[int]:
    """Channels of the encoder's skip connections: the first features, after every block, and the mid block."""
    widths = [encoder.conv_in.out_channels]
    for block in encoder.down_blocks:
        widths += [layer.out_channels for layer in (*block.resnets, *(block.downsamplers or ()))]
    return [*widths, encoder.mid_block.resnets[-1].out_channels]


def _state(control: Control) -> dict[str, torch.Tensor]:
    """Trained tensors of the ControlNet by name: adapters, hint encoder, skip convolutions."""
    lora = get_peft_model_state_dict(control.encoder, adapter_name=ADAPTER)
    new = {name: param for name, param in control.named_parameters() if not name.startswith("encoder.")}
    return {**{f"encoder.{name}": tensor for name, tensor in lora.items()}, **new}


def _shape(state: dict[str, torch.Tensor], name: str) -> tuple[int, ...] | str:
    return tuple(state[name].shape) if name in state else "absent"
