"""What torch is and can do here, found in a child process: a torch that crashes, or hangs in a driver, is a finding too.

Run as a module it prints its facts as JSON. It takes 2 to 4 s, nearly all of it torch's import.
"""

import math
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from shlex import quote
from time import perf_counter
from typing import Literal

from pydantic import ValidationError

from deepfloyd_core.config.base import Spec
from deepfloyd_core.config.run import Run
from deepfloyd_core.doctor.finding import Finding

TIMEOUT_S = 60.0  # from a cold network disk
AGAIN = "pip install --force-reinstall torch"
_DRIVER = Path("/proc/driver/nvidia/version")
_EDGE, _TRIES = 512, 8  # of the products that are timed: 0.27 GFLOP each
_SLOW = 1.3  # times fp32


class TorchFacts(Spec):
    """Facts about torch and the device that `device = auto` takes."""

    version: str
    build: str  # "the CPU", "CUDA 12.8", "ROCm 6.4"
    device: Literal["cuda", "mps", "cpu"]
    device_name: str = ""
    threads: int
    total_bytes: int = 0  # of the GPU's memory; 0: there is none of its own
    free_bytes: int = 0
    bf16: Literal["native", "emulated", "none"] = "native"
    bf16_times: float | None = None  # how much longer a product takes in bf16 than in fp32; None: not measured


class NoTorch(Exception):
    """Why torch has no facts to tell."""


def ask_torch(timeout_s: float = TIMEOUT_S) -> TorchFacts:
    """The facts, from a child process. Raises NoTorch if that fails or does not end in time."""
    command = [sys.executable, "-P", "-m", "deepfloyd_core.doctor.torch_facts"]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        raise NoTorch(
            f"torch has not answered in {timeout_s:g} s; a driver of the GPU, or the disk, may hang"
        ) from None
    if done.returncode < 0:
        raise NoTorch(f"torch was ended by {signal.Signals(-done.returncode).name} while it was imported")
    if done.returncode:
        raise NoTorch(f"torch cannot be imported: {(done.stderr.strip() or 'it said nothing').splitlines()[-1]}")
    try:
        return TorchFacts.model_validate_json(done.stdout)
    except ValidationError:
        raise NoTorch(f"torch told nothing of use: {done.stdout.strip()[:200]!r}") from None


def torch_findings(facts: TorchFacts, run: Run | None) -> list[Finding]:
    """The build and device, and the arithmetic of bf16."""
    return [_device_finding(facts, run), _bf16_finding(facts, run)]


def _device_finding(facts: TorchFacts, run: Run | None) -> Finding:
    asked = run.config.device if run else "auto"
    name = f" ({facts.device_name})" if facts.device_name else ""
    text = f"{facts.version}, built for {facts.build}; computes on {facts.device}{name}"
    if asked not in ("auto", "cpu", facts.device):
        return Finding("torch", "fault", f"{text}, and device is {asked!r}", 'in the run file: device = "auto"')
    if facts.device == "cpu":
        text = f"{text} with {facts.threads} threads"
        if _DRIVER.exists() and asked != "cpu":
            return Finding("torch", "note", f"{text}, although a driver of NVIDIA is loaded", AGAIN)
    return Finding("torch", "fine", text)


def _bf16_finding(facts: TorchFacts, run: Run | None) -> Finding:
    on_cpu = facts.device == "cpu" or (run is not None and run.config.device == "cpu")
    if on_cpu:
        times = facts.bf16_times
        text = "not measured" if times is None else f"a product takes {times:.1f} times as long as in fp32, on the CPU"
        slow = times is not None and times > _SLOW
    else:
        text = f"{facts.bf16} on this GPU"
        slow = facts.bf16 != "native"
    file, keys = (run.file, _bf16_keys(run)) if run else ("", [])
    if not slow or not keys:
        return Finding("bf16", "fine", text)
    sets = " ".join(f"--set {key}" for key in keys)
    return Finding("bf16", "note", f"{text}, and the run file computes in bf16", f"deepfloyd run {quote(file)} {sets}")


def _bf16_keys(run: Run) -> list[str]:
    """What a run file would set to compute in fp32 where it computes in bf16 now."""
    stages = [
        f"stage{n}.mixed_precision=no" for n in run.config.stages if run.config.stage(n).mixed_precision == "bf16"
    ]
    return [*stages, *(["text_encoder_dtype=fp32"] if run.config.text_encoder_dtype == "bf16" else [])]


def _facts() -> TorchFacts:
    """In the child process."""
    import torch

    build = "the CPU"
    if torch.version.cuda:
        build = f"CUDA {torch.version.cuda}"
    elif torch.version.hip:
        build = f"ROCm {torch.version.hip}"
    facts = partial(
        TorchFacts,
        version=torch.__version__,
        build=build,
        threads=torch.get_num_threads(),
        bf16_times=_bf16_times(),
    )
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        bf16: Literal["native", "emulated", "none"] = "native" if native else "none"
        if not native and torch.cuda.is_bf16_supported():
            bf16 = "emulated"
        name = torch.cuda.get_device_name()
        return facts(device="cuda", device_name=name, total_bytes=total, free_bytes=free, bf16=bf16)
    if torch.backends.mps.is_available():
        return facts(device="mps")
    return facts(device="cpu")


def _bf16_times() -> float:
    """On the CPU."""
    import torch

    torch.set_num_threads(1)  # others wait for cores
    operands = {dtype: torch.ones(_EDGE, _EDGE, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}
    seconds = dict.fromkeys(operands, math.inf)
    for _ in range(_TRIES):  # by turns, so that both meet the same load; the first chooses the kernels
        for dtype, x in operands.items():
            start = perf_counter()
            x @ x
            seconds[dtype] = min(seconds[dtype], perf_counter() - start)
    return round(seconds[torch.bfloat16] / seconds[torch.float32], 2)


def main() -> None:
    """The child process."""
    sys.stdout.write(_facts().model_dump_json())
    sys.stdout.flush()
    os._exit(0)  # the end of a GPU's driver takes longer than all before it


if __name__ == "__main__":
    main()
