"""One flipped bit in a file that was published: the commands that need it find it, or make the same without it.

A small workspace is made once. In each round a random bit of one of its files flips, whose size and times stay; then what
a user would do is done again in this process, as if every file of rows were too large to be hashed. It has to end with the
same LoRA, the same published bundle, or one error that names the file. Afterwards the workspace is that of before.
"""

import logging
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, cycle
from pathlib import Path
from random import Random
from unittest.mock import patch

import numpy as np
import pytest
from data_world import DataWorld
from flipped import flip
from releases import Release, deepfloyd
from rows import Row
from training_parts import break_in_step, prepared, run_here, stage_text, train_stage

from deepfloyd_core.adapters.files import LORA_FILE
from deepfloyd_core.config.run import Run
from deepfloyd_core.crops.eval_pictures import eval_pictures
from deepfloyd_core.crops.rows import held_out_ids
from deepfloyd_core.errors import DeepFloydError
from deepfloyd_core.processes.pool import Children, Limits
from deepfloyd_core.store import damage, manifest
from deepfloyd_core.store.artifacts import Artifact
from deepfloyd_core.text import encode
from deepfloyd_core.text.embeds import Embeds
from deepfloyd_core.text.projection import Projected
from deepfloyd_core.training.batches import TrainingRows
from flows.dag import mended

SHARE = 2
MOST_TOLD = 5  # failures of a kind
STEPS = 4
_ENTRY = {"maximum_image_size": 64, "target_downsample_size": 64, "crop_style": "random", "repeats": 1}
_KEYS = {
    "mixed_precision": "no", "text_encoder_dtype": "fp32", "device": "cpu", "num_threads": 1, "validation_prompt": "",
    "shard_mib": 0.1, "embed_file_mib": 0.1, "max_train_steps": STEPS, "lora_rank": 2, "train_batch_size": 2,
    "checkpoint_step_interval": 1, "validation_step_interval": 0,
}  # fmt: skip
Outcome = dict[str, bytes]  # what a user is left with


@dataclass(frozen=True)
class Scene:
    """A workspace, and what is done with it: that says what a user is left with, or raises."""

    workspace: Path
    act: Callable[[], Outcome]
    kind_of: Callable[[Path], str]  # of a file inside the workspace, in the table


@dataclass
class Found:
    """What came of the flips of a kind of files."""

    tried: int = 0
    failures: list[str] = field(default_factory=list)


class NoOutcomeError(Exception):
    """A command ended in no way that is allowed."""


def attack(seconds: float, seed: int, folder: Path) -> list[Row]:
    """Flips in turn in every file of each scene, at least one in each kind of file."""
    found: dict[str, Found] = {}
    end = time.monotonic() + seconds
    with _quiet(), Children(1, Limits(), ("deepfloyd_core.index.index",)) as children:
        makers: list[Callable[[], Scene]] = [
            partial(_training, folder / "training", children),
            partial(_stopped, folder / "stopped", children),
            partial(release_scene, folder / "release"),
        ]
        for number, make in enumerate(makers):
            scene = make()
            share = (end - time.monotonic()) / (len(makers) - number)
            for kind, fault in flips(scene, Random(f"{seed}/{number}"), share):
                counted = found.setdefault(kind, Found())
                counted.tried += 1
                counted.failures += [fault] if fault else []
    return [
        Row(f"flip in {kind}", one.tried, len(one.failures), one.failures[:MOST_TOLD]) for kind, one in found.items()
    ]


def flips(scene: Scene, rng: Random, seconds: float) -> Iterator[tuple[str, str]]:
    """Flip bit after bit. Yields the kind of each file, and what was wrong; empty: nothing."""
    pristine = scene.workspace.with_name("pristine")
    shutil.copytree(scene.workspace, pristine)

    def restore() -> None:
        shutil.rmtree(scene.workspace)
        shutil.copytree(pristine, scene.workspace)

    whole, end = scene.act(), time.monotonic() + seconds
    restore()
    files = [file.relative_to(pristine) for file in sorted(pristine.rglob("*")) if file.is_file() and _is_kept(file)]
    rng.shuffle(files)
    first = list({scene.kind_of(file): file for file in files}.values())
    for turn, file in enumerate(chain(first, cycle(files))):
        if turn >= len(first) and time.monotonic() > end:
            break
        size = (scene.workspace / file).stat().st_size
        if not size:
            continue
        place, bit = rng.randrange(size), rng.randrange(8)
        flip(scene.workspace / file, place, bit)
        fault = _fault(scene, file, whole)
        yield scene.kind_of(file), f"{file}, bit {bit} of byte {place} of {size}: {fault}" if fault else ""
        restore()
    shutil.rmtree(pristine)


def _is_kept(file: Path) -> bool:
    return ".locks" not in file.parts


def _fault(scene: Scene, file: Path, whole: Outcome) -> str:
    damage._check.cache_clear()  # as in a new process
    damage._entries.cache_clear()
    try:
        made = scene.act()
    except DeepFloydError as error:
        return "" if file.name in str(error) else f"an error that does not name it: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    names = [name for name in whole.keys() | made.keys() if whole.get(name) != made.get(name)]
    return f"another {', '.join(sorted(names))}" if names else ""


@contextmanager
def _quiet() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable()
    sheet = patch.object(encode, "save_token_counts", lambda counts, length, path: path.touch())
    try:
        with sheet, patch.object(manifest, "_SMALL_ROWS", 0):
            yield
    finally:
        logging.disable(before)


def _world(folder: Path, children: Children) -> tuple[DataWorld, Run]:
    world, rng = DataWorld(folder, children), np.random.default_rng(1)
    for number in range(10):
        world.add(f"{number}.png", rng.integers(0, 256, (72, 80, 3), np.uint8), f"caption {number}")
    return world, world.load(_ENTRY, stages=(1,), **_KEYS)


def _training(folder: Path, children: Children) -> Scene:
    """What a training needs is reused, and read by the trainer's own readers; so is the LoRA, or it is trained again."""
    world, run = _world(folder, children)

    @mended
    def make() -> Outcome:
        made = prepared(run, world)
        text = stage_text(run, 1, made["text_embeds"])
        lora = train_stage(run, made, 1, run.workspace, text, run_here)
        weights = {"LoRA": (lora.path / LORA_FILE).read_bytes()}
        return weights | _read(made["stage1_pixels"], made["eval_set"], text, made["text_embeds"])

    make()
    return Scene(run.workspace, make, lambda file: f"{file.parts[0]}/{_named(file)}")


def _read(pixels: Artifact, held_out: Artifact, text: Artifact, embeds: Artifact) -> Outcome:
    """Everything that trainings and samplings read of these, each piece by its name."""
    rows, stored, projected = TrainingRows(pixels, held_out_ids(held_out)), Embeds(embeds), Projected(text)
    read = {"held out": repr([(one.row, one.pixels.tobytes()) for one in eval_pictures(held_out, 1)]).encode()}
    for size, count in rows.counts.items():
        batch = rows.take(size, np.arange(count))
        read |= {
            f"crops of {size}": batch.pixels.numpy().tobytes(),
            f"captions of {size}": repr(batch.caption_ids).encode(),
        }
    for name in stored.ids():
        both = projected.batch([name])
        assert both.pooled is not None  # both are stored
        tensors = {"embeds": stored[name], "rows": both.rows, "pooled": both.pooled}
        read |= {f"{part} of {name}": tensor.numpy().tobytes() for part, tensor in tensors.items()}
    return read


def _named(file: Path) -> str:
    """A file's name without what differs between files of a kind."""
    return re.sub(r"-[^.]*|[0-9a-f]{16}|[0-9]{4,}", "N", file.name)


def _stopped(folder: Path, children: Children) -> Scene:
    """A training that broke in its last step goes on from its checkpoint."""
    world, run = _world(folder, children)
    made = prepared(run, world)
    with pytest.MonkeyPatch.context() as patched:
        break_in_step(patched, STEPS - 1)
        with pytest.raises(RuntimeError, match="broken"):
            train_stage(run, made, 1, run.workspace, how=run_here)
    (left,) = (run.workspace / "stage1_lora").iterdir()
    state = shutil.copytree(left, folder / "state")
    workspace = folder / "of the trainer"
    shutil.copytree(state, workspace / left.name)

    def go_on() -> Outcome:
        shutil.rmtree(left, ignore_errors=True)
        shutil.copytree(workspace / left.name, left)
        lora = train_stage(run, made, 1, run.workspace, how=run_here)
        return {"LoRA": (lora.path / LORA_FILE).read_bytes()}

    return Scene(workspace, go_on, lambda file: f"state of a training/{_named(file)}")


def release_scene(folder: Path) -> Scene:
    """The newest version is published to a folder, then the one before serves again."""
    release, target = Release(folder / "workspace"), folder / "target"
    release.publish("old")
    release.publish("new")

    def publish() -> Outcome:
        shutil.rmtree(target, ignore_errors=True)
        _command("publish", str(release.workspace), "2", str(target))
        sent = {file.name: file.read_bytes() for file in target.rglob("*") if file.is_file()}
        _command("rollback", str(release.workspace))
        told = _command("history", str(release.workspace)).splitlines()
        return sent | {"versions": "\n".join(line for line in told if not line.startswith("fault: ")).encode()}

    return Scene(release.workspace, publish, lambda file: f"a release: {file.parts[0]}/{_named(file)}")


def _command(*words: str) -> str:
    done = deepfloyd(*words)
    if isinstance(done.exception, DeepFloydError):
        raise done.exception
    if done.exit_code:
        raise NoOutcomeError(done.output + repr(done.exception))
    return done.stdout
