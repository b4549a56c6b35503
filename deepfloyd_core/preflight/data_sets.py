"""Conflicts between the run file and the data file, checked before anything is loaded."""

import math
from collections.abc import Iterator
from os.path import realpath
from pathlib import Path

from deepfloyd_core.config.base import read_config_file
from deepfloyd_core.config.data_sets import ImageDataset, TextEmbedBackend
from deepfloyd_core.config.flavours import Flavour
from deepfloyd_core.config.run import RunConfig
from deepfloyd_core.config.source_keys import SOURCE_TYPES
from deepfloyd_core.config.stages import STAGES, Stage
from deepfloyd_core.errors import ConfigError, DeepFloydError, attempt, raise_together
from deepfloyd_core.files import read_file, text_lines
from deepfloyd_core.index.captions import compiled_filters
from deepfloyd_core.pictures.faces import missing_detector
from deepfloyd_core.sources.listing import TEXT_BYTES


def size_fault(flavour: Flavour, dataset: ImageDataset, stage: Stage) -> str:
    """Why a stage's model cannot be trained at a data set's resolution; empty if it can, or if the set does not feed it."""
    factor = dataset.factor(stage)
    if factor is None:
        return ""
    edge = dataset.edge_px * factor
    fault = _size_fault(dataset, flavour, edge)
    prefix = f"{dataset.id}: resolution is {dataset.resolution:g}, {edge:g} px at stage {stage}"
    return f"{prefix}; {flavour.name} {fault}. Set {_every_stage(dataset)}." if fault else ""


def unfed_fault(flavour: Flavour, datasets: tuple[ImageDataset, ...], stage: Stage) -> str:
    """Why a stage has nothing to train on; empty if a data set feeds it. datasets: all of the run."""
    if any(dataset.factor(stage) is not None for dataset in datasets):
        return ""
    found = ", ".join(f"{dataset.resolution:g} of {dataset.id}" for dataset in datasets)
    return (
        f"No data set feeds stage {stage}: resolution is {found}; {flavour.name} makes {flavour.kind.size_px} px and is "
        f"trained at up to {flavour.kind.largest_px}. Set {_every_stage(datasets[0])}."
    )


def workspace_faults(workspace: Path, datasets: tuple[ImageDataset, ...]) -> Iterator[str]:
    """Data sets whose directory contains the workspace, so that sheets and samples would count as their pictures."""
    place = Path(realpath(workspace))  # `resolve` raises for a link that leads to itself
    for dataset in datasets:
        pictures = Path(realpath(dataset.instance_data_dir))
        if not SOURCE_TYPES[dataset.type].is_folder or not place.is_relative_to(pictures):
            continue
        if not any(name.startswith(".") for name in place.relative_to(pictures).parts):  # else it is not looked at
            yield (
                f"workspace is {workspace}, in the folder of {dataset.id}'s pictures, {dataset.instance_data_dir}: "
                "the artifacts in it would be read as pictures. Set workspace to a folder elsewhere."
            )


def pair_faults(datasets: tuple[ImageDataset, ...], stage: Stage) -> Iterator[str]:
    """Data sets without pairs that feed a stage with a paired ControlNet."""
    for dataset in datasets:
        if dataset.factor(stage) is not None and dataset.conditioning_data is None:
            yield (
                f"stage{stage}.controlnet_conditioning is 'paired', and {dataset.id}, which feeds stage {stage}, has no "
                "conditioning_data. Add an entry of dataset_type conditioning with the directory of its pairs, and name "
                "it there."
            )


def pair_notes(datasets: tuple[ImageDataset, ...], stage: Stage | None) -> list[str]:
    """A note for each data set whose conditioning_data has no effect. stage: the one that uses pairs, if one does."""
    notes = []
    for dataset in datasets:
        if dataset.conditioning_data is not None and (stage is None or dataset.factor(stage) is None):
            why = (
                f"{dataset.id} does not feed stage {stage}"
                if stage
                else "no stage has controlnet_conditioning = 'paired'"
            )
            notes.append(f"{dataset.id}: conditioning_data has no effect: {why}")
    return notes


def pair_places(
    datasets: tuple[ImageDataset, ...], conditioning: tuple[ImageDataset, ...], stage: Stage
) -> list[ImageDataset]:
    """The places of the pairs that a stage uses."""
    used = {dataset.conditioning_data for dataset in datasets if dataset.factor(stage) is not None}
    return [place for place in conditioning if place.id in used]


def low_res_faults(config: RunConfig, stage: Stage, datasets: tuple[ImageDataset, ...]) -> Iterator[str]:
    """Why a run's earlier stage cannot remake the low-res pictures that an upscaler is trained on."""
    upscaler, source = config.stage(stage), STAGES[stage].upscales
    assert source is not None
    low, own = STAGES[source], STAGES[stage]
    prefix = f"{own.table}.low_res_stage1_share is {upscaler.low_res_stage1_share:g}"
    if source not in config.stages:
        yield (
            f"{prefix}, and the run has no {low.title} to make low-res pictures. Add a [{low.table}] table with a "
            "model_flavour, or set low_res_stage1_share = 0."
        )
        return
    first = config.stage(source)
    if first.controlnet:
        yield (
            f"{prefix}, and {low.table}.controlnet is True: it needs conditioning pictures, and {own.title}'s crops "
            "have none. Remove one of them."
        )
    steps, strength = first.validation_num_inference_steps, upscaler.low_res_stage1_strength
    if not int(steps * strength):  # as `IFImg2ImgPipeline` counts them
        yield (
            f"{low.table}.validation_num_inference_steps is {steps}, of which {own.table}.low_res_stage1_strength = "
            f"{strength:g} is less than one step. Use more steps, or a strength of at least "
            f"{math.ceil(1000 / steps) / 1000:g}."
        )
    for dataset in datasets:
        if dataset.factor(stage) is not None and dataset.factor(source) is None:
            yield (
                f"{prefix}, and {dataset.id} feeds {own.title} alone (its resolution is {dataset.resolution:g}): "
                f"{low.title} would remake crops that it was not trained on. Set {_every_stage(dataset)}, which feeds "
                "both, or remove the share."
            )


def _every_stage(dataset: ImageDataset) -> str:
    """The setting that feeds every stage at its native size, in the unit of the data set's resolution_type."""
    px = min(kind.size_px for kind in STAGES.values())
    return f"resolution = {px * px / 1e6:g}" if dataset.resolution_type == "area" else f"resolution = {px}"


def _size_fault(dataset: ImageDataset, flavour: Flavour, edge: float) -> str:
    """Why a model cannot be trained at an edge of so many px; empty when it can."""
    kind, smaller = flavour.kind, ""
    unit = kind.alignment_px
    if kind.upscales is not None:
        low = STAGES[kind.upscales]
        smaller = f", four times a size of {low.title}, which are multiples of {low.alignment_px}"
    if dataset.resolution_type == "pixel" and edge % unit:
        return f"needs a multiple of {unit}{smaller}"
    # By area both edges are rounded to a multiple of the alignment: 0.0039 megapixels of Stage I become 256 px here.
    least = kind.size_px if dataset.resolution_type == "pixel" else kind.size_px - unit / 2
    if kind.is_upscaler and edge < least:
        return f"makes {kind.size_px} px and is not trained below that"
    return f"makes {kind.size_px} px" if edge > kind.largest_px else ""


def detector_fault(dataset: ImageDataset) -> str:
    """Why crops cannot be placed by faces, if a data set needs that; empty when they can."""
    missing = dataset.crop and dataset.crop_style == "face" and missing_detector()
    return f"{dataset.id}: crop_style is 'face', and {missing}" if missing else ""


def text_embeds_faults(datasets: tuple[ImageDataset, ...], backends: tuple[TextEmbedBackend, ...]) -> Iterator[str]:
    """Data sets that name missing text embeds, and two default embeds. datasets, backends: all of the data file."""
    known = ", ".join(repr(backend.id) for backend in backends) or "none"
    for dataset in datasets:
        if dataset.text_embeds not in (None, *(backend.id for backend in backends)):
            yield f"{dataset.id}: text_embeds is {dataset.text_embeds!r}; text embeds entries: {known}."
    defaults = [repr(backend.id) for backend in backends if backend.default]
    if len(defaults) > 1:
        yield f"{', '.join(defaults)} are all the default text embeds. Keep one."


def with_filters(path: Path, dataset: ImageDataset, backends: tuple[TextEmbedBackend, ...]) -> ImageDataset:
    """The data set with every filter that applies to it, read from the files that hold them.

    Raises ConfigError that reports every file that cannot be read, or every filter that is not a regular expression.
    """
    defaults = [backend for backend in backends if backend.default]
    named = [backend for backend in backends if backend.id == dataset.text_embeds]
    lists = [(backend.id, backend.caption_filter_list) for backend in named or defaults]
    lists.append((dataset.id, dataset.caption_filter_list))
    faults: list[DeepFloydError] = []
    filters = tuple[str, ...]()
    for name, given in lists:
        lines = tuple(attempt(faults, _filter_lines, given, f"{path}: {name}") or ())
        file = f" in {given}" if isinstance(given, str) else ""
        attempt(faults, compiled_filters, lines, f"{path}: {name}: caption_filter_list{file}")
        filters += tuple(line for line in lines if line)
    raise_together(faults)
    return dataset.model_copy(update={"caption_filter_list": filters})


def _filter_lines(given: str | tuple[str, ...], where: str) -> list[str]:
    if not isinstance(given, str):
        return list(given)
    file, lines = Path(given), None
    if file.suffix.lower() not in (".txt", ".json"):
        raise ConfigError(f"{where}: caption_filter_list is {given!r}; give a list, or a file ending in .txt or .json.")
    if file.suffix.lower() == ".json":
        lines = read_config_file(file)
        if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
            raise ConfigError(f"{file} must be a list of strings.")
        return list(lines)
    try:
        return text_lines(read_file(file, TEXT_BYTES).decode("utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else str(error)
        raise ConfigError(f"{where}: caption_filter_list {given!r} cannot be read: {reason}.") from None
