"""Damaged files of finished and of unfinished artifacts: what is made again has the bytes that it had."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import numpy as np
from data_world import DataWorld
from fuzz_folder import new_world
from fuzz_records import behind_name, hashes_of, inputs_of, put, resealed
from mutations import damaged, one_of
from training_parts import prepared, stage_text
from trials import Target, Trial, named_error

from deepfloyd_core.config.run import Run
from deepfloyd_core.errors import DeepFloydError
from deepfloyd_core.sources import folder as local_folder
from deepfloyd_core.store import artifacts
from deepfloyd_core.store.artifacts import Artifact
from deepfloyd_core.store.manifest import MANIFEST

_UNFINISHED = "image_index", "stage1_pixels", "eval_set", "text_embeds", "stage1_text"


def _loaded(folder: Path) -> tuple[DataWorld, Run]:
    """Four captioned pictures, in shards of one or two."""
    world = new_world(folder)
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 256, (70, 80, 3), dtype=np.uint8)
        world.add(f"{number}.png", pixels, f"caption {number}")
    sizes = {"shard_mib": 0.1, "text_encoder_dtype": "fp32", "device": "cpu", "num_threads": 1}
    return world, world.load({"crop_style": "random", "repeats": 1}, stages=(1,), **sizes)


def _again(world: DataWorld, run: Run) -> dict[str, str]:
    """Make what is not there and whole, all but a training. Returns the hashes of the files, without records that hold
    times.
    """
    made = list(prepared(run, world).values())
    made.append(stage_text(run, 1, made[-1]))
    return {
        f"{one.kind}/{name}": digest
        for one in made for name, digest in hashes_of(one.path).items() if name != MANIFEST
    }  # fmt: skip


def _finished() -> list[bytes]:
    with TemporaryDirectory() as made:
        world, run = _loaded(Path(made))
        _again(world, run)
        return inputs_of(run.workspace, "*/*/*.parquet", "*/*/*.arrow", ".scan/*.arrow", "*/*/manifest.json")


@contextmanager
def _made_again(folder: Path) -> Iterator[Trial]:
    local_folder.RACY_NS = 0  # notes of young files are read, too
    world, run = _loaded(folder)
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
        _check_same(found, expected)
        return "the same bytes" if place.exists() and place.read_bytes() in (before, content) else "made again"

    yield trial
    shutil.rmtree(folder)


class _StoppedError(Exception):
    """Instead of a commit."""


def _stopped(world: DataWorld, run: Run, kind: str) -> Path:
    """The directory of an artifact of which all is made but the manifest, as a kill leaves it; what comes before it is
    finished.
    """
    left: list[Path] = []
    commit = artifacts.commit

    def stop(path: Path, request: artifacts.Request, *rest: object) -> Artifact:
        if request.kind == kind:
            left.append(path)
            raise _StoppedError
        return commit(path, request, *rest)  # type: ignore[arg-type]

    with patch.object(artifacts, "commit", stop):
        try:
            _again(world, run)
        except _StoppedError:
            return left[0]
    raise AssertionError(f"no {kind} was made")


def _unfinished() -> list[bytes]:
    found = []
    for kind in _UNFINISHED:
        with TemporaryDirectory() as made:
            path = _stopped(*_loaded(Path(made)), kind)
            found += [f"{kind}\n".encode() + data for data in inputs_of(path, "*")]
    return found


@contextmanager
def _continued(folder: Path) -> Iterator[Trial]:
    places = {kind: folder / kind for kind in _UNFINISHED}
    worlds = {kind: _loaded(place) for kind, place in places.items()}
    stopped = {kind: _stopped(*world, kind) for kind, world in worlds.items()}
    for kind, place in places.items():
        shutil.copytree(place / "workspace", folder / f"{kind} whole", symlinks=True)
    expected = _again(*_loaded(folder / "another"))

    def trial(data: bytes) -> str:
        name, _, rest = data.partition(b"\n")
        kind = name.decode()
        put(stopped[kind], rest)
        try:
            found = _again(*worlds[kind])
        finally:
            shutil.rmtree(places[kind] / "workspace")
            shutil.copytree(folder / f"{kind} whole", places[kind] / "workspace", symlinks=True)
        _check_same(found, expected)
        return "the same bytes"

    yield trial
    shutil.rmtree(folder)


def _check_same(found: dict[str, str], expected: dict[str, str]) -> None:
    assert found == expected, f"other bytes in {[each for each in expected if found.get(each) != expected[each]]}"


TARGETS = (
    Target("finished artifacts", _finished, behind_name(one_of(damaged, damaged, resealed)), _made_again),
    Target(
        "unfinished artifacts", _unfinished,
        behind_name(behind_name(one_of(damaged, damaged, resealed))), _continued,
    ),
)  # fmt: skip
