"""Where models run: asked in a process of its own (`processes.aside`), so that torch is not in the caller's.

`python -P -m deepfloyd_core.models.device NAME` prints a `Device` as JSON; NAME is the run file's `device`. It also times
a convolution as a UNet has them, for a quarter of a second in each precision.
"""

import json
import sys
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import psutil

from deepfloyd_core.store.counts import many

if TYPE_CHECKING:
    import torch

_TIMED_S = 0.25
_CHANNELS, _EDGE = 256, 64  # of a convolution with 3x3 kernels, as IF's UNets have


@dataclass(frozen=True)
class Device:
    """Where models run."""

    kind: str  # cpu, cuda, mps
    name: str  # `CPU with 2 cores`, or the GPU's name
    total: int  # bytes of its memory
    free: int
    has_bf16: bool  # it computes in bf16; a CPU without takes six times as long as in fp32
    torch: str  # torch's version
    flops: dict[str, float]  # operations a second of such a convolution, by mixed_precision

    @property
    def is_cpu(self) -> bool:
        """Whether it is the CPU."""
        return self.kind == "cpu"


def device_of(answer: str) -> Device:
    """The device that a process of this module has printed."""
    return Device(**json.loads(answer))


def main(name: str) -> None:
    """Print the device as JSON."""
    import torch

    from deepfloyd_core.models.torch_device import computes_bf16, pick_device

    device = pick_device(name)
    memory = psutil.virtual_memory()
    total, free, said = memory.total, memory.available, f"CPU with {many(psutil.cpu_count() or 1, 'core')}"
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        said = torch.cuda.get_device_name(device)
    flops = {name: _speed(device, dtype) for name, dtype in (("no", torch.float32), ("bf16", torch.bfloat16))}
    found = Device(device.type, said, total, free, computes_bf16(device), torch.__version__, flops)
    sys.stdout.write(json.dumps(asdict(found)))


def _speed(device: "torch.device", dtype: "torch.dtype") -> float:
    """Operations a second of a convolution."""
    import torch

    shape, layout = (1, _CHANNELS, _EDGE, _EDGE), torch.channels_last
    x = torch.randn(shape, device=device, dtype=dtype).contiguous(memory_format=layout)
    weight = torch.randn(_CHANNELS, _CHANNELS, 3, 3, device=device, dtype=dtype).contiguous(memory_format=layout)
    done, began = -1, time.perf_counter()  # the first one warms up
    with torch.no_grad():
        while done < 1 or time.perf_counter() - began < _TIMED_S:
            torch.nn.functional.conv2d(x, weight, padding=1).sum().item()  # waits for a GPU
            done += 1
            began = time.perf_counter() if done == 0 else began
    return done * 2 * _CHANNELS**2 * 9 * _EDGE**2 / (time.perf_counter() - began)


if __name__ == "__main__":
    main(sys.argv[1])
