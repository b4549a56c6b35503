"""The device that a run computes on, as far as a plan must know it. No torch."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import psutil

from deepfloyd_core.config.stage_run import Precision
from deepfloyd_core.models.torch_facts import TorchFacts
from deepfloyd_core.models.work import Speeds, Work, seconds
from deepfloyd_core.store.counts import many

MOST_SHARE = 0.95  # of a device's memory: its own program and allocator need some
_CGROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


class MachineMemory(NamedTuple):
    """Bytes of this machine's memory."""

    total: int
    free: int
    is_limited: bool  # by the container that this process is in


def machine_memory() -> MachineMemory:
    """What this process may take."""
    memory = psutil.virtual_memory()
    limits = [memory.total]
    for file in _CGROUPS:
        with suppress(OSError, ValueError):  # `max`, or there is none
            limits.append(int(Path(file).read_text()))
    total = min(limits)
    return MachineMemory(total, min(memory.available, total), total < memory.total)


@dataclass(frozen=True)
class Device:
    """Where models run."""

    name: str  # `a CPU with 2 cores`, or the GPU's name
    is_cpu: bool
    total: int  # bytes of its memory
    free: int
    has_bf16: bool  # it multiplies faster in bf16 than in fp32
    speeds: Speeds
    gpus: int = 1  # as many as can be trained on at once; 1 on a CPU
    ranks: int = 1  # processes of a training that compute at once, and share a CPU's memory

    def seconds(self, work: Work, precision: Precision) -> float:
        """How long some work takes."""
        return seconds(work, self.speeds[precision], self.is_cpu)

    def fits(self, count: int) -> bool:
        """Whether it has room for so many bytes."""
        return count * (self.ranks if self.is_cpu else 1) <= MOST_SHARE * self.total


def device_of(facts: TorchFacts, asked: str) -> Device:
    """asked: the run file's `device`."""
    if asked != "cpu" and facts.device == "cuda":
        name, memory = facts.device_name, (facts.total_bytes, facts.free_bytes)
        return Device(name, False, *memory, facts.bf16 == "native", facts.gpu_speeds, facts.gpus)
    total, free, _ = machine_memory()
    if asked != "cpu" and facts.device == "mps":
        return Device("Apple's GPU", False, total, free, True, facts.gpu_speeds)
    name = f"a CPU with {many(psutil.cpu_count() or 1, 'core')}"
    return Device(name, True, total, free, facts.cpu_has_bf16, facts.cpu_speeds)
