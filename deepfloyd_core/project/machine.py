"""This machine, as far as it decides a run file: the GPU and its memory, else the main memory and the processor.

torch is asked in a process of its own, while the folder is looked at. Without an answer the machine counts as one without
a GPU.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

from deepfloyd_core.errors import JobError
from deepfloyd_core.models.device import Device, device_of, machine_memory
from deepfloyd_core.models.torch_facts import TorchFacts, ask_torch


@dataclass(frozen=True)
class MachineLook:
    """What a training can use. `memory_bytes`: of the GPU `cuda`, else the main memory. `cpu`: its speed, without a GPU."""

    device: Literal["cuda", "mps", "cpu"]
    name: str  # of the GPU, else empty
    memory_bytes: int
    bf16: (
        bool  # whether it is faster in bf16: a GPU with units for it, a processor that took less time for a convolution
    )

    cpu: Device | None = None

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
    if facts.device == "mps":
        return MachineLook("mps", "Apple GPU", machine_memory().total, False)
    is_faster = facts.bf16_times is not None and facts.bf16_times < 1
    return MachineLook(
        "cpu", "", machine_memory().total, is_faster, device_of(facts, "cpu") if facts.cpu_speeds else None
    )


def _without_gpu() -> MachineLook:
    return MachineLook("cpu", "", machine_memory().total, False)
