"""Torch's devices by the names of the run file. Imports torch alone, which takes a second, and not diffusers."""

from typing import Any

import torch


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
    """Whether a device has units for bf16; a CPU without takes six times as long as in fp32."""
    if device.type != "cpu":
        return device.type != "cuda" or torch.cuda.is_bf16_supported()
    told: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # not in every version
    return any(on for name, on in told.items() if "bf16" in name)
