"""torch.compile of the UNet for training steps, by SimpleTuner's `dynamo_backend`.

It makes one graph without a break for each batch size, and uses no symbolic sizes. torch would introduce these at the
second size: then a batch's kernels would depend on the batches before it, and a resumed run would end with different
bytes. Only training steps are compiled. A validation is a few passes, in another mode and then with other layers, and
would be compiled again each time.
"""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from deepfloyd_core.errors import ConfigError

# Beyond it torch would continue without compiling. A run has at most two sizes a bucket: full batches, and the last one.
_MOST_SIZES = 4096
# Begin what torch adds below the cause.
_HOW_TO_DEBUG = ("Set TORCHDYNAMO_VERBOSE", "You can suppress")
# Kernels are chosen by rule, not by measured speed: so a resumed run has the same ones.
_OPTIONS: dict[str, dict[str, str | int | bool | Callable[..., Any]]] = {"inductor": {"deterministic": True}}


def check_backend(backend: str, device: torch.device, prefix: str) -> None:
    """Raises ConfigError, beginning with `prefix`, when a backend cannot compile for a device; checked by compiling one
    line.
    """
    if backend == "no":
        return
    try:
        _compiled(_a_line, backend)(torch.ones(16, device=device))
    except (
        RuntimeError,
        OSError,
    ) as error:  # a compiler, its headers or triton are missing; torch has an error for each
        lines = [line for line in str(error).splitlines() if line.strip() and not line.startswith(_HOW_TO_DEBUG)]
        *_, last = lines or [type(error).__name__]
        raise ConfigError(
            f"{prefix}, and nothing can be compiled for {device.type} on this machine: {type(error).__name__}, "
            f"{last.strip()} Install a C++ compiler and Python's headers (Debian: apt-get install g++ "
            "python3-dev), on a GPU triton as well; or set it to no."
        ) from error


def compiled_unet(unet: UNet2DConditionModel, backend: str) -> Callable[..., Any]:
    """The compiled UNet for training steps. The UNet itself keeps its own forward and the names of its weights."""
    plain: Callable[..., Any] = unet
    if backend == "no":
        return plain
    ready = _compiled(plain, backend)

    def call(*args: Any, **named: Any) -> Any:
        with torch._dynamo.config.patch(recompile_limit=_MOST_SIZES, accumulated_recompile_limit=_MOST_SIZES):
            return ready(*args, **named)

    return call


def _compiled(what: Callable[..., Any], backend: str) -> Callable[..., Any]:
    return torch.compile(what, fullgraph=True, dynamic=False, backend=backend, options=_OPTIONS.get(backend))


def _a_line(x: torch.Tensor) -> torch.Tensor:
    return x.sin() * 2 + 1
