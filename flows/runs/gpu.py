"""Which runs share a GPU: all of one user on this machine that see the same GPUs."""

import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deepfloyd_core.config.run_machine import Machine
from deepfloyd_core.processes.gpu_slot import gpu_slot, slots_folder

DRIVERS = "/dev/nvidiactl", "/dev/kfd", "/dev/dxg"  # NVIDIA's, AMD's, Windows' under WSL
VISIBLE = "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"


@contextmanager
def gpu_shared(machine: Machine, name: str) -> Iterator[None]:
    """In this block jobs wait for the GPU, if this machine has one and the run may use it. name: of the run."""
    if machine.device == "cpu" or (machine.device == "auto" and not has_gpu()):
        yield
        return
    with gpu_slot(slot_path(), name):
        yield


def has_gpu() -> bool:
    """Whether there is a GPU that torch could use; torch itself is not imported."""
    is_apple = sys.platform == "darwin" and platform.machine() == "arm64"
    return is_apple or any(Path(driver).exists() for driver in DRIVERS)


def slot_path() -> Path:
    """The file of the lock. Raises StorageError when its folder belongs to somebody else."""
    seen = next((os.environ[name] for name in VISIBLE if os.environ.get(name)), "all")
    return slots_folder() / f"gpu-{seen.replace('/', '-')}"
