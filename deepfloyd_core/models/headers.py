"""Reads the headers of safetensors files: which tensors, with which shape and dtype. Reads no tensor; no torch."""

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

from deepfloyd_core.files import parsed_json

_ENDING = ".safetensors"
UNET_WEIGHTS = "diffusion_pytorch_model.safetensors"  # the name that diffusers gives it in `unet/`


@dataclass(frozen=True)
class Header:
    """The tensors of a file by name, and its metadata."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]  # as safetensors spells them: F32, BF16
    metadata: dict[str, str]


def read_header(file: Path) -> Header:
    """The header of a safetensors file. Raises SafetensorError or OSError when the file is not one, or incomplete."""
    with safe_open(file, "np") as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
        shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
        dtypes = {name: str(part.get_dtype()) for name, part in slices.items()}
        return Header(shapes, dtypes, dict(opened.metadata() or {}))


def read_scalars(file: Path, names: Iterable[str]) -> list[float]:
    """The values of tensors with one element. Raises ValueError for a tensor of another size or kind."""
    with file.open("rb") as handle:
        size = int.from_bytes(handle.read(8), "little")
        header = parsed_json(handle.read(size))
        found = []
        for name in names:
            dtype, (start, end) = header[name]["dtype"], header[name]["data_offsets"]
            handle.seek(8 + size + start)
            data = handle.read(end - start)
            if dtype == "BF16":
                dtype, data = "F32", b"\0\0" + data  # its bits are the upper half of an F32's
            kind = {"F64": "<d", "F32": "<f", "F16": "<e", "I64": "<q", "I32": "<i"}.get(dtype, "")
            if not kind or struct.calcsize(kind) != len(data):
                raise ValueError(f"{name} is no number")
            found.append(float(struct.unpack(kind, data)[0]))
        return found


def unet_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights of a pipeline folder's UNet, by name."""
    files = weight_files(folder / "unet", UNET_WEIGHTS)
    return {name: shape for file in files for name, shape in read_header(file).shapes.items()}


def weight_files(folder: Path, name: str) -> list[Path]:
    """The files from which diffusers or transformers loads a model: the one with the usual name, or those of its index.

    Other files in the folder (variants such as `model.fp16.safetensors`) hold the same tensors in another dtype. Raises
    ValueError and others for an index that is none, and for one that names a file elsewhere.
    """
    index = folder / f"{name}.index.json"
    if not index.exists():
        return [folder / name]
    names = set(parsed_json(index.read_bytes())["weight_map"].values())
    if strange := [one for one in names if Path(one).name != one or not one.endswith(_ENDING)]:
        raise ValueError(f"it names {strange[0]!r}, and weights are {_ENDING} files beside it")
    return sorted(folder / one for one in names)
