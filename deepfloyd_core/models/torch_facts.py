"""What torch is and can do here, found in a child process: a torch that crashes, or hangs in a driver, is a finding too.

Run as a module it prints its facts as JSON. It takes 2 to 4 s, nearly all of it torch's import.
"""

import os
import sys
from collections.abc import Mapping
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Literal

from pydantic import ValidationError

from deepfloyd_core.config.base import Spec
from deepfloyd_core.config.stage_run import Precision
from deepfloyd_core.errors import JobError
from deepfloyd_core.processes.aside import PATIENCE_S, ask

if TYPE_CHECKING:
    import torch

_CHANNELS, _EDGE = 256, 64  # of the convolution with 3x3 kernels that is timed, as IF's UNets have them: 4.8 GFLOP
_TRIES = 3


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
    cpu_has_bf16: bool = True  # it multiplies faster in it
    cpu_flops: Mapping[Precision, float] = {}  # operations a second of such a convolution on the CPU
    gpu_flops: Mapping[Precision, float] = {}  # on the GPU, if there is one

    @property
    def bf16_times(self) -> float | None:
        """How much longer a convolution takes in bf16 than in fp32 on the CPU; None: not measured."""
        return self.cpu_flops["no"] / self.cpu_flops["bf16"] if self.cpu_flops else None


def ask_torch(patience_s: float = PATIENCE_S) -> TorchFacts:
    """The facts, from a child process. Raises JobError if that fails or does not end in time."""
    answer = ask("torch", __name__, patience_s=patience_s)
    try:
        return TorchFacts.model_validate_json(answer)
    except ValidationError:
        raise JobError(f"torch told nothing of use: {answer.strip()[:200]!r}") from None


def _facts() -> TorchFacts:
    """In the child process."""
    import torch

    from deepfloyd_core.models.torch_device import computes_bf16

    cpu = torch.device("cpu")
    build = "the CPU"
    if torch.version.cuda:
        build = f"CUDA {torch.version.cuda}"
    elif torch.version.hip:
        build = f"ROCm {torch.version.hip}"
    facts = partial(
        TorchFacts, version=torch.__version__, build=build, threads=torch.get_num_threads(),
        cpu_has_bf16=computes_bf16(cpu), cpu_flops=_flops(cpu),
    )  # fmt: skip
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        bf16: Literal["native", "emulated", "none"] = "native" if native else "none"
        if not native and torch.cuda.is_bf16_supported():
            bf16 = "emulated"
        return facts(
            device="cuda", total_bytes=total, free_bytes=free, bf16=bf16, device_name=torch.cuda.get_device_name(),
            gpu_flops=_flops(torch.device("cuda")),
        )  # fmt: skip
    if torch.backends.mps.is_available():
        return facts(device="mps", gpu_flops=_flops(torch.device("mps")))
    return facts(device="cpu")


def _flops(device: "torch.device") -> dict[Precision, float]:
    """By turns, so that both precisions meet the same load; the first try chooses the kernels. The best try counts."""
    import torch

    names: dict[Precision, torch.dtype] = {"no": torch.float32, "bf16": torch.bfloat16}
    best: dict[Precision, float] = dict.fromkeys(names, 0.0)
    with torch.no_grad():
        operands = {name: _operands(device, dtype) for name, dtype in names.items()}
        for _ in range(_TRIES):
            for name, (x, weight) in operands.items():
                start = perf_counter()
                torch.nn.functional.conv2d(x, weight, padding=1)[0, 0, 0, 0].item()  # waits for a GPU
                best[name] = max(best[name], 2 * _CHANNELS**2 * 9 * _EDGE**2 / (perf_counter() - start))
    return best


def _operands(device: "torch.device", dtype: "torch.dtype") -> "tuple[torch.Tensor, torch.Tensor]":
    import torch

    shapes = (1, _CHANNELS, _EDGE, _EDGE), (_CHANNELS, _CHANNELS, 3, 3)
    x, weight = (torch.ones(shape, device=device, dtype=dtype) for shape in shapes)
    layout = torch.channels_last
    return x.contiguous(memory_format=layout), weight.contiguous(memory_format=layout)


def main() -> None:
    """The child process."""
    sys.stdout.write(_facts().model_dump_json())
    sys.stdout.flush()
    os._exit(0)  # the end of a GPU's driver takes longer than all before it


if __name__ == "__main__":
    main()
