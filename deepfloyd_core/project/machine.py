"""This machine, as far as it decides a run file: the GPU and its memory, else the main memory and the processor.

torch is asked in a process of its own, while the folder is looked at. Without an answer the machine counts as one without
a GPU.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from deepfloyd_core.errors import JobError
from deepfloyd_core.models.device import machine_memory
from deepfloyd_core.models.torch_facts import TorchFacts, ask_torch

_BF16_FLAGS = "avx512_bf16", "amx_bf16"


@dataclass(frozen=True)
class MachineLook:
    """What a training can use. `memory_bytes`: of the GPU `cuda`, else the main memory."""

    device: Literal["cuda", "mps", "cpu"]
    name: str  # of the GPU, else empty
    memory_bytes: int
    bf16: bool  # whether it computes in bf16 at full speed

    @property
    def memory_gib(self) -> float:
        """In GiB."""
        return self.memory_bytes / 2**30


def asked_machine() -> Callable[[], MachineLook]:
    """Ask in the background; the function that is returned waits for the answer."""
    pool = ThreadPoolExecutor(1)
    asked = pool.submit(ask_torch)
    pool.shutdown(wait=False)

    def answer() -> MachineLook:
        try:
            return machine_look(asked.result())
        except JobError:
            return _without_gpu()

    return answer


def machine_look(facts: TorchFacts) -> MachineLook:
    """The machine by what torch tells of it."""
    if facts.device == "cuda":
        return MachineLook("cuda", facts.device_name, facts.total_bytes, facts.bf16 == "native")
    return MachineLook("mps", "Apple GPU", machine_memory().total, False) if facts.device == "mps" else _without_gpu()


def _without_gpu() -> MachineLook:
    return MachineLook("cpu", "", machine_memory().total, _processor_has_bf16())


def _processor_has_bf16() -> bool:
    try:
        known = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False
    return any(flag in known for flag in _BF16_FLAGS)
