"""How much memory sampling will take, before a model is loaded: its weights, and what one call of it holds at its highest.

The call is made on fake tensors, which have shapes and no values: a second, whatever the model's size. Every storage that it
would allocate is counted until it would be freed. The tensors are those of a CPU, whatever the device: builds of torch
without CUDA have no others.
"""

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import CLIPTextConfig, CLIPTextModel

from deepfloyd_core.models.device import machine_memory
from deepfloyd_core.models.text_encoders import TextEncoderKind

_ROWS = 77  # of text
# What a CPU's kernels take beside the tensors: buffers, and copies of a part of a convolution's input and output. Fitted to
# four models (benchmarks/sampling_memory.py), within 6 % of what each takes.
_BUFFERS, _COPIED = 250_000_000, 0.25
_SIZES = 48  # powers of two up to 140 TB


@dataclass(frozen=True)
class Forecast:
    """Bytes of memory."""

    weights: int
    call: int  # at its highest, beside the weights

    def __or__(self, other: "Forecast") -> "Forecast":
        """Of two models that are there together, and are called one after the other."""
        return Forecast(self.weights + other.weights, max(self.call, other.call))

    @property
    def total(self) -> int:
        """Of both."""
        return self.weights + self.call

    def __str__(self) -> str:
        return f"{self.total / 1e9:.1f} GB of memory"


def unet_forecast(
    folder: Path, size: tuple[int, int], count: int, dtype: torch.dtype, device: torch.device
) -> Forecast:
    """Of calls of a pipeline folder's UNet with `count` samples of (width, height)."""
    with FakeTensorMode(), default_dtype(dtype):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder, subfolder="unet"))
        x = torch.empty(count, unet.config.in_channels, size[1], size[0]).contiguous(memory_format=torch.channels_last)
        text = torch.empty(count, _ROWS, unet.config.encoder_hid_dim or unet.config.cross_attention_dim)
        t = torch.zeros(count, dtype=torch.long)
        has_level = unet.config.class_embed_type is not None or unet.config.num_class_embeds is not None
        return _forecast(unet, lambda: unet(x, t, text, class_labels=t if has_level else None), device)


def vae_forecast(folder: Path, size: tuple[int, int], device: torch.device) -> Forecast:
    """Of decoding latents of (width, height) in fp32."""
    with FakeTensorMode(), default_dtype(torch.float32):
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(folder, subfolder="vae"))
        latents = torch.empty(1, vae.config.latent_channels, size[1], size[0])
        return _forecast(vae, lambda: vae.decode(latents), device)


def text_forecast(folder: Path, dtype: torch.dtype) -> Forecast:
    """Of a pipeline folder's CLIP, whose calls are small."""
    with FakeTensorMode(), default_dtype(dtype):
        model = CLIPTextModel(CLIPTextConfig.from_pretrained(folder / "text_encoder"))
    return Forecast(sum(param.untyped_storage().nbytes() for param in model.parameters()), 0)


def encoder_forecast(kind: TextEncoderKind, folder: Path, dtype: torch.dtype) -> Forecast:
    """Of a pipeline folder's text encoder as a whole; beside its weights calls are small."""
    with torch.device("meta"):
        config = getattr(transformers, kind.config_class).from_pretrained(folder / kind.weights_folder)
        model = getattr(transformers, kind.model_class)(config)
    return Forecast(sum(param.numel() for param in model.parameters()) * dtype.itemsize, 0)


def free_bytes(device: torch.device) -> int | None:
    """What is free on a GPU, with what this process has freed; None: not known, as on a CPU, where others may give way."""
    if device.type != "cuda":
        return None
    gc.collect()  # a model with a ControlNet refers to itself
    torch.cuda.empty_cache()  # else the allocator keeps what the stage before took
    return int(torch.cuda.mem_get_info(device)[0])


def device_bytes(device: torch.device) -> int:
    """All memory of a device, whatever is free of it now; of a processor and of Apple's GPU that of the machine."""
    return int(torch.cuda.mem_get_info(device)[1]) if device.type == "cuda" else machine_memory().total


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """In this block new tensors have a dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _forecast(model: Any, call: Callable[[], object], device: torch.device) -> Forecast:
    for param in model.parameters():
        if param.ndim == 4:
            param.data = param.data.contiguous(memory_format=torch.channels_last)
    held = [param.untyped_storage() for param in model.parameters()]
    counted = Counted(held)
    with torch.no_grad(), counted:
        call()
    kernels = _BUFFERS + int(_COPIED * counted.convolved) if device.type == "cpu" else 0
    return Forecast(sum(storage.nbytes() for storage in held), counted.peak + kernels)


class Counted(TorchDispatchMode):
    """Counts the storages that operations allocate, and what the largest convolution takes and gives: bytes.

    known: storages that are there already. `blocks`: of all allocations, by the logarithm of their size.
    """

    def __init__(self, known: list[torch.UntypedStorage]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self.convolved = self._live = 0
        self.blocks = [0] * _SIZES
        self._seen: dict[int, weakref.ref[torch.UntypedStorage]] = {one._cdata: weakref.ref(one) for one in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        if func is torch.ops.aten.convolution.default:
            both = args[0].untyped_storage().nbytes() + out.untyped_storage().nbytes()
            self.convolved = max(self.convolved, both)
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if (seen := self._seen.get(key)) is not None and seen() is not None:
            return
        self._live += size
        self.blocks[size.bit_length() - 1 if size else 0] += size
        self.peak = max(self.peak, self._live)

        def freed(_: object) -> None:
            self._live -= size
            self._seen.pop(key, None)

        self._seen[key] = weakref.ref(storage, freed)
