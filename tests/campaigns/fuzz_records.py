"""Damaged records of a workspace: manifests, versions, events, checkpoints. A command names one, or goes on without it."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from hashlib import sha256
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from unittest.mock import patch

import torch
from mutations import Mutation, damaged, damaged_json, damaged_text, one_of
from releases import Release
from trials import MESSAGE, Target, Trial
from typer.main import get_command
from typer.testing import CliRunner

from deepfloyd_core.errors import DeepFloydError
from deepfloyd_core.files import canonical_json, sha256_bytes
from deepfloyd_core.training.checkpoints import Checkpoint, StepMetrics, load_checkpoint, save_checkpoint
from flows.commands.cli import app

_COMMANDS = (
    "history",
    "ls",
    "ls --all",
    "verify",
    "show 1",
    "show champion",
    "gc",
    "show --json 2",
    "rollback",
    "promote 1",
)


def inputs_of(folder: Path, *patterns: str) -> list[bytes]:
    """The files of a folder as inputs: the name of each in the first line, its bytes after that."""
    files = sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})
    return [f"{file.relative_to(folder)}\n".encode() + file.read_bytes() for file in files]


def put(folder: Path, data: bytes) -> tuple[Path, bytes]:
    """Write an input to its place. Returns the place, and what was there."""
    name, _, content = data.partition(b"\n")
    file = folder / name.decode()
    before = file.read_bytes()
    file.write_bytes(content)
    return file, before


def behind_name(mutation: Mutation) -> Mutation:
    def mutate(rng: Random, data: bytes) -> bytes:
        name, _, content = data.partition(b"\n")
        return name + b"\n" + mutation(rng, content)

    return mutate


def resealed(rng: Random, data: bytes) -> bytes:
    """Damage to a sealed record, whose seal fits again; as another version of the program may have written it."""
    try:
        record = json.loads(data)
        record.pop("seal")
    except (ValueError, KeyError, AttributeError, TypeError):
        return damaged(rng, data)
    record = damaged_json(rng, record)
    if not isinstance(record, dict):
        return json.dumps(record).encode()
    record = {key: value for key, value in record.items() if key != "seal"}
    record["seal"] = sha256_bytes(canonical_json(record).encode())
    text = json.dumps(record, sort_keys=True, indent=2, ensure_ascii=False)
    return f"{text}\n".encode("utf-8", "replace")


def _release(folder: Path) -> Path:
    """A workspace with two versions and their events."""
    release = Release(folder / "workspace")
    release.publish("old")
    release.publish("new")
    return release.workspace


def _records() -> list[bytes]:
    with TemporaryDirectory() as made:
        return inputs_of(_release(Path(made)), "*/*/manifest.json", "versions/*.json", "versions/events/*.json")


@contextmanager
def _commanded(folder: Path) -> Iterator[Trial]:
    whole, work = _release(folder), folder / "work"

    def trial(data: bytes) -> str:
        shutil.copytree(whole, work)
        put(work, data)
        others = hashes_of(work)
        name, *words = _COMMANDS[sha256(data).digest()[0] % len(_COMMANDS)].split()
        words.insert(words.index(words[-1]) if words and words[-1][0] != "-" else len(words), str(work))
        done = CliRunner().invoke(app, [name, *words])
        changed = {place for place, digest in hashes_of(work).items() if others.get(place, digest) != digest}
        shutil.rmtree(work)
        assert not changed, f"{name} changed {changed}"
        assert len(done.output) + len(str(done.exception)) < 2 * MESSAGE, f"{name} said {len(done.output)} characters"
        if isinstance(done.exception, DeepFloydError):
            return "refused"
        assert done.exception is None or isinstance(done.exception, SystemExit), f"{name}: {done.exception!r}"
        return f"exit {done.exit_code}"

    with patch("typer.testing._get_command", cache(get_command)):  # it takes most of the time of a short command
        yield trial
    shutil.rmtree(folder)


def hashes_of(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(file.relative_to(folder)): sha256_bytes(file.read_bytes()) for file in files}


def _checkpoint(step: int) -> Checkpoint:
    tensors = {"b": torch.arange(5.0) + step, "w": torch.full((3, 4), float(step))}
    numbers = {"lr": 1e-3 / step, "k": step, "text": ["a", None]}
    return Checkpoint(step, tensors, {"m": tensors["w"] / 3}, numbers, {}, [StepMetrics(step, 0.1, 1e-3, 2.0)])


def _saved(folder: Path) -> Path:
    for step in (2, 4):
        save_checkpoint(folder, _checkpoint(step), 2)
    return folder


def _checkpoints() -> list[bytes]:
    with TemporaryDirectory() as made:
        return inputs_of(_saved(Path(made)), ".checkpoints/step-00000004/*")


@contextmanager
def _resumed(folder: Path) -> Iterator[Trial]:
    _saved(folder)

    def told(checkpoint: Checkpoint | None) -> str:
        return "" if checkpoint is None else repr(vars(checkpoint))

    known = {told(_checkpoint(step)): step for step in (2, 4)}

    def trial(data: bytes) -> str:
        file, before = put(folder, data)
        try:
            found = load_checkpoint(folder)
        finally:
            file.write_bytes(before)
        assert told(found) in known, f"a training would go on from {told(found)[:200]}"
        return f"step {known[told(found)]}"

    yield trial
    shutil.rmtree(folder)


_record = behind_name(one_of(resealed, resealed, damaged, damaged_text()))
TARGETS = (
    Target("records of a workspace", _records, _record, _commanded),
    Target("checkpoints", _checkpoints, behind_name(damaged), _resumed),
)
