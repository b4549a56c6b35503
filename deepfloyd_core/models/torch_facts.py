"""What torch is and can do here, found in a child process: a torch that crashes, or hangs in a driver, is a finding too.

Run as a module it prints its facts as JSON. It takes 3 to 5 s: torch's import, and a short calibration.
"""

import os
import sys
from functools import partial
from typing import Literal

from pydantic import Field, ValidationError

from deepfloyd_core.config.base import Spec
from deepfloyd_core.errors import JobError
from deepfloyd_core.models.work import Speeds
from deepfloyd_core.processes.aside import PATIENCE_S, ask


class TorchFacts(Spec):
    """Facts about torch and the device that `device = auto` takes."""

    version: str
    build: str  # "the CPU", "CUDA 12.8", "ROCm 6.4"
    device: Literal["cuda", "mps", "cpu"]
    device_name: str = ""
    threads: int
    total_bytes: int = 0  # of the GPU's memory; 0: there is none of its own
    free_bytes: int = 0
    gpus: int = 1  # that torch can use; all like the first
    bf16: Literal["native", "emulated", "none"] = "native"
    cpu_has_bf16: bool = True  # it multiplies faster in it
    cpu_speeds: Speeds = Field(default={})
    gpu_speeds: Speeds = Field(default={})  # if there is one

    @property
    def bf16_times(self) -> float | None:
        """How much longer a convolution takes in bf16 than in fp32 on the CPU; None: not measured."""
        return self.cpu_speeds["no"].flops / self.cpu_speeds["bf16"].flops if self.cpu_speeds else None


def ask_torch(patience_s: float = PATIENCE_S, threads: int | None = None) -> TorchFacts:
    """The facts, from a child process. threads: of the CPU's speed, the run file's `num_threads`. Raises JobError if that
    fails or does not end in time.
    """
    answer = ask("torch", __name__, str(threads or ""), patience_s)
    try:
        return TorchFacts.model_validate_json(answer)
    except ValidationError:
        raise JobError(f"torch told nothing of use: {answer.strip()[:200]!r}") from None


def _facts(threads: int | None) -> TorchFacts:
    """In the child process."""
    import torch

    from deepfloyd_core.models.calibration import measured_speeds
    from deepfloyd_core.models.torch_device import computes_bf16

    if threads is not None:
        torch.set_num_threads(threads)
    cpu = torch.device("cpu")
    build = "the CPU"
    if torch.version.cuda:
        build = f"CUDA {torch.version.cuda}"
    elif torch.version.hip:
        build = f"ROCm {torch.version.hip}"
    facts = partial(
        TorchFacts, version=torch.__version__, build=build, threads=torch.get_num_threads(),
        cpu_has_bf16=computes_bf16(cpu), cpu_speeds=measured_speeds(cpu),
    )  # fmt: skip
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        bf16: Literal["native", "emulated", "none"] = "native" if native else "none"
        if not native and torch.cuda.is_bf16_supported():
            bf16 = "emulated"
        return facts(
            device="cuda", total_bytes=total, free_bytes=free, bf16=bf16, device_name=torch.cuda.get_device_name(),
            gpus=torch.cuda.device_count(),
            gpu_speeds=measured_speeds(torch.device("cuda")),
        )  # fmt: skip
    if torch.backends.mps.is_available():
        return facts(device="mps", gpu_speeds=measured_speeds(torch.device("mps")))
    return facts(device="cpu")


def main() -> None:
    """The child process."""
    sys.stdout.write(_facts(int(sys.argv[1]) if len(sys.argv) > 1 else None).model_dump_json())
    sys.stdout.flush()
    os._exit(0)  # the end of a GPU's driver takes longer than all before it


if __name__ == "__main__":
    main()
