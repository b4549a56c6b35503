"""Damaged records and data of a workspace: manifests, versions, events, checkpoints, ledgers, shards and notes.

A command names a damaged record, or goes on without it. What is made again has the bytes that it had.
"""

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

import numpy as np
import torch
from data_world import DataWorld
from fuzz_folder import new_world
from mutations import Mutation, damaged, damaged_json, damaged_text, one_of
from releases import Release
from trials import MESSAGE, Target, Trial, named_error
from typer.main import get_command
from typer.testing import CliRunner

from deepfloyd_core.config.run import Run
from deepfloyd_core.errors import DeepFloydError
from deepfloyd_core.files import canonical_json, sha256_bytes
from deepfloyd_core.sources import folder as local_folder
from deepfloyd_core.store.manifest import MANIFEST
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


def _inputs_of(folder: Path, *patterns: str) -> list[bytes]:
    """The files of a folder as inputs: the name of each in the first line, its bytes after that."""
    files = sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})
    return [f"{file.relative_to(folder)}\n".encode() + file.read_bytes() for file in files]


def _put(folder: Path, data: bytes) -> tuple[Path, bytes]:
    """Write an input to its place. Returns the place, and what was there."""
    name, _, content = data.partition(b"\n")
    file = folder / name.decode()
    before = file.read_bytes()
    file.write_bytes(content)
    return file, before


def _behind_name(mutation: Mutation) -> Mutation:
    def mutate(rng: Random, data: bytes) -> bytes:
        name, _, content = data.partition(b"\n")
        return name + b"\n" + mutation(rng, content)

    return mutate


def _resealed(rng: Random, data: bytes) -> bytes:
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
        return _inputs_of(_release(Path(made)), "*/*/manifest.json", "versions/*.json", "versions/events/*.json")


@contextmanager
def _commanded(folder: Path) -> Iterator[Trial]:
    whole, work = _release(folder), folder / "work"

    def trial(data: bytes) -> str:
        shutil.copytree(whole, work)
        _put(work, data)
        others = _hashes(work)
        name, *words = _COMMANDS[sha256(data).digest()[0] % len(_COMMANDS)].split()
        words.insert(words.index(words[-1]) if words and words[-1][0] != "-" else len(words), str(work))
        done = CliRunner().invoke(app, [name, *words])
        changed = {place for place, digest in _hashes(work).items() if others.get(place, digest) != digest}
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


def _hashes(folder: Path) -> dict[str, str]:
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
        return _inputs_of(_saved(Path(made)), ".checkpoints/step-00000004/*")


@contextmanager
def _resumed(folder: Path) -> Iterator[Trial]:
    _saved(folder)

    def told(checkpoint: Checkpoint | None) -> str:
        return "" if checkpoint is None else repr(vars(checkpoint))

    known = {told(_checkpoint(step)): step for step in (2, 4)}

    def trial(data: bytes) -> str:
        file, before = _put(folder, data)
        try:
            found = load_checkpoint(folder)
        finally:
            file.write_bytes(before)
        assert told(found) in known, f"a training would go on from {told(found)[:200]}"
        return f"step {known[told(found)]}"

    yield trial
    shutil.rmtree(folder)


def _built(world: DataWorld) -> Run:
    """The data stages of four pictures."""
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 256, (70, 80, 3), dtype=np.uint8)
        world.add(f"{number}.png", pixels, f"caption {number}")
    run = world.load({"crop_style": "random", "repeats": 1}, stages=(1,), shard_mib=0.1)
    _again(world, run)
    return run


def _again(world: DataWorld, run: Run) -> dict[str, str]:
    """Make what is not there and whole. Returns the hashes of the files, without records that hold times."""
    index = world.index(run)
    made = [index, world.pixels(run, index, 1), world.eval_set(run, index)]
    return {
        f"{one.kind}/{name}": digest for one in made for name, digest in _hashes(one.path).items() if name != MANIFEST
    }


def _data() -> list[bytes]:
    with TemporaryDirectory() as made:
        run = _built(new_world(Path(made)))
        return _inputs_of(run.workspace, "*/*/*.parquet", "*/*/*.arrow", ".scan/*.arrow", "*/*/manifest.json")


@contextmanager
def _made_again(folder: Path) -> Iterator[Trial]:
    local_folder.RACY_NS = 0  # notes of young files are read, too
    world = new_world(folder)
    run = _built(world)
    expected = _again(world, run)

    def trial(data: bytes) -> str:
        name, _, content = data.partition(b"\n")
        kind, file = name.decode().split("/")[0], name.decode().rpartition("/")[2]
        place = next(run.workspace.glob(f"{kind}/*.arrow" if kind == ".scan" else f"{kind}/*/{file}"))
        before = place.read_bytes() if place.exists() else b""
        place.write_bytes(content)
        try:
            found = _again(world, run)
        except DeepFloydError as error:
            place.write_bytes(before)
            assert file == MANIFEST, f"{place} is not made again: {error}"
            return named_error(error, place.parent)
        assert found == expected, f"other bytes in {[each for each in expected if found.get(each) != expected[each]]}"
        return "the same bytes" if place.exists() and place.read_bytes() in (before, content) else "made again"

    yield trial
    shutil.rmtree(folder)


_record = _behind_name(one_of(_resealed, _resealed, damaged, damaged_text()))
TARGETS = (
    Target("records of a workspace", _records, _record, _commanded),
    Target("checkpoints", _checkpoints, _behind_name(damaged), _resumed),
    Target(
        "ledgers, shards, rows, notes, manifests", _data, _behind_name(one_of(damaged, damaged, _resealed)), _made_again
    ),
)
