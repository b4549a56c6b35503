"""The weights that a training starts from in place of the base model: a LoRA, a ControlNet-LoRA, biases or a whole UNet.

Its header and the base model's headers are enough for all checks, so these run before anything is made or loaded.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from shlex import quote
from typing import Any

from safetensors import SafetensorError

from deepfloyd_core.adapters.controlnet_file import RECORD, Shapes, control_record, new_shapes, way_down
from deepfloyd_core.adapters.files import (
    BITFIT,
    BITFIT_FILE,
    CONTROL,
    CONTROL_FILE,
    FULL,
    LORA,
    LORA_FILE,
    UNET_FOLDER,
    Product,
    product_of,
)
from deepfloyd_core.adapters.lora_formats import ADAPTER, PEFT, Names, our_names, stranger_fault
from deepfloyd_core.config.base import is_there
from deepfloyd_core.config.flavours import TEXT_MODULES
from deepfloyd_core.config.run import Run
from deepfloyd_core.config.stage import StageConfig
from deepfloyd_core.config.stages import CONTROLLED, Stage, titles
from deepfloyd_core.errors import ConfigError
from deepfloyd_core.models.headers import UNET_WEIGHTS, Header, read_header, read_scalars, unet_shapes
from deepfloyd_core.store.artifacts import Artifact, Request, finished
from deepfloyd_core.store.manifest import Manifest
from deepfloyd_core.store.pinned import PinnedFile, pinned
from deepfloyd_core.store.versions import bundle_of, find_version, stage_folder
from deepfloyd_core.types import Json

_PEFT_FILE, _PEFT_SETTINGS = "adapter_model.safetensors", "adapter_config.json"  # peft's own names for a saved adapter
_PLACES = (BITFIT_FILE, CONTROL_FILE, f"{UNET_FOLDER}/{UNET_WEIGHTS}", LORA_FILE, UNET_WEIGHTS, _PEFT_FILE)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_METADATA = "lora_adapter_metadata"


@dataclass(frozen=True)
class Parent:
    """A file of weights that a training starts from."""

    file: Path
    note: str = ""  # what a user should know of how it is read

    @cached_property
    def pinned(self) -> PinnedFile:
        """The file as it is at the first call: a whole UNet has gigabytes, and most checks need no hash."""
        return pinned(self.file)


def find_parent(run: Run, stage: Stage, folder: Path) -> Parent | None:
    """The weights that a stage's `init_lora` names, or None. `folder`: the base model.

    Raises ConfigError when they cannot be read, or are not what the stage's settings train.
    """
    config = run.config.stage(stage)
    if config.init_lora is None:
        return None
    prefix = f"stage{stage}.init_lora is {config.init_lora!r}"
    file = weights_file(named_weights(run.workspace, stage, str(config.init_lora)), prefix)
    if fault := misfit(config, file, folder):
        raise ConfigError(f"{prefix}, {fault}.")
    header, base = read_header(file), unet_shapes(folder)
    names = our_names(header.shapes, _layers(base))
    known_as = names.known_as if _kind(header, names) is LORA else ""
    note = f"{prefix}: a LoRA in the format of {known_as}; all its {len(names.tensors)} tensors are read, to the bit"
    return Parent(file, note if known_as else "")


def misfit(config: StageConfig, file: Path, folder: Path) -> str:
    """Why a stage's training cannot start from a file of weights, and what to do; empty: it can. folder: the base model."""
    try:
        return next(_faults(config, file, read_header(file), unet_shapes(folder)), "")
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        return f"and {file} cannot be read: {error}"


def shorter_training(workspace: Path, request: Request) -> Artifact | None:
    """The longest finished training that differs from a planned one only in having fewer steps, and in its validations."""

    def is_shorter(other: Manifest) -> bool:
        fewer = int(other.spec["max_train_steps"]) < request.spec["max_train_steps"]
        return fewer and other.inputs == request.inputs and _but_steps(other.spec) == _but_steps(request.spec)

    found = [
        (int(manifest.spec["max_train_steps"]), artifact)
        for artifact, manifest in finished(workspace, request.kind, request.format)
        if is_shorter(manifest)
    ]
    return max(found, key=lambda steps_and_artifact: steps_and_artifact[0], default=(0, None))[1]


def shorter_note(stage: Stage, steps: int, shorter: Artifact) -> str:
    """How to continue from a shorter training, for a training that would start at step 0."""
    done = int(shorter.spec["max_train_steps"])
    return (
        f"stage {stage} starts at step 0 of {steps}: {shorter.name} has {done} steps of the same settings, but a "
        "finished training keeps only its weights, and a schedule spans all steps. To continue from its weights set "
        f'in [stage{stage}]: init_lora = "{shorter.path.absolute()}" and max_train_steps = {steps - done}'
    )


def _but_steps(spec: Json) -> Json:
    return {key: value for key, value in spec.items() if key not in ("max_train_steps", "validation")}


def named_weights(workspace: Path, stage: Stage, value: str) -> Path:
    """What `init_lora` names: a path; a number that is not a path is a published version of the workspace."""
    path = Path(value)
    if value.isdecimal() and not is_there(path):
        return stage_folder(bundle_of(workspace, find_version(workspace, value)).path, stage)
    return path


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


def _faults(config: StageConfig, file: Path, header: Header, base: Shapes) -> Iterator[str]:
    """The reasons why a training cannot start from a file, the most helpful one first."""
    names = our_names(header.shapes, _layers(base))
    product, trained = _kind(header, names), product_of(config)
    if product is None:
        yield stranger_fault(names) if names.strangers else "which is empty"
    elif product is CONTROL and not config.flavour.kind.takes_controlnet:
        yield f"which is {product.words}, which only {titles(CONTROLLED)} supports. Remove init_lora"
    elif product is not trained:
        keys = " and ".join(product.unlike(config))
        yield f"which is {product.words}; the settings train {trained.words}. Set {keys}, or remove init_lora"
    elif product is CONTROL:
        yield from _control_faults(config, header, base)
    elif product is LORA:
        yield from _name_faults(file, names)
        shapes = {ours: header.shapes[name] for name, ours in names.tensors.items()}
        yield from _lora_faults(config, shapes, _settings(file, header, names), base)
    else:
        yield from _weight_faults(config, header, base)
    kinds = {dtype for name, dtype in header.dtypes.items() if name not in names.alphas}
    only = {"BF16"} if config.optimizer_kind.bf16_weights else {"F32", "F16", "BF16"}
    if not kinds <= only:
        exactly = " or ".join(sorted(only))
        yield f"with weights in {', '.join(sorted(kinds))}; {config.optimizer} starts exactly from {exactly} only. Use adamw"


def _adapters(header: Header, prefix: str) -> Shapes:
    """The tensors of adapters under a prefix, with names without it."""
    inside = {name.removeprefix(prefix): shape for name, shape in header.shapes.items() if name.startswith(prefix)}
    return {name: shape for name, shape in inside.items() if ADAPTER.fullmatch(name)}


def _kind(header: Header, found: Names) -> Product | None:
    """The kind of a file of weights, judged by the names in it."""
    names = header.shapes
    if any(name.startswith(("skips.", "hint.")) for name in names):
        return CONTROL
    if found.tensors and not found.strangers:
        return LORA
    if names and all(name.endswith(".bias") for name in names):
        return BITFIT
    return FULL if "conv_in.weight" in names else None


def _name_faults(file: Path, names: Names) -> Iterator[str]:
    """Faults of a LoRA's file before its shapes are checked: two tensors for one, or scales that are missing or differ."""
    ours = list(names.tensors.values())
    if twice := next((name for name in ours if ours.count(name) > 1), None):
        yield f"which has {twice} twice, under two names. Keep one of them"
    if PEFT in names.formats and not (file.parent / _PEFT_SETTINGS).is_file():
        yield f"a LoRA in peft's format, whose alpha is in {_PEFT_SETTINGS}. Put that file beside it"
    layers = {name.split(".lora_")[0] for name in ours}
    scales = set(read_scalars(file, names.alphas)) if names.alphas else set()
    if names.alphas and (len(scales) > 1 or set(names.alphas.values()) != layers):
        yield (
            "a LoRA with different alphas for its layers, or for some only, which this trainer does not support. "
            "Multiply each layer's up by its alpha / rank, and remove the alphas"
        )


def _weight_faults(config: StageConfig, header: Header, base: Shapes) -> Iterator[str]:
    """Biases and UNets: the file must have exactly the trained tensors."""
    expected = base
    if config.use_bitfit:
        ours = (name for name in base if name.endswith(".bias") and name.split(".")[0] not in TEXT_MODULES)
        expected = {name: base[name] for name in ours}
    yield from _differences(config, header.shapes, expected)


def _differences(config: StageConfig, found: Shapes, expected: Shapes) -> Iterator[str]:
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            yield _unfit_tensor(config, name, found.get(name), expected.get(name))


def _unfit_tensor(config: StageConfig, name: str, found: tuple[int, ...] | None, wanted: tuple[int, ...] | None) -> str:
    return (
        f"which does not fit {config.model_flavour}: {name} is {found or 'absent'} in it and {wanted or 'absent'} there. "
        "Give weights of the same stage and flavour"
    )


def _control_faults(config: StageConfig, header: Header, base: Shapes) -> Iterator[str]:
    """The new convolutions must fit a control on this base; the adapters must fit a LoRA on its encoder."""
    conditioning, settings = control_record(header.metadata)
    adapters = _adapters(header, "encoder.")
    others = {name: header.shapes[name] for name in header.shapes.keys() - {f"encoder.{name}" for name in adapters}}
    yield from _differences(config, others, new_shapes(base))
    if not adapters:
        yield "which has no adapters"
    if conditioning != config.controlnet_conditioning:
        ours = config.controlnet_conditioning
        yield f"whose conditioning is {conditioning}; controlnet_conditioning is {ours}. Set them alike"
    yield from _lora_faults(config, adapters, _checked(settings, RECORD), way_down(base))


def _lora_faults(config: StageConfig, shapes: Shapes, settings: dict[str, Any], base: Shapes) -> Iterator[str]:
    """shapes: of the adapters, by layer and part; settings: peft's; base: the weights that may have an adapter."""
    layers: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        match = ADAPTER.fullmatch(name)
        assert match  # whoever named them saw to it
        layers.setdefault(match["layer"], {})[match["part"].split(".")[0]] = shape
    for layer, parts in sorted(layers.items()):
        weight = base.get(f"{layer}.weight", ())
        if not {"A", "B"} <= parts.keys():
            yield f"which has only one half of the adapter on {layer}"
        elif not weight or (parts["B"][:1], parts["A"][1:]) != (weight[:1], weight[1:]):
            yield _unfit_tensor(config, layer, parts["B"][:1] + parts["A"][1:], weight)
        else:
            yield from _adapter_faults(layer, parts, weight)
    ranks = {parts["A"][0] for parts in layers.values()}
    if ranks != {config.lora_rank}:
        yield f"a LoRA of rank {' and '.join(map(str, sorted(ranks)))}; lora_rank is {config.lora_rank}. Set them alike"
    alpha, ours = settings.get("lora_alpha", max(ranks)), config.lora_alpha or config.lora_rank
    if alpha != ours:
        yield f"a LoRA with lora_alpha {alpha:g}; this run has {ours:g}. Set them alike"
    if settings.get("alpha_pattern") or settings.get("use_rslora"):
        yield "a LoRA with scales that this trainer does not support (alpha_pattern or use_rslora)"
    dora = {"magnitude_vector" in parts for parts in layers.values()}
    if dora != {config.use_dora}:
        yield f"a LoRA with{'' if True in dora else 'out'} DoRA; use_dora is {config.use_dora}. Set them alike"
    targets = config.lora_target_modules
    wanted = {layer for layer in _layers(base) if any(layer == name or layer.endswith(f".{name}") for name in targets)}
    if wanted != layers.keys():
        found, asked = " ".join(_names(layers)), " ".join(_names(wanted))
        yield f"a LoRA on {found}; lora_target_modules asks for {asked}. Set them alike"


def _adapter_faults(layer: str, parts: dict[str, tuple[int, ...]], weight: tuple[int, ...]) -> Iterator[str]:
    """Shapes of an adapter's parts that peft would not have made for a weight."""
    rank, ones = parts["A"][0], (1,) * (len(weight) - 2)
    length = weight[:1] if not ones else (1, weight[0], *ones)
    expected = {"B": (weight[0], rank, *ones), "magnitude_vector": length}
    for name, shape in expected.items():
        if parts.get(name, shape) != shape:
            yield f"which has a lora_{name} of {parts[name]} on {layer} in place of {shape}"


def _settings(file: Path, header: Header, names: Names) -> dict[str, Any]:
    """The settings of a LoRA, in peft's words. Raises ValueError when the record has none."""
    if names.alphas:
        return {"lora_alpha": read_scalars(file, list(names.alphas)[:1])[0]}
    text = header.metadata.get(_METADATA, "{}")
    if PEFT in names.formats:
        text = (file.parent / _PEFT_SETTINGS).read_text(encoding="utf-8")
    record = json.loads(text)
    plain = isinstance(record, dict)
    return _checked({key.removeprefix("unet."): value for key, value in record.items()} if plain else None, _METADATA)


def _checked(settings: dict[str, Any] | None, name: str) -> dict[str, Any]:
    if settings is None or not isinstance(settings.get("lora_alpha", 1.0), int | float):
        raise ValueError(f"its {name} is no record of a LoRA")
    return settings


def _layers(base: Shapes) -> Iterator[str]:
    """The layers of a UNet that can have an adapter: linear ones and convolutions."""
    return (name.removesuffix(".weight") for name, shape in base.items() if name.endswith(".weight") and len(shape) > 1)


def _names(layers: dict[str, dict[str, tuple[int, ...]]] | set[str]) -> list[str]:
    """The layers' names for users: the last part of each name, with its number where that is one (`to_out.0`)."""
    return sorted({re.sub(r"^.*?([^.]+(?:\.\d+)?)$", r"\1", layer) for layer in layers})
