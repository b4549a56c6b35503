"""Checkpoints of an unfinished training: safetensors and JSON, committed by a sealed record that is written last.

They are in `.checkpoints/` of the unfinished artifact, and are removed when it is finished. A damaged checkpoint is
reported, and the one before it is used.
"""

import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from deepfloyd_core.errors import ArtifactError, StorageError
from deepfloyd_core.files import fsync_path, read_sealed, sha256_file, write_bytes, write_sealed
from deepfloyd_core.models.tensor_files import save_tensors

log = logging.getLogger(__name__)

FOLDER = ".checkpoints"
_SEAL = "checkpoint.json"
_TENSORS = ("adapter", "optimizer", "ema")


@dataclass(frozen=True)
class StepMetrics:
    """The metrics of an optimizer step."""

    step: int  # counted from 1
    loss: float
    lr: float
    grad_norm: float  # before clipping


@dataclass(frozen=True)
class Checkpoint:
    """State after `step` optimizer steps."""

    step: int
    adapter: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    numbers: dict[str, Any]  # the optimizer's
    ema: dict[str, torch.Tensor]  # empty without use_ema
    metrics: list[StepMetrics]


def save_checkpoint(out: Path, checkpoint: Checkpoint, limit: int) -> None:
    """Write one checkpoint durably, then drop the oldest beyond `limit`. One that cannot be written leaves nothing behind.

    Those of later steps are dropped as well: this training would have gone on from one of them if it were whole.
    """
    folder = out / FOLDER / f"step-{checkpoint.step:08d}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        _write(folder, checkpoint)
    except (OSError, StorageError):  # a disk that is full, and needs this room
        shutil.rmtree(folder, ignore_errors=True)
        raise
    kept = [each for each in _folders(out) if each <= folder][-limit:]
    for old in _folders(out):
        if old not in kept:
            try:
                shutil.rmtree(old)
            except OSError as error:  # the new one is whole
                log.warning("the old checkpoint %s cannot be removed: %s", old, error.strerror)


def _write(folder: Path, checkpoint: Checkpoint) -> None:
    for name in _TENSORS:
        what = f"`{name}` of the checkpoint of step {checkpoint.step}"
        save_tensors(getattr(checkpoint, name), folder / f"{name}.safetensors", what=what)
    plain = {"numbers": checkpoint.numbers, "metrics": [vars(row) for row in checkpoint.metrics]}
    for name, value in plain.items():  # floats keep every bit: json writes the shortest text that reads back the same
        write_bytes(folder / f"{name}.json", json.dumps(value).encode())
    hashes = {file.name: sha256_file(file) for file in sorted(folder.iterdir())}
    write_sealed(folder / _SEAL, {"step": checkpoint.step, "files": hashes})
    fsync_path(folder.parent)
    fsync_path(folder.parent.parent)


def load_checkpoint(out: Path, most: int | None = None) -> Checkpoint | None:
    """The newest intact checkpoint of at most so many steps, or None. A damaged one is logged and skipped."""
    for folder in reversed(_folders(out)):
        if most is not None and folder.name > f"step-{most:08d}":
            continue
        try:
            record = read_sealed(folder / _SEAL, "The one before it is used")
            for name, digest in record["files"].items():
                if sha256_file(folder / name) != digest:
                    raise ArtifactError(f"{folder / name} has other bytes than when it was written")
        except (ArtifactError, OSError) as error:
            log.warning("checkpoint %s is not used: %s", folder.name, error)
            continue
        tensors = {name: load_file(folder / f"{name}.safetensors") for name in _TENSORS}
        numbers, rows = (json.loads((folder / f"{name}.json").read_bytes()) for name in ("numbers", "metrics"))
        return Checkpoint(record["step"], **tensors, numbers=numbers, metrics=[StepMetrics(**row) for row in rows])
    return None


def last_good(out: Path) -> str:
    """From where a run that went wrong can be continued, in words."""
    found = _folders(out)
    return f"The last good checkpoint is {found[-1]}." if found else "There is no checkpoint yet."


def _folders(out: Path) -> list[Path]:
    return sorted((out / FOLDER).glob("step-*"))
