"""Trainings by several processes beside one: how far apart they end, samples a second, and what a process holds.

A LoRA and a UNet that is trained whole, on the tiny model: steps of six accumulated batches, by one, two and three processes
of one thread each, by turns. `apart` is the distance of the weights from those of one process, as a share of how far that
one learned. The memory is the most that the largest process held of its own, sampled. `--run`: the whole UNet of
`random:i-medium-400m`, a few steps, for its memory.
"""

import argparse
import platform
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import torch
from safetensors.torch import load_file
from train_step import RANK, make_run, training_job
from worlds import own_bytes

from deepfloyd_core.adapters.files import LORA_FILE, UNET_FOLDER
from deepfloyd_core.models.headers import UNET_WEIGHTS
from deepfloyd_core.processes.jobs import job_starter, run_together
from deepfloyd_core.store.artifacts import Request, WorkDir, materialise
from deepfloyd_core.training.jobs import TrainingSummary
from deepfloyd_core.types import no_report

WHOLE = f"{UNET_FOLDER}/{UNET_WEIGHTS}"
BATCHES = 6  # of a step
RANKS = 1, 2, 3


@dataclass(frozen=True)
class Case:
    """What is trained."""

    name: str
    model: str
    file: str  # of its weights
    keys: dict[str, Any]


CASES = (
    Case("LoRA", "tiny-i", LORA_FILE, {"lora_rank": RANK}),
    Case("whole UNet, FSDP2", "tiny-i", WHOLE, {"model_type": "full", "use_ema": True}),
)
REAL = (Case("whole UNet, FSDP2", "random:i-medium-400m", WHOLE, {"model_type": "full"}),)


@contextmanager
def largest_process() -> Iterator[list[int]]:
    """One number: the most that a process below this one held of its own inside the block."""
    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            peak[0] = max([peak[0], *(own_bytes(one.pid) for one in psutil.Process().children(recursive=True))])

    thread = threading.Thread(target=watch)
    thread.start()
    yield peak
    done.set()
    thread.join()


def trained(case: Case, steps: int, ranks: int) -> tuple[dict[str, torch.Tensor], TrainingSummary, int]:
    """The weights of a training, its summary, and the bytes of its largest process."""
    keys = {
        **case.keys,
        "max_train_steps": steps,
        "gradient_accumulation_steps": BATCHES,
        "validation_step_interval": 0,
    }
    with TemporaryDirectory() as made, largest_process() as peak, job_starter():
        run, folder = make_run(Path(made), case.model, "no", 2, "cpu", **keys)
        request = training_job(run, folder, no_report).request

        def build(work: WorkDir) -> TrainingSummary:
            return run_together(request.of_ranks(ranks), work, no_report)

        lora = materialise(run.workspace, Request("stage1_lora", 1, {"ranks": ranks}, {}), build)
        return load_file(lora.path / case.file), lora.summary(TrainingSummary), peak[0]


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The Euclidean distance of two sets of weights."""
    return float(sum(float((one[name].double() - other[name].double()).square().sum()) for name in one)) ** 0.5


def measured(case: Case, steps: int) -> None:
    """Print a line for each number of processes."""
    first = trained(case, 1, 1)[0]
    alone: dict[str, torch.Tensor] | None = None
    for ranks in RANKS:
        weights, summary, peak = trained(case, steps, ranks)
        alone = alone or weights
        apart = distance(weights, alone) / distance(alone, first)
        cells = [case.name, case.model, str(steps), str(ranks), f"{apart:.1e}", f"{summary.samples_per_s:.2f}",
                 f"{peak / 2**30:.2f}"]  # fmt: skip
        print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--run", action="store_true", help="a real size too: 24 GB of memory")
    asked = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}\n")
    heads = ("trained", "model", "steps", "processes", "apart", "samples/s", "largest process, GiB")
    print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    for case in CASES:
        measured(case, asked.steps)
    for case in REAL if asked.run else ():
        measured(case, 2)


if __name__ == "__main__":
    main()
