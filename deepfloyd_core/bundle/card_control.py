"""What a model card prints to load a ControlNet-LoRA with stock diffusers: all below this text. It is not imported there.

It must agree with `adapters.controlnet`, which says what the file holds.
"""
# mypy: ignore-errors

import copy
import json

import torch
from peft import LoraConfig, set_peft_model_state_dict
from safetensors import safe_open


def load_control(unet: torch.nn.Module, file: str) -> None:
    """Give a UNet a copy of its way down that shares its weights, with adapters and convolutions of its own."""
    with safe_open(file, "pt") as saved:
        settings = json.loads(saved.metadata()["control"])["lora"]
        state = {name: saved.get_tensor(name) for name in saved.keys()}  # noqa: SIM118
    encoder = copy.deepcopy(unet, {id(one): one for one in (*unet.parameters(), *unet.buffers())})
    for name in ("up_blocks", "conv_norm_out", "conv_act", "conv_out", "encoder_hid_proj", "add_embedding"):
        if hasattr(encoder, name):
            delattr(encoder, name)
    encoder.add_adapter(LoraConfig(**{**settings, "inference_mode": False}))
    adapters = {name.removeprefix("encoder."): one for name, one in state.items() if name.startswith("encoder.")}
    set_peft_model_state_dict(encoder, adapters)

    def convolution(name: str) -> torch.nn.Module:
        weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
        layer = torch.nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2], padding=weight.shape[2] // 2)
        layer.load_state_dict({"weight": weight, "bias": bias})
        return layer.to(weight.dtype)

    hint, silu = [convolution(f"hint.{place}") for place in (0, 2, 4)], torch.nn.functional.silu
    kept = state["hint.0.weight"].dtype
    skips = [convolution(f"skips.{place}") for place in range(sum("skips" in name for name in state) // 2)]
    unet.control = torch.nn.ModuleList([encoder, *hint, *skips]).to(unet.device).requires_grad_(False).eval()

    def forward(
        sample: torch.Tensor, t: torch.Tensor, encoder_hidden_states: torch.Tensor, cross_attention_kwargs: dict,
        added_cond_kwargs: dict | None = None, **more: object,
    ) -> object:  # fmt: skip
        picture = cross_attention_kwargs["control_image"].to(sample.device, kept)
        words = {"encoder_hidden_states": encoder_hidden_states, "added_cond_kwargs": added_cond_kwargs}
        emb = encoder.time_embedding(encoder.get_time_embed(sample=sample, timestep=t))
        emb = emb + unet.get_aug_embed(emb=emb, **words)
        emb = emb if encoder.time_embed_act is None else encoder.time_embed_act(emb)
        text = {"encoder_hidden_states": unet.process_encoder_hidden_states(**words)}
        picture = picture.repeat(len(sample) // len(picture), 1, 1, 1)  # guidance doubles the batch
        seen = hint[2](silu(hint[1](silu(hint[0](picture)))))
        found = [encoder.conv_in(sample) + seen.to(sample.dtype)]
        for block in encoder.down_blocks:
            given = text if getattr(block, "has_cross_attention", False) else {}
            found += block(hidden_states=found[-1], temb=emb, **given)[1]
        found.append(encoder.mid_block(found[-1], emb, **text))
        *down, mid = (layer(one.to(kept)).to(one.dtype) for layer, one in zip(skips, found, strict=True))
        more |= {"down_block_additional_residuals": tuple(down), "mid_block_additional_residual": mid}
        return type(unet).forward(unet, sample, t, **words, **more)

    unet.forward = forward
