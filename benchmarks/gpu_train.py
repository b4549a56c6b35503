"""A step of training on a GPU: peak memory, samples a second beside a plain loop, and how long the card waits.

Ours is the product's trainer in bf16, `plain` the loop of `train_step.py` (float32, T5's rows in every step) with the
same model, batch and pictures. Each runs in a process of its own; memory is torch's own count. The card's idle share is
the part of some further steps' wall time in which none of its kernels ran, by torch's profiler. `random:` weights have
the real architecture; writing them takes minutes once. Without a GPU there is nothing to measure.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import numpy as np
import torch
import train_step
from train_step import RANK, make_run, ours, plain

LORA = {"lora_rank": RANK}
FULL = {"model_type": "full", "optimizer": "adamw_bf16"}
GIB = 2**30


class Case(NamedTuple):
    """What is trained."""

    model: str
    stage: Any
    keys: dict[str, Any]
    batch: int
    goal_gib: float
    beside_plain: bool  # there is a plain loop for it


CASES = (
    Case("random:i-medium-400m", 1, LORA, 4, 6, True),
    Case("random:i-medium-400m", 1, {**LORA, "gradient_checkpointing": True}, 4, 6, False),
    Case("random:i-medium-400m", 1, {**FULL, "gradient_checkpointing": True}, 4, 12, False),
    Case("random:ii-medium-450m", 2, {**LORA, "gradient_checkpointing": True}, 4, 12, False),
    Case("random:i-xlarge-4.3b", 1, {**LORA, "gradient_checkpointing": True}, 4, 16, False),
    Case(
        "random:i-xlarge-4.3b", 1, {**LORA, "gradient_checkpointing": True, "base_model_precision": "nf4"}, 4, 10, False
    ),
)
TRIED = (
    Case("tiny-i", 1, LORA, 2, 1, True),
    Case("tiny-i", 1, {"model_type": "full"}, 2, 1, False),
    Case("tiny-ii", 2, LORA, 1, 1, False),
)


def child(way: str, case: Case, steps: int, device: str) -> None:
    """One way in this process. Prints one JSON line."""
    torch.set_num_threads(1 if device == "cpu" else 4)
    with tempfile.TemporaryDirectory() as name:
        run, folder = make_run(Path(name), case.model, "bf16" if device == "cuda" else "no", case.batch, device,
                               case.stage, **case.keys)  # fmt: skip
        seconds, _ = (ours if way == "ours" else plain)(run, folder, steps)
        memory = torch.cuda.max_memory_allocated() if device == "cuda" else 0
        idle = idle_share(lambda: ours(run, folder, steps), steps, device) if way == "ours" else 0.0
    print(json.dumps({"seconds": seconds, "bytes": memory, "idle": idle}))


def idle_share(call: Any, steps: int, device: str) -> float:
    """Share of the wall time of the last half of a call's steps in which no kernel ran (on the CPU: no operation)."""
    from torch.profiler import ProfilerActivity, profile, schedule

    activity = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
    found: list[float] = []

    def read(profiler: Any) -> None:
        kernels = [event for event in profiler.events() if event.device_type.name == activity.name]
        spans = sorted((event.time_range.start, event.time_range.end) for event in kernels)
        busy, reached = 0.0, spans[0][0]
        for start, end in spans:
            busy += max(0.0, end - max(start, reached))
            reached = max(reached, end)
        found.append(1 - busy / (reached - spans[0][0]))

    before = train_step.clock
    first = steps // 2
    with profile(
        activities=[activity],
        schedule=schedule(wait=first - 1, warmup=1, active=steps - first, repeat=1),
        on_trace_ready=read,
    ) as on:

        def clock() -> float:  # called once a step, and here without waiting for the card, as a run does
            on.step()
            return time.perf_counter()

        train_step.clock = clock
        try:
            call()
        finally:
            train_step.clock = before
    return found[0]


def measured(way: str, number: int, wanted: argparse.Namespace) -> dict[str, Any]:
    """Run one way in a process of its own."""
    command = [sys.executable, __file__, "--child", way, "--case", str(number), "--steps", str(wanted.steps),
               "--device", wanted.device]  # fmt: skip
    out = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
    return dict(json.loads(out.splitlines()[-1]))


def main() -> None:
    """Print the machine, and a row for each case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20, help="that are timed, 4 at least")
    parser.add_argument("--case", type=int, help="this one alone, counted from 0")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu tries the benchmark itself")
    parser.add_argument("--child", choices=train_step.WAYS, help=argparse.SUPPRESS)
    wanted = parser.parse_args()
    cases = CASES if wanted.device == "cuda" else TRIED
    if wanted.child:
        child(wanted.child, cases[wanted.case], wanted.steps, wanted.device)
        return
    if wanted.device == "cuda" and not torch.cuda.is_available():
        print("Skipped: needs a CUDA GPU, and none is here.")
        return
    card = torch.cuda.get_device_name() if wanted.device == "cuda" else "CPU"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, CUDA {torch.version.cuda}"
    print(f"{card}, {platform.machine()}, {os.cpu_count()} cores; {versions}, diffusers {diffusers.__version__}\n")
    heads = ("model", "trained", "batch", "peak, GiB", "goal, GiB", "samples/s", "plain: samples/s", "plain: peak, GiB",
             "card idle")  # fmt: skip
    print(f"| {' | '.join(heads)} |\n" + "|---" * len(heads) + "|")
    for number, case in enumerate(cases):
        if wanted.case in (None, number):
            rows = {
                way: measured(way, number, wanted) for way in ("ours", "plain") if way == "ours" or case.beside_plain
            }
            print(f"| {' | '.join(columns(case, rows))} |", flush=True)


def columns(case: Case, rows: dict[str, dict[str, Any]]) -> list[str]:
    """The cells of a case."""
    rate = {way: f"{case.batch / float(np.median(row['seconds'])):.2f}" for way, row in rows.items()}
    peak = {way: f"{row['bytes'] / GIB:.2f}" for way, row in rows.items()}
    keys = ", ".join(f"{name} = {value}" for name, value in case.keys.items())
    beside = [rate.get("plain", ""), peak.get("plain", "")]
    return [case.model, keys, str(case.batch), peak["ours"], f"{case.goal_gib:g}", rate["ours"], *beside,
            f"{rows['ours']['idle']:.0%}"]  # fmt: skip


if __name__ == "__main__":
    main()
