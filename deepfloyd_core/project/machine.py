"""This machine, as far as it decides a run file: the GPU and its memory, else the main memory and the processor.

torch is asked in a child process, while the folder is looked at: here its import would take seconds of every command,
and a broken driver could end this process. Without an answer in time the machine counts as one without a GPU.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

PATIENCE_S = 60.0  # torch is imported in 2 to 10 s; from a cold network disk in 30
_LIMITS = "/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"
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


def asked_machine(command: tuple[str, ...] = ()) -> Callable[[], MachineLook]:
    """Ask in the background; the function that is returned waits for the answer. command: a stand-in for the child."""
    asked = command or (sys.executable, "-P", "-m", "deepfloyd_core.project.ask_gpu")
    try:
        child = subprocess.Popen(asked, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    except OSError:
        return _without_gpu

    def answer() -> MachineLook:
        with child:
            try:
                printed, _ = child.communicate(timeout=PATIENCE_S)
            except subprocess.TimeoutExpired:
                return _without_gpu()
            finally:
                child.kill()
        return _parsed(printed)

    return answer


def _parsed(printed: bytes) -> MachineLook:
    try:
        told = json.loads(printed)
        if told["kind"] == "cuda":
            return MachineLook("cuda", str(told["name"]), int(told["bytes"]), bool(told["bf16"]))
        return MachineLook("mps", "Apple GPU", _main_memory(), False) if told["kind"] == "mps" else _without_gpu()
    except (ValueError, KeyError, TypeError):
        return _without_gpu()  # torch could not be imported, or the child was killed


def _without_gpu() -> MachineLook:
    return MachineLook("cpu", "", _main_memory(), _processor_has_bf16())


def _main_memory() -> int:
    """Bytes of main memory, or of this container's share of it."""
    import psutil

    limits = [int(psutil.virtual_memory().total)]
    for path in map(Path, _LIMITS):
        try:
            text = path.read_text().strip()
        except OSError:
            continue
        limits += [int(text)] if text.isdecimal() else []
    return min(limits)


def _processor_has_bf16() -> bool:
    try:
        known = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False
    return any(flag in known for flag in _BF16_FLAGS)
