"""The figures of each held-out picture, as a bundle stores them. No torch.

A picture is named by its id and its conditions, a digest of everything beside the model that decides its figure: crop,
caption, noise level, sampler. The random draws follow from the picture. So figures of two versions that have the same name
differ by the model alone.
"""

import errno
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from deepfloyd_core.config.stages import Stage
from deepfloyd_core.errors import ArtifactError
from deepfloyd_core.files import read_bytes
from deepfloyd_core.measures.files import UpscalingFiles
from deepfloyd_core.sampling.jobs import PROBES_FILE
from deepfloyd_core.store.versions import stage_folder
from deepfloyd_core.training.jobs import VALIDATION_FILE

# Beyond this timestep, x_t hardly tells the colours of its picture: the estimate is a guess from the caption.
COLOURS_UNTIL = 700
PictureName = tuple[str, str]  # image_id, conditions
Row = Mapping[str, str | float | None]


@dataclass(frozen=True)
class PictureFigures:
    """One figure of each held-out picture; NaN where it is missing."""

    base: Mapping[PictureName, float]
    tuned: Mapping[PictureName, float]

    @property
    def are_finite(self) -> bool:
        """Whether every picture has both figures, and each is a finite number."""
        values = [*self.base.values(), *self.tuned.values()]
        return self.base.keys() == self.tuned.keys() and all(map(math.isfinite, values))

    @property
    def since_base(self) -> dict[PictureName, float]:
        """The difference of the tuned model's figure from the base's; NaN where the base has none."""
        return {name: value - self.base.get(name, math.nan) for name, value in self.tuned.items()}


def picture_losses(bundle: Path, stage: Stage) -> PictureFigures:
    """The held-out loss of each picture of a stage, its mean over timesteps. Raises ArtifactError for an unreadable file."""
    return _on_grid(bundle, stage, "loss", 1000)


def picture_colours(bundle: Path, stage: Stage) -> PictureFigures:
    """The colour shift of the estimate of each held-out picture, its mean over timesteps. Raises as `picture_losses`."""
    return _on_grid(bundle, stage, "colour_shift", COLOURS_UNTIL)


def probe_losses(bundle: Path) -> PictureFigures:
    """The loss of each probe of forgetting, its mean over timesteps; a probe is named by its prompt. Raises as
    `picture_losses`.
    """
    rows = _rows(bundle / PROBES_FILE, ("prompt", "conditions", "way", "t", "loss"))
    base, tuned = (
        _by_picture("loss", ({**row, "image_id": row["prompt"]} for row in rows if row["way"] == way))
        for way in ("base", "tuned")
    )
    return PictureFigures(base, tuned)


def _on_grid(bundle: Path, stage: Stage, column: str, until: int) -> PictureFigures:
    """A figure of each held-out picture of a stage, its mean over the timesteps up to one."""
    file = stage_folder(bundle, stage) / VALIDATION_FILE
    rows = [row for row in _rows(file, ("step", "model", "part", "image_id", "conditions", "t", column))
            if row["part"] == "held_out" and float(row["t"] or 0) <= until]  # fmt: skip
    last = max((row["step"] or 0 for row in rows if row["model"] == "trained"), default=0, key=float)
    return PictureFigures(
        _by_picture(column, (row for row in rows if row["model"] == "base")),
        _by_picture(column, (row for row in rows if row["model"] == "trained" and row["step"] == last)),
    )


def picture_measures(bundle: Path, stage: Stage, measure: str, level: int) -> PictureFigures:
    """A measure of each held-out picture, upscaled at a noise level. Raises ArtifactError for an unreadable file."""
    file = UpscalingFiles(stage, bundle).table
    rows = [row for row in _rows(file, ("low_res", "way", "noise_level", "image_id", "conditions", measure))
            if row["low_res"] == "held-out" and row["noise_level"] == level]  # fmt: skip
    base, tuned = (
        {
            (str(row["image_id"]), f"{row['conditions']}, level {level}"): _number(row[measure])
            for row in rows
            if row["way"] == way
        }
        for way in ("base", "tuned")
    )
    return PictureFigures(base, tuned)


def _by_picture(column: str, rows: Iterable[Row]) -> dict[PictureName, float]:
    """The mean figure of each picture. The timesteps belong to its conditions."""
    losses: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        losses.setdefault((str(row["image_id"]), str(row["conditions"])), {})[str(row["t"])] = _number(row[column])
    return {
        (name, f"{conditions}, t {' '.join(sorted(of_t))}"): sum(of_t.values()) / len(of_t)
        for (name, conditions), of_t in losses.items()
    }


def _number(value: str | float | None) -> float:
    return float("nan") if value is None else float(value)


def _rows(file: Path, columns: tuple[str, ...]) -> list[Row]:
    """The rows of a file. Raises ArtifactError when it is missing or damaged, OSError where a disk or memory fails."""
    try:
        data = read_bytes(file)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise _unreadable(file, error) from None
    try:
        return list(pq.read_table(pa.BufferReader(data)).select(columns).to_pylist())
    except MemoryError as error:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM), str(file)) from error
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:  # of pyarrow, about the bytes
        raise _unreadable(file, error) from None


def _unreadable(file: Path, error: Exception) -> ArtifactError:
    return ArtifactError(f"{file}, the figures of each held-out picture, cannot be read: {error}")
