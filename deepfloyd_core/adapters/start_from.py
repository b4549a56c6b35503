"""The weights that a training starts from in place of the base model: a LoRA, a ControlNet-LoRA, biases or a whole UNet.

Its header and the base model's headers are enough for all checks, so these run before anything is made or loaded.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from deepfloyd_core.adapters.controlnet_file import RECORD, Shapes, control_record, new_shapes, way_down
from deepfloyd_core.adapters.files import BITFIT, CONTROL, FULL, LORA, Product, product_of
from deepfloyd_core.adapters.lora_file import (
    adaptable_layers,
    adapted_layers,
    checked_settings,
    layer_faults,
    lora_settings,
    name_faults,
    unfit_tensor,
    weights_file,
)
from deepfloyd_core.adapters.lora_formats import ADAPTER, Names, our_names, stranger_fault
from deepfloyd_core.config.base import is_there
from deepfloyd_core.config.flavours import TEXT_MODULES
from deepfloyd_core.config.run import Run
from deepfloyd_core.config.stage import StageConfig
from deepfloyd_core.config.stages import CONTROLLED, Stage, titles
from deepfloyd_core.errors import ConfigError
from deepfloyd_core.models.headers import Header, read_header, read_scalars, unet_shapes
from deepfloyd_core.store.artifacts import Artifact, Request, finished
from deepfloyd_core.store.manifest import Manifest
from deepfloyd_core.store.pinned import PinnedFile, pinned
from deepfloyd_core.store.versions import bundle_of, find_version, stage_folder
from deepfloyd_core.types import Json


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
    names = our_names(header.shapes, adaptable_layers(base))
    known_as = names.known_as if _kind(header, names) is LORA else ""
    note = f"{prefix}: a LoRA in the format of {known_as}; all its {len(names.tensors)} tensors are read, to the bit"
    return Parent(file, note if known_as else "")


def misfit(config: StageConfig, file: Path, folder: Path) -> str:
    """Why a stage's training cannot start from a file of weights, and what to do; empty: it can. folder: the base model."""
    try:
        return next(_faults(config, file, read_header(file), unet_shapes(folder)), "")
    except (SafetensorError, OSError, ValueError) as error:
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


def _faults(config: StageConfig, file: Path, header: Header, base: Shapes) -> Iterator[str]:
    """The reasons why a training cannot start from a file, the most helpful one first."""
    names = our_names(header.shapes, adaptable_layers(base))
    product, trained = _kind(header, names), product_of(config)
    if product is None:
        yield stranger_fault(names, ". Remove init_lora") if names.strangers else "which is empty"
    elif product is CONTROL and not config.flavour.kind.takes_controlnet:
        yield f"which is {product.words}, which only {titles(CONTROLLED)} supports. Remove init_lora"
    elif product is not trained:
        keys = " and ".join(product.unlike(config))
        yield f"which is {product.words}; the settings train {trained.words}. Set {keys}, or remove init_lora"
    elif product is CONTROL:
        yield from _control_faults(config, header, base)
    elif product is LORA:
        yield from name_faults(file, names)
        yield from _scale_faults(file, names)
        shapes = {ours: header.shapes[name] for name, ours in names.tensors.items()}
        yield from _lora_faults(config, shapes, lora_settings(file, header, names), base)
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


def _scale_faults(file: Path, names: Names) -> Iterator[str]:
    """Scales that are missing for some layers, or differ."""
    layers = {name.split(".lora_")[0] for name in names.tensors.values()}
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
            yield unfit_tensor(config.model_flavour, name, found.get(name), expected.get(name))


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
    yield from _lora_faults(config, adapters, checked_settings(settings, RECORD), way_down(base))


def _lora_faults(config: StageConfig, shapes: Shapes, settings: dict[str, Any], base: Shapes) -> Iterator[str]:
    """shapes: of the adapters, by layer and part; settings: peft's; base: the weights that may have an adapter."""
    layers = adapted_layers(shapes)
    yield from layer_faults(layers, base, config.model_flavour)
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
    wanted = {
        layer
        for layer in adaptable_layers(base)
        if any(layer == name or layer.endswith(f".{name}") for name in targets)
    }
    if wanted != layers.keys():
        found, asked = " ".join(_names(layers)), " ".join(_names(wanted))
        yield f"a LoRA on {found}; lora_target_modules asks for {asked}. Set them alike"


def _names(layers: dict[str, dict[str, tuple[int, ...]]] | set[str]) -> list[str]:
    """The layers' names for users: the last part of each name, with its number where that is one (`to_out.0`)."""
    return sorted({re.sub(r"^.*?([^.]+(?:\.\d+)?)$", r"\1", layer) for layer in layers})
