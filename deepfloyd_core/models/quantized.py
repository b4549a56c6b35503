"""Keeps a UNet's frozen weights in 8 or 4 bits while an adapter is trained on them (QLoRA, Dettmers et al. 2023).

Three quarters of an IF UNet are convolutions, so convolutions are quantised as well as linear layers. A weight is
dequantised where it is used: in the forward pass, and once more in the backward pass. In between only the quantised
weight is held, and not the layer's input either, which torch keeps for a convolution even when its weight needs no
gradient.

`int8`: a scale for each output channel, its largest magnitude / 127, in fp32. `nf4`: QLoRA's 4-bit normal float in
blocks of 64 with a scale in bf16, 0.53 bytes a weight. Written in torch alone: torchao quantises no convolutions, takes
13 times as long to dequantise an NF4 weight and holds 8 bytes a weight meanwhile.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeGuard

import torch
from diffusers import UNet2DConditionModel
from torch.autograd.function import once_differentiable
from torch.nn.functional import conv2d, linear, pad

from deepfloyd_core.config.flavours import TEXT_MODULES
from deepfloyd_core.config.stage_method import BasePrecision
from deepfloyd_core.errors import ModelError
from deepfloyd_core.models.unet import each_unet_weight, empty_unet, load_projected_unet, load_unet

# Not quantised: the layers that read or write the pictures and those that condition every block, 0.24 % of IF-I-M and
# IF-I-XL; and the text modules, which exist only when an adapter is added to them.
_WHOLE = ("conv_in", "conv_out", "time_embedding", "class_embedding", *TEXT_MODULES)
_BLOCK = 64  # weights to a scale of NF4
# Appendix E of the paper: quantiles of a normal distribution, scaled to [-1, 1], with an exact zero.
_NORMAL_FLOAT = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


class Quantized(torch.nn.Module):
    """The quantised weight of a layer; the layer's other parameters stay as they are.

    All values are integers, because `.to(dtype)` casts any others. They are parameters, because a shared parameter
    stays shared when it is moved.
    """

    values: torch.nn.Parameter  # int8 (out, in), or NF4's: uint8, two codes a byte, the first in the upper half
    scales: torch.nn.Parameter  # bits of fp32 (out,), or NF4's: of bf16, one for each block
    pairs: torch.nn.Parameter | None  # NF4's: see `code_pairs`
    shape: torch.Size  # of the weight
    dtype: torch.dtype

    @property
    def weight(self) -> torch.Tensor:
        """The dequantised weight, computed at each call: writes to it are lost."""
        if self.pairs is None:
            scales = self.scales.view(torch.float32)[:, None]
            whole = torch.empty(self.values.shape, dtype=self.dtype, device=self.values.device)
            return torch.mul(self.values, scales, out=whole).view(self.shape)
        # One look-up for two numbers: an index in four bytes for each pair is all that is needed beside the result.
        numbers = self.pairs.index_select(0, self.values.int()).view(self.dtype).view(-1, _BLOCK)
        numbers.mul_(self.scales.view(torch.bfloat16)[:, None])
        return numbers.view(-1)[: self.shape.numel()].view(self.shape)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The layer's output."""
        return torch.as_tensor(_Product.apply(input, self.bias, self))  # type: ignore[no-untyped-call]


class QuantizedLinear(Quantized, torch.nn.Linear):  # type: ignore[override]
    """x: (..., in)."""


class QuantizedConv2d(Quantized, torch.nn.Conv2d):  # type: ignore[override]
    """x: (B, in, H, W)."""

    def __new__(cls, *args: Any, **named: Any) -> Any:
        # peft makes an adapter's convolutions by the type of the adapted one: plain ones. A copy is made without arguments.
        return torch.nn.Conv2d(*args, **named) if args or named else super().__new__(cls)


class _Product(torch.autograd.Function):
    """A layer's product; only the input and the bias can have gradients."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bias: torch.Tensor | None, layer: Quantized) -> torch.Tensor:
        ctx.layer, ctx.shape, ctx.stride = layer, x.shape, x.stride()
        if isinstance(layer, QuantizedConv2d):
            return conv2d(x, layer.weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)
        return linear(x, layer.weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        layer: Quantized = ctx.layer
        to_x, to_bias = None, None
        if ctx.needs_input_grad[0]:
            weight = layer.weight.to(grad.dtype)
            to_x = _through(layer, grad, weight, ctx) if isinstance(layer, QuantizedConv2d) else grad @ weight
        if ctx.needs_input_grad[1]:
            channel = 1 if isinstance(layer, QuantizedConv2d) else grad.ndim - 1
            to_bias = grad.sum([dim for dim in range(grad.ndim) if dim != channel])
        return to_x, to_bias, None


def _through(layer: QuantizedConv2d, grad: torch.Tensor, weight: torch.Tensor, ctx: Any) -> torch.Tensor:
    """The gradient of a convolution's input, from its output's."""
    # Never read; but torch takes another kernel, which rounds otherwise, for an input that lies otherwise in memory.
    x = grad.new_empty_strided(ctx.shape, ctx.stride)
    where = layer.stride, layer.padding, layer.dilation, False, [0], layer.groups
    found: tuple[torch.Tensor, ...] = torch.ops.aten.convolution_backward(
        grad, x, weight, None, *where, [True, False, False]
    )
    return found[0]


_LAYERS: dict[type, type[Quantized]] = {torch.nn.Linear: QuantizedLinear, torch.nn.Conv2d: QuantizedConv2d}


def load_base(
    folder: Path, projected: bool, dtype: torch.dtype, precision: BasePrecision, device: torch.device
) -> UNet2DConditionModel:
    """The UNet of a pipeline folder, frozen, in eval mode; `projected`: without its text modules.

    A quantised UNet is read layer by layer in `dtype`; each layer is quantised on `device` before the next one is read,
    so the unquantised UNet is never in memory. Raises ModelError when a weight is missing.
    """
    if precision == "no_change":
        return (load_projected_unet if projected else load_unet)(folder, dtype)
    unet = empty_unet(folder, projected)
    pairs, lacking = code_pairs(dtype, device) if precision == "nf4" else None, set(unet.state_dict())
    for name, tensor in each_unet_weight(folder, frozenset(lacking).__contains__):
        place, _, part = name.rpartition(".")
        layer = unet.get_submodule(place)
        layer.register_parameter(part, _frozen(tensor.to(device, dtype, copy=True)))  # not the mapped file
        lacking.remove(name)
        if part == "weight" and _is_quantized(place, layer):
            quantize_layer(layer, pairs)
    if lacking:
        raise ModelError(f"{folder}/unet lacks the weights {', '.join(sorted(lacking)[:3])}.")
    return unet.eval()


def quantize_frozen(unet: UNet2DConditionModel, precision: BasePrecision, dtype: torch.dtype) -> None:
    """Quantise the layers of a frozen UNet as `load_base` does, all of them at once."""
    if precision == "no_change":
        return
    device = next(unet.parameters()).device
    pairs = code_pairs(dtype, device) if precision == "nf4" else None
    for name, layer in list(unet.named_modules()):
        if _is_quantized(name, layer):
            quantize_layer(layer, pairs)


def _is_quantized(name: str, layer: torch.nn.Module) -> TypeGuard[torch.nn.Linear | torch.nn.Conv2d]:
    return name.split(".")[0] not in _WHOLE and isinstance(layer, torch.nn.Linear | torch.nn.Conv2d)


def code_pairs(dtype: torch.dtype, device: torch.device) -> torch.nn.Parameter:
    """NF4's look-up, one for all layers: for each byte the numbers of its codes, as the bits of one integer: (256,)."""
    codes, byte = torch.tensor(_NORMAL_FLOAT, dtype=dtype, device=device), torch.arange(256, device=device)
    numbers = torch.stack([codes[byte >> 4], codes[byte & 15]], 1)
    return _frozen(numbers.view({2: torch.int32, 4: torch.int64}[dtype.itemsize]).flatten())


def quantize_layer(layer: torch.nn.Linear | torch.nn.Conv2d, pairs: torch.nn.Parameter | None) -> None:
    """Quantise the frozen weight of a linear layer or convolution in place, to int8, or with `code_pairs` to NF4.

    It stays a `Linear` or `Conv2d` for those who look for these, such as peft; `weight` gives what is computed with.
    """
    assert not layer.weight.requires_grad
    assert getattr(layer, "padding_mode", "zeros") == "zeros" and not isinstance(getattr(layer, "padding", 0), str)
    weight = layer.weight.detach()
    del layer.weight
    quantized: Any = layer
    quantized.__class__ = _LAYERS[type(layer)]
    quantized.shape, quantized.dtype = weight.shape, weight.dtype
    values, scales = _int8(weight) if pairs is None else _nf4(weight)
    quantized.values, quantized.scales, quantized.pairs = _frozen(values), _frozen(scales), pairs


def frozen_numbers(unet: torch.nn.Module) -> int:
    """How many parameters of a UNet are not trained; quantised ones count as the parameters that they represent."""
    layers = list(_quantized(unet))
    whole = {id(layer.values): layer.shape.numel() for layer in layers}  # a control shares them
    parts = {id(part) for layer in layers for part in (layer.values, layer.scales, layer.pairs)}
    plain = (p.numel() for p in unet.parameters() if not p.requires_grad and id(p) not in parts)
    return sum(whole.values()) + sum(plain)


def frozen_bytes(unet: torch.nn.Module) -> int:
    """The memory of these parameters, in bytes."""
    return sum(param.nbytes for param in unet.parameters() if not param.requires_grad)


def _frozen(tensor: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(tensor, requires_grad=False)


def _quantized(unet: torch.nn.Module) -> Iterator[Quantized]:
    return (layer for layer in unet.modules() if isinstance(layer, Quantized))


def _int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and scales of a weight (out, ...), as `Quantized` has them."""
    rows = weight.float().flatten(1)
    scales = (rows.abs().amax(1) / 127).clamp_min(torch.finfo(torch.float32).tiny)  # a row of zeros has none
    return (rows / scales[:, None]).round().to(torch.int8), scales.view(torch.int32)


def _nf4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in 4 bits; a last block that is not full ends in zeros."""
    flat = weight.float().flatten()
    blocks = pad(flat, (0, -flat.numel() % _BLOCK)).view(-1, _BLOCK)
    scales = blocks.abs().amax(1).to(torch.bfloat16).clamp_min(torch.finfo(torch.bfloat16).tiny)
    codes = torch.tensor(_NORMAL_FLOAT, device=weight.device)
    places = torch.bucketize(blocks / scales.float()[:, None], (codes[1:] + codes[:-1]) / 2, out_int32=True)
    first, second = places.to(torch.uint8).view(-1, 2).unbind(1)
    return (first << 4) | second, scales.view(torch.int16)
