"""Checks the sizes (px) of a run against the config.json of its UNets, before any UNet is loaded.

The table of flavours has what the published models need; a user's own folder may hold a UNet with more levels.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from deepfloyd_core.config.run import Run
from deepfloyd_core.config.stage3 import IN_CHANNELS, TABLE, TITLE
from deepfloyd_core.config.stages import STAGES, Stage
from deepfloyd_core.errors import ConfigError, DeepFloydError, ModelError, attempt
from deepfloyd_core.files import parsed_json
from deepfloyd_core.preflight.data_sets import size_fault

_MOST_LEVELS = 16  # the published ones have 4 or 5; each halves the picture
_ALIGNMENTS = (8, 16, 24, 32, 64)  # that `aspect_bucket_alignment` can be


def check_unet(stage: Stage, folder: Path) -> bool:
    """Raise ConfigError for the UNet of another stage, ModelError for a configuration that cannot be read; else True."""
    taken, kind = _read(folder)["in_channels"], STAGES[stage]
    if taken != kind.in_channels:
        raise ConfigError(
            f"{_unet(stage, folder)} has {taken} input channels; one of {kind.title} has {kind.in_channels}. Give "
            f"{kind.table}.pretrained_model_name_or_path a folder of {kind.title}."
        )
    return True


def stage3_faults(folder: Path) -> list[DeepFloydError]:
    """Why the UNet in a folder is none of Stage III."""
    faults: list[DeepFloydError] = []
    taken = attempt(faults, _read, folder)
    if taken is not None and taken["in_channels"] != IN_CHANNELS:
        faults.append(
            ConfigError(
                f"{TABLE}: the UNet in {folder} has {taken['in_channels']} input channels; one of {TITLE} has "
                f"{IN_CHANNELS}. Give {TABLE}.pretrained_model_name_or_path a folder of an x4 upscaler."
            )
        )
    return faults


def training_size_faults(run: Run, stage: Stage, folder: Path) -> list[str]:
    """Sizes of the run, crops or samples, that the UNet in a model folder does not accept. The UNet has passed
    `check_unet`.
    """
    return _faults(stage, folder, [*_crops(run, stage), *_samples(run, stage)])


def asked_size_faults(run: Run, stage: Stage, folder: Path, sizes: Iterable[tuple[int, int]]) -> list[str]:
    """The same for pictures of these sizes alone: (width, height) of the run's first stage, px."""
    factor = STAGES[stage].scale // STAGES[run.config.first_stage].scale
    edges = [(f"size is {width}x{height}", edge, factor) for width, height in sorted(sizes) for edge in {width, height}]
    return _faults(stage, folder, edges)


def _faults(stage: Stage, folder: Path, edges: list[tuple[str, int, int]]) -> list[str]:
    """edges: the key with its value, px at its own scale, how many px of the stage make one of these."""
    halved = len(_read(folder)["block_out_channels"]) - 1
    return [
        f"{key}, {edge * factor} px at stage {stage}; {_unet(stage, folder)} halves {halved} times, so every edge must "
        f"divide by {2**halved}. {_remedy(key, edge, factor, 2**halved)}."
        for key, edge, factor in edges
        if edge * factor % 2**halved
    ]


def _unet(stage: Stage, folder: Path) -> str:
    return f"stage{stage}: the UNet in {folder}"


def _read(folder: Path) -> dict[str, Any]:
    file = folder / "unet" / "config.json"
    try:
        found: dict[str, Any] = parsed_json(file.read_bytes())
        levels = found["block_out_channels"]
        if not isinstance(levels, list) or not 0 < len(levels) <= _MOST_LEVELS:
            raise ValueError(f"block_out_channels is no list of 1 to {_MOST_LEVELS} numbers")
        return {"in_channels": found["in_channels"], "block_out_channels": levels}
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{file} is no UNet's configuration ({error}). Put the one that belongs to the weights there."
        ) from None


def _crops(run: Run, stage: Stage) -> Iterator[tuple[str, int, int]]:
    alignment = run.config.aspect_bucket_alignment
    yield f"aspect_bucket_alignment is {alignment}", alignment, STAGES[stage].scale
    for dataset in run.datasets:
        factor = dataset.factor(stage)
        if factor is None or size_fault(run.config.stage(stage).flavour, dataset, stage):
            continue  # no size of this stage, or refused already
        if dataset.resolution_type == "pixel":  # by area, edges are multiples of the alignment
            yield f"{dataset.id}: resolution is {dataset.resolution:g}", int(dataset.resolution), factor


def _samples(run: Run, stage: Stage) -> Iterator[tuple[str, int, int]]:
    factor = STAGES[stage].scale // STAGES[run.config.first_stage].scale
    for edge in sorted({edge for size in run.config.sample_sizes_px for edge in size}):
        yield f"validation_resolution is {run.config.validation_resolution!r}", edge, factor


def _remedy(key: str, edge: int, factor: int, unit: int) -> str:
    if not key.startswith("aspect_bucket_alignment"):
        near = next(value for value in range(edge, edge + unit + 1) if value * factor % unit == 0)
        return f"Use for example {near} in place of {edge}"
    fits = [value for value in _ALIGNMENTS if value * factor % unit == 0]
    return f"Set aspect_bucket_alignment = {fits[0]}" if fits else "No alignment can serve this UNet"
