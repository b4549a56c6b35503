"""Torch's devices by the names of the run file. Imports torch alone, which takes a second, and not diffusers."""

from functools import cache
from time import perf_counter
from typing import Any

import torch

# Where it was measured, products took 6 times (no bf16 units), 1.9 times (AVX512_BF16 without AMX) and a fourth (AMX) of
# the time in fp32: far from this bound, so that the answer is the same in every process, however busy the machine is.
_FASTER = 1.3
_EDGE, _TRIES = 384, 12


def pick_device(name: str, process: int = 0) -> torch.device:
    """`auto` takes cuda (also rocm), then mps, then the CPU. `process`: number of one of several processes, which share
    the GPUs in turn.
    """
    if name == "cuda" or (name == "auto" and torch.cuda.is_available()):
        return torch.device("cuda", process % max(1, torch.cuda.device_count()))
    if name != "auto":
        return torch.device(name)
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def computes_bf16(device: torch.device) -> bool:
    """Whether a device multiplies faster in bf16 than in fp32. A CPU is measured: its flags alone do not tell."""
    if device.type != "cpu":
        return device.type != "cuda" or torch.cuda.is_bf16_supported()
    told: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # not in every version
    return any(on for name, on in told.items() if "bf16" in name) and bf16_speed() >= _FASTER


@cache
def bf16_speed() -> float:
    """How many times as fast as in fp32 this CPU multiplies matrices in bf16: 0.04 s of tries by turns; the best counts."""
    best = dict.fromkeys((torch.float32, torch.bfloat16), float("inf"))
    factors = {dtype: torch.ones(_EDGE, _EDGE, dtype=dtype) for dtype in best}
    for _ in range(_TRIES):
        for dtype, factor in factors.items():
            start = perf_counter()
            torch.mm(factor, factor)
            best[dtype] = min(best[dtype], perf_counter() - start)
    return best[torch.float32] / best[torch.bfloat16]
