"""Measures how fast a device does each kind of work, in about half a second for each precision. Imports torch alone.

Three small computations stand for the kinds: a convolution with its backward pass, a chain of a UNet's operations without
products on tensors that no cache holds, and a deep network of tiny pictures, which is all overhead. The mean of repeated
calls counts, not the best: a run meets the load of this machine too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import torch
from torch.nn import functional as F

from deepfloyd_core.config.stage_run import Precision
from deepfloyd_core.models.work import Speed, Speeds, Work

_LEAST_S = 0.09  # of the calls that are timed
_TURNS = 3  # in which they are timed, so that both precisions meet the same load
# Modules of diffusers and peft run more Python around an operation than the blocks here. Fitted to the steps of `tiny-i`
# and `tiny-ii` with one picture of 64 px (benchmarks/plan_times.py).
_PYTHON = 2.0
_CHANNELS, _EDGE = 192, 32  # of the convolution, px
_CHAIN, _TINY = 78, 383  # numbers that the chain touches, in 2^20; operations of the tiny network
_LAYOUT = torch.channels_last
_DTYPES: dict[Precision, torch.dtype] = {"no": torch.float32, "bf16": torch.bfloat16}


def measured_speeds(device: torch.device, clock: Callable[[], float] = perf_counter) -> Speeds:
    """The speed of a device in each precision. clock: in seconds."""
    works = {name: _works(device, dtype) for name, dtype in _DTYPES.items()}
    for parts in works.values():
        for work in parts:
            work()  # chooses kernels and takes memory
    took: dict[Precision, list[_Took]] = {name: [_Took() for _ in parts] for name, parts in works.items()}
    for _ in range(_TURNS):
        for name, parts in works.items():
            for work, total in zip(parts, took[name], strict=True):
                _time(work, device, clock, total)
    return {
        name: _speed(known_work(device, dtype), [total.each_s for total in took[name]])
        for name, dtype in _DTYPES.items()
    }


def known_work(device: torch.device, dtype: torch.dtype) -> tuple[Work, Work, Work]:
    """What the three computations are, of each what matters of it: as `operations` counts them, which takes a second here
    because it imports torch's compiler.
    """
    many = _many(device)
    flops = 2 * 2 * 9 * _CHANNELS**2 * _EDGE**2 * many
    return Work(flops=flops), Work(bytes=_CHAIN * dtype.itemsize * 2**20 * many), Work(calls=_TINY)


def _many(device: torch.device) -> int:
    return 1 if device.type == "cpu" else 16  # a GPU is only fast at what fills it


@dataclass
class _Took:
    """What calls of a computation took so far."""

    seconds: float = 0.0
    calls: int = 0

    @property
    def each_s(self) -> float:
        return self.seconds / self.calls


def _speed(counts: tuple[Work, Work, Work], seconds: list[float]) -> Speed:
    products, chain, tiny = counts
    return Speed(
        flops=products.flops / seconds[0], bytes=chain.bytes / seconds[1], call_s=_PYTHON * seconds[2] / tiny.calls
    )


def _works(device: torch.device, dtype: torch.dtype) -> tuple[Callable[[], object], ...]:
    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype).contiguous(memory_format=_LAYOUT)

    many = _many(device)
    x, weight = noise(many, _CHANNELS, _EDGE, _EDGE).requires_grad_(), noise(_CHANNELS, _CHANNELS, 3, 3)
    large, scale = noise(many, 16, 256, 256), torch.ones(16, device=device, dtype=dtype)
    small, kernel = noise(1, 16, 4, 4).requires_grad_(), noise(16, 16, 3, 3)

    def products() -> object:
        return torch.autograd.grad(F.conv2d(x, weight, padding=1).sum(), x)

    @torch.no_grad()
    def chain() -> object:
        h = large
        for _ in range(4):
            h = _without_products(h, large, scale)
        return h

    def tiny() -> object:
        h = small
        for _ in range(10):
            h = _block(h, kernel, scale)
        return torch.autograd.grad(h.sum(), small)

    return products, chain, tiny


def _without_products(h: torch.Tensor, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """As between two convolutions of a UNet, in about its shares."""
    h = F.gelu(F.group_norm(h, 2, scale, scale))
    h = h * scale.view(1, -1, 1, 1) + x
    h = (h + x) / 2.0
    return torch.cat([h, x], 1)[:, : h.shape[1]]


def _block(x: torch.Tensor, kernel: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """A convolution and an attention."""
    batch, channels, height, width = x.shape
    h = F.conv2d(F.gelu(F.group_norm(x, 2, scale, scale)), kernel, padding=1)
    rows = h.view(batch, channels, -1).transpose(1, 2).view(batch, -1, 2, channels // 2).transpose(1, 2)
    seen = F.scaled_dot_product_attention(rows, rows, rows).transpose(1, 2).reshape(batch, -1, channels)
    return (x + seen.transpose(1, 2).reshape(batch, channels, height, width) + h) / 2.0


def _time(work: Callable[[], object], device: torch.device, clock: Callable[[], float], total: _Took) -> None:
    """Some calls, at least one, and at least for a share of the time."""
    _wait(device)
    began, calls = clock(), 0
    while calls == 0 or clock() - began < _LEAST_S / _TURNS:
        work()
        _wait(device)
        calls += 1
    total.seconds += clock() - began
    total.calls += calls


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
