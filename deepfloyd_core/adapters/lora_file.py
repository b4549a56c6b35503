"""A file with a LoRA, by its header: the layers that it changes, their scale, and whether it fits a base model. No torch."""

from collections.abc import Iterator
from pathlib import Path
from shlex import quote
from typing import Any

from deepfloyd_core.adapters.controlnet_file import Shapes
from deepfloyd_core.adapters.files import BITFIT_FILE, CONTROL_FILE, LORA_FILE, UNET_FOLDER
from deepfloyd_core.adapters.lora_formats import ADAPTER, PEFT, Names
from deepfloyd_core.config.base import is_there
from deepfloyd_core.errors import ConfigError
from deepfloyd_core.files import parsed_json
from deepfloyd_core.models.headers import UNET_WEIGHTS, Header, read_scalars

PEFT_FILE, PEFT_SETTINGS = "adapter_model.safetensors", "adapter_config.json"  # peft's own names for a saved adapter
_PLACES = (BITFIT_FILE, CONTROL_FILE, f"{UNET_FOLDER}/{UNET_WEIGHTS}", LORA_FILE, UNET_WEIGHTS, PEFT_FILE)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
METADATA = "lora_adapter_metadata"  # peft's settings in the file's own metadata, as JSON


Layers = dict[str, dict[str, tuple[int, ...]]]  # shapes of the parts A, B and magnitude_vector of each layer


def weights_file(path: Path, prefix: str) -> Path:
    """The file of weights that a path names or a folder has. prefix: how a ConfigError begins."""
    if not is_there(path):
        raise ConfigError(f"{prefix}; there is no such file or folder: {path}.")
    if path.is_dir():
        found = next((path / name for name in _PLACES if (path / name).is_file()), None)
        if found is None:
            pickles = sorted(file for file in path.iterdir() if file.suffix in _PICKLES)
            hint = f" {_made_safe(pickles[0])}" if pickles else ""
            raise ConfigError(f"{prefix}; {path} has none of {', '.join(_PLACES)}.{hint}")
        return found
    if path.suffix != ".safetensors":
        hint = f" {_made_safe(path)}" if path.suffix in _PICKLES else ""
        raise ConfigError(f"{prefix}; only .safetensors files are read, never a pickle.{hint}")
    return path


def _made_safe(pickle: Path) -> str:
    """How a user converts a pickle of tensors to safetensors. torch refuses a pickle with anything else."""
    safe = pickle.with_suffix(".safetensors")
    code = (
        "import sys, torch; from safetensors.torch import save_file; "
        "found = torch.load(sys.argv[1], map_location='cpu', weights_only=True); "
        "save_file({k: v.contiguous() for k, v in found.items()}, sys.argv[2])"
    )
    return f'Convert {pickle.name}: python -c "{code}" {quote(str(pickle))} {quote(str(safe))}'


def adaptable_layers(base: Shapes) -> Iterator[str]:
    """The layers of a UNet that can have an adapter: linear ones and convolutions."""
    return (name.removesuffix(".weight") for name, shape in base.items() if name.endswith(".weight") and len(shape) > 1)


def adapted_layers(shapes: Shapes) -> Layers:
    """The layers that adapters are on. shapes: of tensors with our names, `LAYER.lora_A.weight`."""
    layers: Layers = {}
    for name, shape in shapes.items():
        match = ADAPTER.fullmatch(name)
        assert match  # whoever named them saw to it
        layers.setdefault(match["layer"], {})[match["part"].split(".")[0]] = shape
    return layers


def name_faults(file: Path, names: Names) -> Iterator[str]:
    """Faults of a LoRA's file before its shapes are checked: two tensors for one, or peft's settings missing."""
    ours = list(names.tensors.values())
    if twice := next((name for name in ours if ours.count(name) > 1), None):
        yield f"which has {twice} twice, under two names. Keep one of them"
    if PEFT in names.formats and not (file.parent / PEFT_SETTINGS).is_file():
        yield f"a LoRA in peft's format, whose alpha is in {PEFT_SETTINGS}. Put that file beside it"


def layer_faults(layers: Layers, base: Shapes, model: str) -> Iterator[str]:
    """Why adapters do not fit a base model, by the shapes of its weights. model: what it is called."""
    for layer, parts in sorted(layers.items()):
        weight = base.get(f"{layer}.weight", ())
        if not {"A", "B"} <= parts.keys():
            yield f"which has only one half of the adapter on {layer}"
        elif not weight or (parts["B"][:1], parts["A"][1:]) != (weight[:1], weight[1:]):
            yield unfit_tensor(model, layer, parts["B"][:1] + parts["A"][1:], weight)
        else:
            yield from _adapter_faults(layer, parts, weight)


def unfit_tensor(model: str, name: str, found: tuple[int, ...] | None, wanted: tuple[int, ...] | None) -> str:
    """That a tensor has another shape than a model's, or is on one side only."""
    return (
        f"which does not fit {model}: {name} is {found or 'absent'} in it and {wanted or 'absent'} there. "
        "Give weights of the same stage and flavour"
    )


def _adapter_faults(layer: str, parts: dict[str, tuple[int, ...]], weight: tuple[int, ...]) -> Iterator[str]:
    """Shapes of an adapter's parts that peft would not have made for a weight."""
    rank, ones = parts["A"][0], (1,) * (len(weight) - 2)
    length = weight[:1] if not ones else (1, weight[0], *ones)
    expected = {"B": (weight[0], rank, *ones), "magnitude_vector": length}
    for name, shape in expected.items():
        if parts.get(name, shape) != shape:
            yield f"which has a lora_{name} of {parts[name]} on {layer} in place of {shape}"


def lora_settings(file: Path, header: Header, names: Names) -> dict[str, Any]:
    """The settings of a LoRA, in peft's words. Raises ValueError when the record has none."""
    if names.alphas:
        return {"lora_alpha": read_scalars(file, list(names.alphas)[:1])[0]}
    text = header.metadata.get(METADATA, "{}")
    if PEFT in names.formats:
        text = (file.parent / PEFT_SETTINGS).read_text(encoding="utf-8")
    record = parsed_json(text)
    plain = isinstance(record, dict)
    return checked_settings(
        {key.removeprefix("unet."): value for key, value in record.items()} if plain else None, METADATA
    )


def lora_alpha(file: Path, header: Header, names: Names) -> float | None:
    """The alpha of a LoRA; None: it has none, so that it is its rank. Raises as `lora_settings`."""
    alpha = lora_settings(file, header, names).get("lora_alpha")
    return None if alpha is None else float(alpha)


def checked_settings(settings: dict[str, Any] | None, name: str) -> dict[str, Any]:
    """Settings of peft that were read from a file. Raises ValueError for what are none. name: of their record."""
    if settings is None or not isinstance(settings.get("lora_alpha", 1.0), int | float):
        raise ValueError(f"its {name} is no record of a LoRA")
    return settings
