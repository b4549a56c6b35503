"""Trainings by several processes, and what kills one of these."""

import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import psutil
from data_world import DataWorld
from training_parts import prepared, stage_text, train_stage

from deepfloyd_core.config.run import Run
from deepfloyd_core.config.stages import Stage
from deepfloyd_core.processes.jobs import run_together
from deepfloyd_core.store.artifacts import Artifact, WorkDir
from deepfloyd_core.training.jobs import TrainingSummary, TrainRequest
from deepfloyd_core.types import no_report

COMMON = {"train_batch_size": 2, "max_train_steps": 4, "mixed_precision": "no", "learning_rate": 1e-3,
          "checkpoint_step_interval": 1, "validation_step_interval": 2,
          "validation_num_inference_steps": 2}  # fmt: skip


def small(world: DataWorld, stage: Stage, **keys: Any) -> tuple[Run, dict[str, Artifact]]:
    """Noise of two sizes, seven and five pictures with one held out: full batches, and short ones."""
    rng, scale = np.random.default_rng(0), stage**2
    for number, width in enumerate([64] * 7 + [96] * 5):
        world.add(f"{number}.png", rng.integers(0, 256, (64 * scale, width * scale, 3), np.uint8), f"caption {number}")
    settings = {**COMMON, **keys, "model_flavour": f"tiny-{'i' * stage}"}
    run = world.load(
        stages=(stage,), num_threads=1, text_encoder_dtype="fp32", device="cpu", **{f"stage{stage}": settings}
    )
    made = prepared(run, world)
    return run, made | {"text": stage_text(run, stage, made["text_embeds"])}


def with_ranks(run: Run, **keys: Any) -> Run:
    return replace(run, config=run.config.model_copy(update=keys))


def with_stage(run: Run, **keys: Any) -> Run:
    """The run with other settings of Stage I."""
    return with_ranks(run, stage1=run.config.stage(1).model_copy(update=keys))


def by_ranks(count: int) -> Callable[[TrainRequest, WorkDir], TrainingSummary]:
    return lambda request, work: run_together(request.of_ranks(count), work, no_report)


def train(run: Run, made: dict[str, Artifact], stage: Stage, workspace: Path, ranks: int) -> Artifact:
    return train_stage(run, made, stage, workspace, made["text"], how=by_ranks(ranks))


class Killer:
    """Sends a signal to a rank after its first steps, in each of its first lives."""

    def __init__(self, workspace: Path, rank: int, times: int, number: int = signal.SIGKILL) -> None:
        self._workspace, self._rank, self._times, self._number = workspace, rank, times, number
        self._thread = threading.Thread(target=self._run)
        self._ended = threading.Event()
        self.addresses = set[str]()  # on which it listens

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        suffix = f"-{self._rank}" if self._rank else ""
        killed = set[int]()
        while len(killed) < self._times and not self._ended.is_set():
            time.sleep(0.02)
            for log in self._workspace.glob(f"stage1_lora/*/.job-train{suffix}.log"):
                for pid in writers_of(log) - killed:
                    if len(killed) < self._times and is_stepping(log.with_name(".job-train.progress")):
                        self.addresses |= listening(pid)
                        os.kill(pid, self._number)
                        killed.add(pid)


def listening(pid: int) -> set[str]:
    """The addresses on which a process waits for connections."""
    found = psutil.Process(pid).net_connections("tcp")
    return {one.laddr.ip for one in found if one.status == psutil.CONN_LISTEN}


def is_stepping(progress: Path) -> bool:
    """Whether a checkpoint was written since the try began: a step is reported before its checkpoint."""
    return progress.exists() and progress.read_text().count("grad") > 1


def writers_of(log: Path) -> set[int]:
    """The processes whose output goes to a log."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if (entry / "fd" / "1").readlink() == log:
                    found.add(int(entry.name))
            except OSError:  # it is over
                continue
    return found
