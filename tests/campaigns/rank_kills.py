"""SIGKILLs of ranks of a training at random moments: what it leaves has the bytes of an undisturbed training.

The flow's part is played by this process: a training that is given up, because its ranks were killed twice, is started
again. Every second training goes on with another number of ranks each time it is started.
"""

import logging
import os
import random
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from data_world import DataWorld
from ranked import small, train
from rows import Row

from deepfloyd_core.config.run import Run
from deepfloyd_core.errors import JobError
from deepfloyd_core.processes.jobs import job_starter
from deepfloyd_core.processes.pool import Children, Limits
from deepfloyd_core.store.artifacts import Artifact

SHARE = 1
RANKS = 2
_STAGE = {"lora_rank": 4, "lora_dropout": 0.1, "use_ema": True, "gradient_accumulation_steps": 2, "max_train_steps": 24,
          "checkpoint_step_interval": 2, "validation_step_interval": 8}  # fmt: skip
_PARTS = 4  # of a training's time: the mean time between two kills is one of them
_MOST = 20  # kills of a training, after which it is left to end


def attack(seconds: float, seed: int, folder: Path) -> list[Row]:
    """Trainings until the time is over, at least one."""
    logging.disable(logging.CRITICAL)
    end, number, kills, chance = time.monotonic() + seconds, 0, 0, random.Random(seed)
    failures: list[str] = []
    with Children(1, Limits(), ("deepfloyd_core.index.index",)) as children, job_starter():
        run, made = small(DataWorld(folder / "data", children), 1, **_STAGE)
        train(run, made, 1, folder / "first", RANKS)  # what is loaded once is not measured
        began = time.monotonic()
        whole = train(run, made, 1, folder / "whole", RANKS)
        mean_s = (time.monotonic() - began) / _PARTS
        while not number or time.monotonic() < end:
            workspace = folder / str(number)
            ranks = [RANKS] if number % 2 == 0 else [1, RANKS]
            with _killer(mean_s, random.Random(f"{seed}/{number}")) as killed:
                fault = _difference(_ended(run, made, workspace, ranks, chance), whole)
            kills += len(killed)
            if fault:
                failures.append(f"training {number} of seed {seed}: {fault}\n    {workspace}")
            else:
                shutil.rmtree(workspace)
            number += 1
    return [
        Row("kills of a rank of a training", kills, 0, []),
        Row("trainings with killed ranks, every byte compared", number, len(failures), failures),
    ]


def _ended(
    run: Run, made: dict[str, Artifact], workspace: Path, ranks: list[int], chance: random.Random
) -> Artifact | str:  # fmt: skip
    """What a training comes to that is started again whenever its ranks were killed, with one of some numbers of ranks. A
    text: the error that it ended with.
    """
    while True:
        try:
            return train(run, made, 1, workspace, chance.choice(ranks))
        except JobError as error:
            if "was killed by SIGKILL, twice" not in str(error):
                return str(error)


@contextmanager
def _killer(mean_s: float, chance: random.Random) -> Iterator[list[int]]:
    """In this block a rank is killed now and then. Yields the process ids of those that were."""
    over, killed = threading.Event(), list[int]()

    def kill() -> None:
        while len(killed) < _MOST and not over.wait(chance.expovariate(1 / mean_s)):
            ranks = [one for one in psutil.Process().children(recursive=True) if _is_rank(one)]
            if ranks:
                victim = chance.choice(ranks)
                with suppress(psutil.NoSuchProcess):
                    victim.kill()
                    killed.append(victim.pid)

    thread = threading.Thread(target=kill)
    thread.start()
    yield killed
    over.set()
    thread.join()


def _is_rank(process: psutil.Process) -> bool:
    """Whether it was started by the starter of jobs, and not by this process."""
    with suppress(psutil.NoSuchProcess):
        return bool(process.ppid() != os.getpid() and process.status() != psutil.STATUS_ZOMBIE)
    return False


def _difference(found: Artifact | str, whole: Artifact) -> str:
    if isinstance(found, str):
        return found
    names = [name for name, digest in whole.hashes.items() if found.hashes.get(name) != digest]
    return f"other bytes than those of an undisturbed training: {', '.join(names)}" if names else ""
