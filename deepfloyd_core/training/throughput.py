"""The speed and peak memory of a training, for the line beside its progress bar."""

import resource
import sys
import time
from collections import deque

import torch

_STEPS = 20  # the rate is of the last ones


class Throughput:
    """Samples per second over the last steps, and the process's peak memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._ends: deque[tuple[float, int]] = deque([(time.monotonic(), 0)], maxlen=_STEPS + 1)

    def step(self, samples: int) -> None:
        """One more step of so many samples has ended."""
        self._ends.append((time.monotonic(), self._ends[-1][1] + samples))

    @property
    def samples_per_s(self) -> float:
        """0 before the first step has ended."""
        (first, before), (last, after) = self._ends[0], self._ends[-1]
        return (after - before) / (last - first) if last > first else 0.0

    @property
    def line(self) -> str:
        """Both figures in words."""
        return f"{self.samples_per_s:.3g}/s {self.peak_gib:.2f} GiB"

    @property
    def peak_gib(self) -> float:
        """Peak of the GPU memory that torch allocated, or of the process's memory on a CPU."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) / 2**30
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
