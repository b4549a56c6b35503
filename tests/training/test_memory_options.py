"""Options that change what a step costs and not what it does."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from small_run import SmallRun

from deepfloyd_core.adapters.lora import add_lora
from deepfloyd_core.config.flavours import FLAVOURS
from deepfloyd_core.config.stage import StageConfig
from deepfloyd_core.config.stage_run import device_fault
from deepfloyd_core.config.stages import Stage
from deepfloyd_core.errors import ConfigError
from deepfloyd_core.models.unet import load_unet, order_channels_last
from deepfloyd_core.preflight.load import load_run
from deepfloyd_core.training.attention import set_attention
from deepfloyd_core.training.recompute import recompute_activations


def trained(stage: Stage, **keys: Any) -> UNet2DConditionModel:
    """A UNet with adapters that are not zero and have dropout, in training mode."""
    config = StageConfig.model_validate({"model_flavour": f"tiny-{'i' * stage}", "mixed_precision": "no", **keys})
    unet = load_unet(Path(FLAVOURS[f"tiny-{'i' * stage}"].repo), torch.float32)
    add_lora(unet, config, 0)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for param in unet.parameters():
            if param.requires_grad:
                param += 0.02 * torch.randn(param.shape, generator=generator)
    return unet.train()


def gradients(unet: UNet2DConditionModel) -> tuple[dict[str, torch.Tensor], int]:
    """Of a fixed input, and how many bytes the backward pass was kept waiting with."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn((1, unet.config.in_channels, 64, 64), generator=generator)
    text = torch.randn((1, 77, unet.config.encoder_hid_dim), generator=generator)
    level = torch.tensor([250]) if unet.config.class_embed_type else None
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {param.untyped_storage().data_ptr() for param in unet.parameters()}
    torch.manual_seed(5)  # of the dropout
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = unet(x, torch.tensor([500]), text, class_labels=level)[0].square().mean()
    held = sum(size for place, size in kept.items() if place not in weights)
    loss.backward()
    return {name: param.grad for name, param in unet.named_parameters() if param.grad is not None}, held


@pytest.mark.parametrize(("stage", "keys"), [(1, {"lora_dropout": 0.3, "use_dora": True}), (2, {})])
def test_recomputing_holds_less_and_gives_the_same_gradients(stage: Stage, keys: dict[str, Any]) -> None:
    plain, held = gradients(trained(stage, **keys))
    diffusers_own = trained(stage, **keys)
    diffusers_own.enable_gradient_checkpointing()
    _, held_by_diffusers = gradients(diffusers_own)
    ours = trained(stage, **keys)
    recompute_activations(ours)
    found, held_by_ours = gradients(ours)
    assert found.keys() == plain.keys() and all(torch.equal(found[name], plain[name]) for name in plain)
    assert held_by_ours < 0.7 * held_by_diffusers < held


def test_plain_attention_is_the_fused_one() -> None:
    fused, plain = trained(1), trained(1)
    set_attention(fused, "sdpa")
    set_attention(plain, "math")
    (first, _), (second, held) = gradients(fused), gradients(plain)
    assert held > gradients(trained(1))[1], "its products of all pairs are kept"
    for name in first:
        assert torch.allclose(first[name], second[name], rtol=1e-3, atol=1e-6), name


@pytest.mark.parametrize("device", ["cpu", "mps", "rocm"])
def test_xformers_needs_an_nvidia_gpu(device: str, small_run: SmallRun) -> None:
    config = StageConfig.model_validate({"model_flavour": "tiny-i", "attention_mechanism": "xformers"})
    assert f"needs an NVIDIA GPU, and the device is {device}. Use sdpa" in device_fault(config, device)
    if device == "cpu":
        with pytest.raises(ConfigError, match=r"stage1\.attention_mechanism is 'xformers', which needs an NVIDIA GPU"):
            load_run(small_run.config, ("stage1.attention_mechanism=xformers",))


def test_xformers_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepfloyd_core.config.stage_run.find_spec", lambda name: None)
    config = StageConfig.model_validate({"model_flavour": "tiny-i", "attention_mechanism": "xformers"})
    assert "pip install xformers" in device_fault(config, "cuda")


def test_frozen_convolutions_are_channels_last_and_what_is_trained_lies_as_a_checkpoint_has_it() -> None:
    """Fused optimizers read a weight and its moments as they lie in memory: after a resume they must lie alike."""
    targets = ["to_q", "conv1"]
    unet, plain = trained(1, lora_target_modules=targets), trained(1, lora_target_modules=targets)
    order_channels_last(unet)
    convolutions = [param for param in unet.parameters() if param.ndim == 4 and param.shape[2:] == (3, 3)]
    assert any(param.requires_grad for param in convolutions)
    for param in convolutions:
        assert param.requires_grad != param.is_contiguous(memory_format=torch.channels_last)
    expected = gradients(plain)[0]
    for name, grad in gradients(unet)[0].items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-3, atol=1e-7)
    with_dora = trained(1, lora_target_modules=["conv1"], use_dora=True)
    order_channels_last(with_dora)
    assert all(param.is_contiguous() for param in with_dora.parameters())
    of_attention = trained(1, use_dora=True)
    order_channels_last(of_attention)
    assert not of_attention.conv_in.weight.is_contiguous()
