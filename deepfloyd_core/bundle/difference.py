"""How two versions differ: pictures, settings, figures, and samples of the same seeds side by side. No torch.

Everything is read from what was stored: nothing is sampled again. What is lost is named in place of its part.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from deepfloyd_core.bundle.gate import measured
from deepfloyd_core.bundle.gate_rules import COMPARED, FORGOTTEN_MORE, PROBE_LOSS, Measured, loss_bounds
from deepfloyd_core.config.stages import STAGES, UPSCALERS
from deepfloyd_core.errors import ArtifactError
from deepfloyd_core.index.changed_pictures import picture_changes
from deepfloyd_core.index.ledger import INDEX_FILE
from deepfloyd_core.measures.paired import paired_gain
from deepfloyd_core.measures.registry import measures_against
from deepfloyd_core.pictures.sheets import save_picture, titled_rows
from deepfloyd_core.sampling.drawn_picture import RECORD
from deepfloyd_core.store.changes import changes
from deepfloyd_core.store.versions import Version, index_of, part_of

_SETTINGS = "image_index", "eval_set", "stage1_lora", "stage2_lora", "cascade_samples"  # whose specs a user decides
_UNPAIRED = "no picture was measured under the same conditions in both"
_COLUMNS, _CELL_PX = 8, 160

Key = tuple[str, int, tuple[int, int]]  # of a sample: prompt, seed, size in px


@dataclass(frozen=True)
class FigureRow:
    """A figure of both versions; None: it was not measured."""

    name: str
    first: float | None
    second: float | None
    change: str = ""  # of the second against the first, where the pictures of both can be paired


@dataclass(frozen=True)
class Difference:
    """How the second of two versions differs from the first; a line for each thing."""

    pictures: tuple[str, ...]  # and captions
    settings: tuple[str, ...]
    figures: tuple[FigureRow, ...]


def difference(workspace: Path, first: Version, second: Version) -> Difference:
    """Compare two versions. Raises ArtifactError when a bundle is not complete."""
    one, other = measured(workspace, first), measured(workspace, second)
    return Difference(
        tuple(picture_lines(workspace, first, second)),
        tuple(setting_lines(workspace, first, second)),
        (*_losses(one, other), *_measures(one, other), *_forgetting(one, other)),
    )


def save_side_by_side(workspace: Path, first: Version, second: Version, path: Path) -> int:
    """Save a sheet of the stored samples that have the same prompt, seed and size in both versions: the base, the first,
    the second, for each stage. Returns how many pictures a row has; without any no file is written.
    """
    rows: list[tuple[str, list[np.ndarray]]] = []
    keys: list[Key] = []
    for stage in STAGES.values():
        base = _samples(workspace, second, stage.table, "base")
        tuned = [_samples(workspace, version, stage.table, "tuned") for version in (first, second)]
        common = [key for key in tuned[1] if key in tuned[0] and key in base][:_COLUMNS]
        if common:
            keys = keys or common
            names = ("base", base), (f"version {first.number}", tuned[0]), (f"version {second.number}", tuned[1])
            rows += [(f"{stage.title}, {name}", [_pixels(files[key]) for key in common]) for name, files in names]
    if rows:
        prompts = ", ".join(dict.fromkeys(prompt for prompt, _, _ in keys))
        title = f"seeds {', '.join(str(seed) for _, seed, _ in keys)}: {prompts}"
        save_picture(titled_rows(rows, _CELL_PX, title), path)
    return len(keys)


def picture_lines(workspace: Path, first: Version, second: Version) -> list[str]:
    """How the pictures and captions of two versions differ: a line for each kind of change."""
    ledgers = [index_of(workspace, version).path / INDEX_FILE for version in (first, second)]
    try:
        return picture_changes(*ledgers)
    except (OSError, ValueError) as error:  # pyarrow's errors are both
        return [f"their lists of pictures cannot be compared: {error}"]


def setting_lines(workspace: Path, first: Version, second: Version) -> list[str]:
    """The settings that differ, each once."""
    lines: list[str] = []
    for kind in _SETTINGS:
        parts = [part_of(workspace, version, kind) for version in (first, second)]
        if parts[0] is None or parts[1] is None:
            if parts != [None, None]:
                lines.append(f"only version {(second if parts[0] is None else first).number} has {kind}")
            continue
        try:
            old, new = ({"format": part.manifest.format, "spec": part.spec, "inputs": {}} for part in parts if part)
        except (ArtifactError, OSError) as error:
            lines.append(str(error))
            continue
        if old != new:
            lines += changes(kind, old, new)
    return list(dict.fromkeys(lines))


def _losses(one: Measured, other: Measured) -> Iterator[FigureRow]:
    figures = one.summary.trainings, other.summary.trainings
    for stage in sorted({*figures[0], *figures[1]}):
        name, parts = STAGES[stage].title, [trainings.get(stage) for trainings in figures]
        before, after = (part.pictures if part else None for part in parts)
        yield FigureRow(f"{name}: pictures trained on", before, after)
        change = ""
        if stage in one.losses and stage in other.losses:
            known, tuned = one.losses[stage], other.losses[stage].tuned
            gain = paired_gain(known.tuned, tuned, "less", loss_bounds(known, tuned))
            change = gain.words(less=True, digits=4) if gain else _UNPAIRED
        first, second = (part.eval_loss if part else None for part in parts)
        yield FigureRow(f"{name}: held-out loss, less is better", first, second, change)


def _measures(one: Measured, other: Measured) -> Iterator[FigureRow]:
    means = [version.summary.samples.held_out for version in (one, other)]
    for measure in measures_against("truth"):
        first, second = (part.upscaled.get("tuned", {}).get(measure.name) if part else None for part in means)
        if first is None and second is None:
            continue
        before, after = (version.upscaled.get(measure.name) for version in (one, other))
        change = ""
        if before and after:
            gain = paired_gain(before.tuned, after.tuned, measure.better or "more", COMPARED[measure.name])
            change = gain.words(measure.better == "less", digits=2) if gain else _UNPAIRED
        yield FigureRow(f"{STAGES[UPSCALERS[0]].title}: {measure.meaning}", first, second, change)


def _forgetting(one: Measured, other: Measured) -> Iterator[FigureRow]:
    first, second = (version.summary.samples.probe_loss_tuned for version in (one, other))
    if first is None and second is None:
        return
    change = ""
    if one.probes and other.probes:
        gain = paired_gain(one.probes.since_base, other.probes.since_base, "less", FORGOTTEN_MORE)
        change = gain.words(less=True, digits=4) if gain else _UNPAIRED
    yield FigureRow(f"{PROBE_LOSS}, less is better", first, second, change)


def _samples(workspace: Path, version: Version, table: str, variant: str) -> dict[Key, Path]:
    """The stored samples of a stage, in their order."""
    part = part_of(workspace, version, "cascade_samples")
    found: dict[Key, Path] = {}
    for file in sorted((part.path / table).glob(f"{variant}-*.png")) if part else ():
        with Image.open(file) as picture:
            record = json.loads(picture.info[RECORD])
            found[record["prompt"], record["seed"], picture.size] = file
    return found


def _pixels(file: Path) -> np.ndarray:
    with Image.open(file) as picture:
        return np.asarray(picture.convert("RGB"))
