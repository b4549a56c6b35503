"""SIGKILLs of a small run in all its stages, at random moments: afterwards every file has the bytes of an undisturbed run.

A pass is what a user does: `run`, `generate`, `upscale`, `publish`, each command given again until it ends. A kill takes a
command with all its processes, or one of those processes alone: a rank of a training, a decoder. Every second pass trains
with two ranks, and must end with the bytes of one. The commands are forks of this process, their jobs forks of those
(`command_here`), so that most of a command's time is its work. All of one shares one Prefect server.
"""

import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
from narrowing import known
from PIL import Image
from rows import Row
from small_run import SmallRun, make_small_run

from deepfloyd_core.files import sha256_file
from deepfloyd_core.store.manifest import MANIFEST
from flows.serving.server import prefect_server, see_environment

SHARE = 3
_SHORT = (
    "stage1.max_train_steps=8", "stage1.validation_step_interval=4", "stage1.train_batch_size=1",
    "stage1.gradient_accumulation_steps=2", "stage2.max_train_steps=4", "stage2.gradient_accumulation_steps=2",
    "num_eval_images=1", "num_validation_images=1",
)  # fmt: skip
_STEPS = ("stage1.validation_num_inference_steps=10", "stage2.validation_num_inference_steps=3")
_PARTS = 12  # of a command's time: the mean time until it is killed is one of them
_MOST = 30  # kills of a command, after which it is left to end
_ALONE = 0.4  # share of the kills that take one process of a command
_PATIENCE_S = 300.0  # for a command that is left to end
# They hold times, or hashes of what does.
_TIMES = {MANIFEST, "SHA256SUMS", ".deepfloyd-publication.json"}


@dataclass
class Pass:
    """A run in a folder of its own, and what is counted of it."""

    run: SmallRun
    ranks: int  # of its trainings
    kills: Counter[str]

    @property
    def commands(self) -> list[tuple[str, ...]]:
        """The command lines of a pass, in their order."""
        keys = (*_SHORT, f"num_processes={self.ranks}")
        config, sets = str(self.run.config), [word for key in keys for word in ("--set", key)]
        steps = [word for key in _STEPS for word in ("--set", key)]
        drawn = ("generate", config, "--prompt", "a purple star", "--prompt", "a red circle", "--seeds", "3-4")
        return [
            ("run", config, *sets),
            (*drawn, "--version", "1", *sets, *steps),
            ("upscale", config, str(self.run.folder / "own"), "--version", "1", *sets),
            ("publish", self.workspace, "1", str(self.run.folder / "published")),
        ]

    @property
    def workspace(self) -> str:
        """What commands call it."""
        return str(self.run.workspace)

    def move(self, chance: random.Random) -> None:
        """Before a command is started: from here on it is on another machine, if there are several."""

    @property
    def log(self) -> Path:
        """Where the commands print."""
        return self.run.folder / "commands.log"

    def hashes(self) -> dict[str, str]:
        """The sha256 of each file that a user is left with, by its kind of artifact and its name there."""
        found = {}
        for file in sorted(self.run.workspace.glob("*/????????????????/**/*")):
            kind, _, *rest = file.relative_to(self.run.workspace).parts
            if file.is_file() and file.name not in _TIMES:
                found["/".join([kind, *rest])] = sha256_file(file)
        for file in (self.run.folder / "published").rglob("*"):
            if file.is_file() and file.name not in _TIMES:
                found[f"published/{file.name}"] = sha256_file(file)
        return found

    def stage(self, command: tuple[str, ...]) -> str:
        """What a command is making: the newest artifact without a manifest."""
        if command[0] == "publish":
            return command[0]
        begun = [path for path in self.run.workspace.glob("*/????????????????") if not (path / MANIFEST).exists()]
        return max(begun, key=lambda path: path.stat().st_mtime).parent.name if begun else "between two artifacts"


def attack(seconds: float, seed: int, folder: Path) -> list[Row]:
    """Passes until the time is over, at least one."""
    end = time.monotonic() + seconds
    with prefect_server(folder / "home"):
        see_environment()
        kills, number, failures = killed_passes(
            lambda number: new_pass(folder / str(number), 2 - number % 2), folder, end, seed
        )
    rows = [Row(f"kills: {stage}", count, 0, []) for stage, count in sorted(kills.items())]
    return [*rows, Row("passes of killed commands, every byte compared", number, len(failures), failures)]


def killed_passes(
    make: Callable[[int], Pass], folder: Path, end: float, seed: int
) -> tuple[Counter[str], int, list[str]]:  # fmt: skip
    """Compare killed passes, each made from its number, with one on a disk that nothing disturbs, until the time is over.
    Returns the kills, the number of passes, and a text for each that failed.
    """
    number, chance = 0, random.Random(seed)
    whole = new_pass(folder / "whole")
    times = [_undisturbed(whole, command) for command in whole.commands]
    expected, kills, failures = whole.hashes(), Counter[str](), list[str]()
    while not number or time.monotonic() < end:
        broken = make(number)
        fault = _killed_pass(broken, times, chance, end) or _difference(broken.hashes(), expected)
        kills += broken.kills
        if fault:
            failures.append(f"pass {number} of seed {seed}: {fault}\n    {broken.run.folder}")
        else:
            shutil.rmtree(broken.run.folder)
        number += 1
    return kills, number, failures


def new_pass(folder: Path, ranks: int = 1, kind: type[Pass] = Pass) -> Pass:
    """Its folder with the pictures of all commands. ranks: of its trainings."""
    run = make_small_run(folder)
    (folder / "own").mkdir()
    for name, width in (("1.png", 16), ("2.png", 300)):
        Image.linear_gradient("L").resize((width, 8)).convert("RGB").save(folder / "own" / name)
    return kind(run, ranks, Counter())


def _undisturbed(one: Pass, command: tuple[str, ...]) -> float:
    """Run a command to its end. Returns the seconds that it took."""
    began = time.monotonic()
    process = one.run.start_here(one.log, *command)
    process.join(_PATIENCE_S)
    if process.exitcode != 0:
        raise RuntimeError(f"{command[0]} ended with {process.exitcode}: {one.log.read_text()[-3000:]}")
    return time.monotonic() - began


def _killed_pass(one: Pass, times: list[float], chance: random.Random, end: float) -> str:
    """Kill each command again and again until it ends by itself. Returns what went wrong; empty: nothing."""
    for command, whole_s in zip(one.commands, times, strict=True):
        process: BaseProcess | None = None
        for number in count():
            if process is None:
                one.move(chance)
                process, is_hurt = one.run.start_here(one.log, *command), False
            kills = number < _MOST and (not number or time.monotonic() < end)  # the first one whatever the time
            process.join(chance.expovariate(_PARTS / whole_s) if kills else _PATIENCE_S)
            if process.exitcode == 0:
                break
            if process.exitcode is not None and is_hurt:
                process = None  # it could not do without the process that was killed
            elif process.exitcode is not None or not kills:
                return f"{command[0]} ended with {process.exitcode}: {one.log.read_text()[-3000:]}"
            elif chance.random() < _ALONE and _kill_one(process, chance):
                one.kills[f"one process, {one.stage(command)}"] += 1
                is_hurt = True
            else:
                one.kills[f"a command, {one.stage(command)}"] += 1
                _kill(process)
                process = None
    if "Traceback" in one.log.read_text():
        return f"a traceback in {one.log}"
    verified = one.run.call_here("verify", one.workspace)
    return verified.stdout + verified.stderr if verified.returncode else ""


def _kill(process: BaseProcess) -> None:
    """With all that it has started."""
    try:
        os.killpg(known(process.pid), signal.SIGKILL)
    except ProcessLookupError:  # it has not made its session yet
        process.kill()
    process.join()


def _kill_one(process: BaseProcess, chance: random.Random) -> bool:
    """One of the processes that a command has started. Returns whether there was one."""
    with suppress(psutil.NoSuchProcess):
        begun = psutil.Process(known(process.pid)).children(recursive=True)
        if begun:
            chance.choice(begun).kill()
        return bool(begun)
    return False


def _difference(found: dict[str, str], expected: dict[str, str]) -> str:
    """Which files differ; empty: none."""
    names = [name for name in expected.keys() | found.keys() if found.get(name) != expected.get(name)]
    return f"other bytes than those of an undisturbed run: {', '.join(sorted(names)[:10])}" if names else ""
