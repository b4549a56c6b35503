"""The file with the weights of LPIPS (Zhang et al. 2018): the user's own, because none is shipped or downloaded.

It is the state dict of the `lpips` package's `LPIPS(net="alex")` or `LPIPS(net="vgg")` under that package's names, in
safetensors. All of it is checked before a run makes anything: 10 MB of AlexNet or 59 MB of VGG, some 50 ms. No torch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from deepfloyd_core.config.base import is_file
from deepfloyd_core.errors import ConfigError
from deepfloyd_core.models.headers import Header, read_header

SHIFT, SCALE = "scaling_layer.shift", "scaling_layer.scale"
_FIRST = "net.slice1.0.weight"  # its kernel distinguishes the networks


@dataclass(frozen=True)
class Trunk:
    """The part of a classifier whose features are compared: five slices of convolutions, each followed by a ReLU."""

    slices: tuple[tuple[int, ...], ...]  # numbers of the convolutions in torchvision's `features`, which name them
    widths: tuple[int, ...]  # channels that each slice ends with
    kernels: tuple[int, ...]  # px a side of each slice's convolutions
    stride: int  # of the first convolution; the others have 1
    padding: int  # of the first one; the others keep the size of what they see
    pool_px: int  # edge of the max-pooling windows, 2 px apart
    pooled: tuple[int, ...]  # slices that begin with one, from 0

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the file."""
        shapes: dict[str, tuple[int, ...]] = {SHIFT: (1, 3, 1, 1), SCALE: (1, 3, 1, 1)}
        before = 3
        for place, (numbers, width, kernel) in enumerate(zip(self.slices, self.widths, self.kernels, strict=True)):
            for number in numbers:
                shapes[f"{conv_name(place, number)}.weight"] = (width, before, kernel, kernel)
                shapes[f"{conv_name(place, number)}.bias"] = (width,)
                before = width
            shapes[lin_name(place)] = (1, width, 1, 1)
        return shapes


TRUNKS = {
    "alex": Trunk(((0,), (3,), (6,), (8,), (10,)), (64, 192, 384, 256, 256), (11, 5, 3, 3, 3), 4, 2, 3, (1, 2)),
    "vgg": Trunk(
        ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)), (64, 128, 256, 512, 512), (3, 3, 3, 3, 3), 1, 1, 2,
        (1, 2, 3, 4),
    ),
}  # fmt: skip


def conv_name(place: int, number: int) -> str:
    """The package's name of a convolution; `place`: of its slice, from 0."""
    return f"net.slice{place + 1}.{number}"


def lin_name(place: int) -> str:
    """The package's name of a slice's learned weights."""
    return f"lin{place}.model.1.weight"


def trunk_of(shapes: dict[str, tuple[int, ...]]) -> Trunk | None:
    """The network that a file's tensors belong to, judged by the kernel of its first convolution; None: neither network."""
    return next((trunk for trunk in TRUNKS.values() if trunk.shapes[_FIRST] == shapes.get(_FIRST)), None)


def check_lpips_file(file: Path) -> None:
    """Raises ConfigError unless a file holds the weights of LPIPS with AlexNet or VGG, complete and finite."""
    prefix = f"eval_lpips_model is {str(file)!r}"
    if file.suffix != ".safetensors":
        raise ConfigError(f"{prefix}; only .safetensors files are read, never a pickle. {_REMEDY}")
    if not is_file(file):
        raise ConfigError(f"{prefix}; there is no such file. {_REMEDY}")
    try:
        header = read_header(file)
        fault = next(_faults(header), "") or next(_value_faults(file, header), "")
    except (SafetensorError, OSError, ValueError) as error:
        raise ConfigError(f"{prefix}, which cannot be read: {error}. {_REMEDY}") from None
    if fault:
        raise ConfigError(f"{prefix}, {fault}. {_REMEDY}")


_REMEDY = (
    "It should be the state dict of the lpips package's LPIPS(net='alex') or LPIPS(net='vgg'); docs/training.md has "
    "the lines that make one. Or remove the key."
)


def _faults(header: Header) -> Iterator[str]:
    trunk = trunk_of(header.shapes)
    if trunk is None:
        yield f"in which {_FIRST} is {header.shapes.get(_FIRST, 'absent')}: weights of neither AlexNet nor VGG"
        return
    # The package's module lists its weights twice; `save_model` writes them once, a dict of clones has both.
    again = {_again(place): trunk.shapes[lin_name(place)] for place in range(len(trunk.slices))}
    known = {**again, **trunk.shapes}
    for name in sorted(header.shapes.keys() | trunk.shapes):
        found, wanted = header.shapes.get(name), known.get(name)
        if found != wanted:
            yield f"in which {name} is {found or 'absent'} and should be {wanted or 'absent'}"
    kinds = sorted({*header.dtypes.values()} - {"F32"})
    if kinds:
        yield f"with weights in {', '.join(kinds)}; the package's are F32"


def _value_faults(file: Path, header: Header) -> Iterator[str]:
    with safe_open(file, "np") as opened:
        for name in sorted(header.shapes):
            if not np.isfinite(opened.get_tensor(name)).all():
                yield f"in which {name} is not finite"
        for place in range(len(TRUNKS["alex"].slices)):
            twice = _again(place) in header.shapes
            if twice and (opened.get_tensor(_again(place)) != opened.get_tensor(lin_name(place))).any():
                yield f"in which {_again(place)} is not {lin_name(place)}"


def _again(place: int) -> str:
    """The other name of a slice's learned weights."""
    return f"lins.{place}.model.1.weight"
