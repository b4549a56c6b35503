"""What the run file and the data file ask of each other, checked before anything is loaded."""

import math
from pathlib import Path

from deepfloyd_core.config.base import read_config_file
from deepfloyd_core.config.data_sets import ImageDataset, TextEmbedBackend
from deepfloyd_core.config.flavours import UPSCALE, Flavour, Stage
from deepfloyd_core.config.stage import StageConfig
from deepfloyd_core.errors import ConfigError
from deepfloyd_core.files import text_lines
from deepfloyd_core.index.captions import compiled_filters
from deepfloyd_core.pictures.faces import missing_detector
from deepfloyd_core.sources.source import open_source
from deepfloyd_core.training.mixing import check_steps


def check_datasets(flavour: Flavour, datasets: tuple[ImageDataset, ...], stage: Stage, steps: int | None) -> list[str]:
    """Raise ConfigError for a resolution that a stage's model cannot be trained at, or a step without a data set.

    steps: of the training; None: they are not known yet, and looked at later.

    Returns a note for each data set that the stage never comes to.
    """
    used: list[ImageDataset] = []
    for dataset in datasets:
        factor = dataset.factor(stage)
        if factor is None:
            continue
        used.append(dataset)
        edge = dataset.edge_px * factor
        if fault := _size_fault(dataset, flavour, edge):
            said = f"{dataset.id}: resolution is {dataset.resolution:g}, {edge:g} px at stage {stage}"
            raise ConfigError(f"{said}; {flavour.name} {fault}. Set {_both_stages(dataset)}.")
    if not used:
        found = ", ".join(f"{dataset.resolution:g} of {dataset.id}" for dataset in datasets)
        raise ConfigError(
            f"No data set feeds stage {stage}: resolution is {found}; {flavour.name} makes {flavour.size_px} px and is "
            f"trained at up to {2 * flavour.size_px}. Set {_both_stages(datasets[0])}."
        )
    return [] if steps is None else check_steps(datasets, stage, steps)


def check_pairs(paired: bool, datasets: tuple[ImageDataset, ...], conditioning: tuple[ImageDataset, ...]) -> list[str]:
    """Raise ConfigError when Stage I is to follow pairs and a data set that feeds it has none, or they are not there.

    Returns a note for each data set whose conditioning_data has no effect.
    """
    notes = []
    for dataset in datasets:
        feeds = dataset.factor(1) is not None
        if paired and feeds and dataset.conditioning_data is None:
            raise ConfigError(
                f"stage1.controlnet_conditioning is 'paired', and {dataset.id}, which feeds stage 1, has no "
                "conditioning_data. Add an entry of dataset_type conditioning with the directory of its pairs, and name "
                "it there."
            )
        if dataset.conditioning_data is not None and not (paired and feeds):
            why = f"{dataset.id} does not feed stage 1" if paired else "no stage has controlnet_conditioning = 'paired'"
            notes.append(f"{dataset.id}: conditioning_data has no effect: {why}")
    used = {dataset.conditioning_data for dataset in datasets if dataset.factor(1) is not None} if paired else set()
    for place in conditioning:
        if place.id in used:
            open_source(place)
    return notes


def check_low_res(stage1: StageConfig | None, stage2: StageConfig, datasets: tuple[ImageDataset, ...]) -> None:
    """Raise ConfigError when the Stage I of a run cannot remake the low-res pictures that Stage II is trained on."""
    said = f"stage2.low_res_stage1_share is {stage2.low_res_stage1_share:g}"
    if stage1 is None:
        raise ConfigError(
            f"{said}, and the run has no Stage I to make low-res pictures. Add a [stage1] table with a model_flavour, or "
            "set low_res_stage1_share = 0."
        )
    if stage1.controlnet:
        raise ConfigError(
            f"{said}, and stage1.controlnet is True: such a Stage I follows a picture, and for Stage II's crops there is "
            "none. Remove one of them."
        )
    steps, strength = stage1.validation_num_inference_steps, stage2.low_res_stage1_strength
    if not int(steps * strength):  # as `IFImg2ImgPipeline` counts them
        raise ConfigError(
            f"stage1.validation_num_inference_steps is {steps}, of which stage2.low_res_stage1_strength = {strength:g} is "
            f"less than one step. Use more steps, or a strength of at least {math.ceil(1000 / steps) / 1000:g}."
        )
    for dataset in datasets:
        if dataset.factor(2) is not None and dataset.factor(1) is None:
            raise ConfigError(
                f"{said}, and {dataset.id} feeds Stage II alone (its resolution is {dataset.resolution:g}): Stage I never "
                f"saw what it would remake there. Set {_both_stages(dataset)}, which feeds both, or remove the share."
            )


def _both_stages(dataset: ImageDataset) -> str:
    """The setting that feeds both stages at their native sizes, in the unit of the data set's resolution_type."""
    px = 64
    return f"resolution = {px * px / 1e6:g}" if dataset.resolution_type == "area" else f"resolution = {px}"


def _size_fault(dataset: ImageDataset, flavour: Flavour, edge: float) -> str:
    """Why a model cannot be trained at an edge of so many px; empty when it can."""
    unit = flavour.alignment_px
    smaller = f", four times a size of Stage I, which are multiples of {unit // UPSCALE}" if flavour.stage == 2 else ""
    if dataset.resolution_type == "pixel" and edge % unit:
        return f"needs a multiple of {unit}{smaller}"
    # By area both edges are rounded to a multiple of the alignment: 0.0039 megapixels of Stage I become 256 px here.
    least = flavour.size_px if dataset.resolution_type == "pixel" else flavour.size_px - unit / 2
    if flavour.stage == 2 and edge < least:
        return f"makes {flavour.size_px} px and is not trained below that"
    return f"makes {flavour.size_px} px" if edge > 2 * flavour.size_px else ""


def check_places(path: Path, datasets: tuple[ImageDataset, ...]) -> None:
    """Raise ConfigError for a data set whose place is not there, or that needs a package which is not."""
    for dataset in datasets:
        if dataset.crop and dataset.crop_style == "face" and (missing := missing_detector()):
            raise ConfigError(f"{path}: {dataset.id}: crop_style is 'face', and {missing}")
        try:
            open_source(dataset)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None


def with_filters(path: Path, dataset: ImageDataset, backends: tuple[TextEmbedBackend, ...]) -> ImageDataset:
    """The data set with every filter that applies to it, read from the files that hold them.

    Raises ConfigError for a file that cannot be read, and for a filter that is no regular expression.
    """
    defaults = [backend for backend in backends if backend.default]
    named = [backend for backend in backends if backend.id == dataset.text_embeds]
    if dataset.text_embeds is not None and not named:
        known = ", ".join(repr(backend.id) for backend in backends) or "none"
        raise ConfigError(
            f"{path}: {dataset.id}: text_embeds is {dataset.text_embeds!r}; text embeds entries: {known}."
        )
    if len(defaults) > 1:
        raise ConfigError(
            f"{path}: {', '.join(repr(b.id) for b in defaults)} are all the default text embeds. Keep one."
        )
    lists = [(backend.id, backend.caption_filter_list) for backend in named or defaults]
    lists.append((dataset.id, dataset.caption_filter_list))
    filters = tuple(line for name, given in lists for line in _filter_lines(given, f"{path}: {name}"))
    compiled_filters(filters, f"{path}: {dataset.id}: caption_filter_list")
    return dataset.model_copy(update={"caption_filter_list": filters})


def _filter_lines(given: str | tuple[str, ...], where: str) -> list[str]:
    if not isinstance(given, str):
        return [line for line in given if line]
    file, lines = Path(given), None
    if file.suffix.lower() not in (".txt", ".json"):
        raise ConfigError(f"{where}: caption_filter_list is {given!r}; give a list, or a file ending in .txt or .json.")
    if file.suffix.lower() == ".json":
        lines = read_config_file(file)
        if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
            raise ConfigError(f"{file} must be a list of strings.")
        return [line for line in lines if line]
    try:
        return [line for line in text_lines(file.read_text(encoding="utf-8-sig")) if line]
    except (OSError, UnicodeDecodeError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else str(error)
        raise ConfigError(f"{where}: caption_filter_list {given!r} cannot be read: {reason}.") from None
