"""Several LoRAs at once, each with its own weight: published versions and files of other programs. No torch.

All that a picture's bytes depend on is known from the files' headers and hashes, before a model is loaded.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from deepfloyd_core.adapters.files import LORA_FILE, product_name
from deepfloyd_core.adapters.lora_file import (
    METADATA,
    PEFT_FILE,
    PEFT_SETTINGS,
    adaptable_layers,
    adapted_layers,
    layer_faults,
    lora_settings,
    name_faults,
    weights_file,
)
from deepfloyd_core.adapters.lora_formats import PEFT, our_names, stranger_fault
from deepfloyd_core.config.base import Spec, is_there
from deepfloyd_core.config.run import Run
from deepfloyd_core.config.stages import STAGES, Stage
from deepfloyd_core.errors import ConfigError, DeepFloydError, attempt, raise_together
from deepfloyd_core.files import parsed_json
from deepfloyd_core.models.headers import read_header, read_scalars, unet_shapes
from deepfloyd_core.models.hub import OTHERWISE, download, is_hub_id, snapshot_here
from deepfloyd_core.store.events import SERVING
from deepfloyd_core.store.pinned import PinnedFile, pinned
from deepfloyd_core.store.versions import bundle_of, find_version, stage_folder

_VERSION = "version:"
_SCHEDULER = "scheduler/scheduler_config.json"
_ON_HUB = (  # of a repository: a LoRA under the names that diffusers and peft give it, and those of a bundle
    *(LORA_FILE, PEFT_FILE, PEFT_SETTINGS, _SCHEDULER),
    *(f"{kind.table}/{name}" for kind in STAGES.values() for name in (LORA_FILE, _SCHEDULER)),
)
_LONGEST = 4096  # characters of a source: a path
_NUMBER = re.compile(rf"\d{{1,9}}|{'|'.join(SERVING)}")


@dataclass(frozen=True)
class AskedLora:
    """A LoRA to draw with, as a user names it."""

    source: str  # `version:3`, `version:champion`, a file, a folder with one, or a repository of the Hub
    weight: float  # times its effect

    @property
    def version(self) -> str | None:
        """The version that it names."""
        return self.source.removeprefix(_VERSION) if self.source.startswith(_VERSION) else None


class MixedLora(Spec):
    """A file with the LoRA of one stage, among others."""

    stage: Stage
    name: str  # for people: version:3, or the file's name
    weight: float
    file: PinnedFile
    settings: PinnedFile | None  # in peft's format: the file with its alpha
    learned_variance: bool  # it has trained the variance too, so its samples take that

    @property
    def told(self) -> str:
        """`version:3@0.7`."""
        return f"{self.name}@{self.weight:g}"

    @property
    def identity(self) -> list[Any]:
        """What decides its effect."""
        settings = self.settings.sha256 if self.settings else None
        return [self.stage, self.file.sha256, settings, self.weight, self.learned_variance]


def parse_lora(text: str) -> AskedLora:
    """`SOURCE` or `SOURCE@WEIGHT`. Raises ConfigError for a weight that is no finite number other than 0."""
    if len(text) > _LONGEST:
        raise ConfigError(f"--lora has {len(text):,} characters; a source has at most {_LONGEST:,}.")
    source, at, weight = text.rpartition("@")
    if not at:
        return AskedLora(text, 1.0)
    try:
        found = float(weight)
    except ValueError:
        return AskedLora(text, 1.0)  # a path with an @
    if not source or not math.isfinite(found) or not found:
        raise ConfigError(
            f"--lora is {text!r}; give SOURCE@WEIGHT with a weight other than 0, for example version:3@0.7."
        )
    return AskedLora(source, found)


def placed_lora(text: str, place: Callable[[str], Path]) -> str:
    """The same LoRA, its path put in its place. Raises ConfigError."""
    one = parse_lora(text)
    if one.version is not None:
        return text
    placed = place(one.source)
    return text if is_hub_id(one.source) and not is_there(placed) else f"{placed}@{one.weight:.17g}"


def is_lora_on_hub(one: AskedLora) -> bool:
    """Whether a source is a repository of the Hub."""
    return one.version is None and is_hub_id(one.source) and not is_there(Path(one.source))


def is_lora_missing(one: AskedLora) -> bool:
    """Whether it must still be downloaded."""
    return is_lora_on_hub(one) and _snapshot(one) is None


def fetch_lora(one: AskedLora) -> None:
    """Download a LoRA of the Hub, or what is newer of it there. Raises ModelError."""
    download(one.source, _ON_HUB, "a LoRA", OTHERWISE)


def _snapshot(one: AskedLora) -> Path | None:
    """A LoRA of the Hub on this machine."""
    folder = snapshot_here(one.source, _ON_HUB)
    return folder if folder is not None and any(folder.rglob("*.safetensors")) else None


@dataclass(frozen=True)
class FoundLora:
    """A file with the LoRA of one stage, which fits it; not hashed yet."""

    stage: Stage
    name: str
    weight: float
    file: Path
    settings: Path | None
    learned_variance: bool

    @property
    def mixed(self) -> MixedLora:
        """With the bytes that its files have now."""
        settings = self.settings and pinned(self.settings)
        return MixedLora(**{**vars(self), "file": pinned(self.file), "settings": settings})


def mixed_loras(run: Run, asked: Sequence[AskedLora], folders: Mapping[Stage, Path]) -> tuple[MixedLora, ...]:
    """The LoRAs in the order in which they are asked for, each once for each of its stages that draw. Raises as
    `found_loras`.
    """
    return tuple(one.mixed for one in found_loras(run, asked, folders))


def found_loras(run: Run, asked: Sequence[AskedLora], folders: Mapping[Stage, Path]) -> list[FoundLora]:
    """The same by their headers alone. folders: of the base models of the stages that draw.

    Raises ConfigError for a source that is not there, and for one that fits none of these stages.
    """
    found: list[FoundLora] = []
    faults: list[DeepFloydError] = []
    for one in asked:
        found += attempt(faults, _of_stages, run, one, folders) or []
    faults += map(ConfigError, _dora_faults(found))
    raise_together(faults)
    return found


def _dora_faults(loras: Sequence[FoundLora]) -> Iterator[str]:
    """DoRA scales the whole weight of a layer: it has no part of its effect, and no sum with others."""
    for lora in loras:
        beside = sum(other.stage == lora.stage for other in loras)
        if (beside > 1 or lora.weight != 1) and any(
            "magnitude_vector" in name for name in read_header(lora.file).shapes
        ):
            yield f"--lora {lora.name} is a DoRA, which is drawn with alone in its stage, at weight 1. Leave out the others."


def _of_stages(run: Run, one: AskedLora, folders: Mapping[Stage, Path]) -> list[FoundLora]:
    """The LoRA of each stage that a source has."""
    files = list(_files(run, one, tuple(folders)))
    if not files:
        raise ConfigError(f"--lora {one.source} has no LoRA of {_stages_told(folders)}.")
    name = one.source if is_lora_on_hub(one) else Path(one.source).name
    if one.version:
        name = f"{_VERSION}{find_version(run.workspace, one.version).number}"
    found = []
    for file, stages in files:
        faults = {stage: misfit(file, folders[stage], run.config.stage(stage).model_flavour) for stage in stages}
        fits = [stage for stage in stages if not faults[stage]]
        if not fits:
            each = "; ".join(f"{STAGES[stage].title}: {fault}" for stage, fault in faults.items())
            raise ConfigError(f"--lora {one.source} does not fit what draws here. {each}.")
        names = our_names(read_header(file).shapes, ())
        settings, variance = file.parent / PEFT_SETTINGS if PEFT in names.formats else None, _variance(file)
        found += [FoundLora(stage, name, one.weight, file, settings, variance) for stage in fits]
    return found


def _stages_told(stages: Iterable[Stage]) -> str:
    return " or ".join(STAGES[stage].title for stage in stages)


def _files(run: Run, one: AskedLora, stages: tuple[Stage, ...]) -> Iterator[tuple[Path, tuple[Stage, ...]]]:
    """Each file that a source has, with the stages that it may belong to."""
    if one.version is None:
        path = _snapshot(one) or Path(one.source) if is_lora_on_hub(one) else Path(one.source)
        parts = {stage: path / kind.table for stage, kind in STAGES.items()}
        if is_there(path) and any(part.is_dir() for part in parts.values()):  # a bundle's folder
            yield from ((_lora(one, parts[stage]), (stage,)) for stage in stages if parts[stage].is_dir())
        else:
            yield weights_file(path, f"--lora {one.source}"), stages
        return
    if not _NUMBER.fullmatch(one.version):
        raise ConfigError(f"--lora {one.source} names no version; give version:N or version:champion.")
    bundle = bundle_of(run.workspace, find_version(run.workspace, one.version))
    for stage in stages:
        if f"{STAGES[stage].table}_lora" in bundle.inputs:
            yield _lora(one, stage_folder(bundle.path, stage)), (stage,)


def _lora(one: AskedLora, folder: Path) -> Path:
    if (name := product_name(folder)) != LORA_FILE:
        raise ConfigError(f"--lora {one.source} has {name}, and only LoRAs are drawn with together. Use --version.")
    return weights_file(folder / name, f"--lora {one.source}")


def misfit(file: Path, folder: Path, model: str) -> str:
    """Why a file is no LoRA of a base model; empty: it is. folder: of the model, which is called `model`."""
    try:
        base, header = unet_shapes(folder), read_header(file)
        names = our_names(header.shapes, adaptable_layers(base))
        if names.strangers or not names.tensors:
            return stranger_fault(names) if names.strangers else "which is empty"
        shapes = {ours: header.shapes[name] for name, ours in names.tensors.items()}
        faults = [*name_faults(file, names), *layer_faults(adapted_layers(shapes), base, model)]
        if not faults:
            read_scalars(file, names.alphas)
            settings = {} if names.alphas else lora_settings(file, header, names)
            if PEFT in names.formats and settings.get("alpha_pattern"):
                faults.append("a LoRA in peft's format with an alpha_pattern. Save it with diffusers' pipeline")
            ranks = {shape[0] for name, shape in shapes.items() if name.endswith(".lora_A.weight")}
            if METADATA in header.metadata and not settings.get("rank_pattern") and ranks != {settings.get("r")}:
                faults.append(f"whose {METADATA} has rank {settings.get('r')}, and its layers {sorted(ranks)}")
        return next(iter(faults), "")
    except (SafetensorError, OSError, ValueError) as error:
        return f"and {file} cannot be read: {error}"


def _variance(file: Path) -> bool:
    """Whether a scheduler beside a file takes the learned variance; a LoRA of other trainers leaves it untrained."""
    beside = file.parent / _SCHEDULER
    if not beside.is_file():
        return False
    try:
        found = parsed_json(beside.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{beside} cannot be read: {error}.") from None
    return isinstance(found, dict) and found.get("variance_type") == "learned_range"
