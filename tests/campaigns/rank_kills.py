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

import numpy as np
import psutil
from data_world import DataWorld
from rows import Row
from training_parts import prepared, stage_text, train_stage

from deepfloyd_core.config.run import Run
from deepfloyd_core.errors import JobError
from deepfloyd_core.processes.jobs import job_starter, run_together
from deepfloyd_core.processes.pool import Children, Limits
from deepfloyd_core.store.artifacts import Artifact, WorkDir
from deepfloyd_core.training.jobs import TrainingSummary, TrainRequest
from deepfloyd_core.types import no_report

SHARE = 1
RANKS = 2
_RUN = {
    "mixed_precision": "no", "text_encoder_dtype": "fp32", "device": "cpu", "num_threads": 1, "validation_prompt": "a star",
    "num_validation_images": 1,
}  # fmt: skip
_STAGE = {
    "model_flavour": "tiny-i", "lora_rank": 4, "lora_dropout": 0.1, "use_ema": True, "learning_rate": 1e-3,
    "train_batch_size": 2, "gradient_accumulation_steps": 2, "max_train_steps": 24, "checkpoint_step_interval": 2,
    "validation_step_interval": 8, "validation_num_inference_steps": 2,
}  # fmt: skip
_PARTS = 4  # of a training's time: the mean time between two kills is one of them
_MOST = 20  # kills of a training, after which it is left to end


def attack(seconds: float, seed: int, folder: Path) -> list[Row]:
    """Trainings until the time is over, at least one."""
    logging.disable(logging.CRITICAL)
    end, number, kills, chance = time.monotonic() + seconds, 0, 0, random.Random(seed)
    failures: list[str] = []
    with Children(1, Limits(), ("deepfloyd_core.index.index",)) as children, job_starter():
        run, made = _world(folder / "data", children)
        _trained(run, made, folder / "first", RANKS)  # what is loaded once is not measured
        began = time.monotonic()
        whole = _trained(run, made, folder / "whole", RANKS)
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


def _world(folder: Path, children: Children) -> tuple[Run, dict[str, Artifact]]:
    """Noise of two sizes, and what a training of Stage I needs of it."""
    world, rng = DataWorld(folder, children), np.random.default_rng(1)
    for number, width in enumerate([64] * 7 + [96] * 5):
        world.add(f"{number}.png", rng.integers(0, 256, (64, width, 3), np.uint8), f"caption {number}")
    run = world.load(stages=(1,), **_RUN, stage1=_STAGE)
    made = prepared(run, world)
    return run, made | {"text": stage_text(run, 1, made["text_embeds"])}


def _trained(run: Run, made: dict[str, Artifact], workspace: Path, ranks: int) -> Artifact:
    def how(request: TrainRequest, work: WorkDir) -> TrainingSummary:
        return run_together(request.of_ranks(ranks), work, no_report)

    return train_stage(run, made, 1, workspace, made["text"], how=how)


def _ended(
    run: Run, made: dict[str, Artifact], workspace: Path, ranks: list[int], chance: random.Random
) -> Artifact | str:  # fmt: skip
    """What a training comes to that is started again whenever its ranks were killed, with one of some numbers of ranks. A
    text: the error that it ended with.
    """
    while True:
        try:
            return _trained(run, made, workspace, chance.choice(ranks))
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
