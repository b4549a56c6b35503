"""The cases of groups b and d: the product's trainer at real sizes, its memory and speed, idle share, and compiled."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from gpu_plan import Asked, Yields
from gpu_world import GIB, Watched, bare_folder, peak_memory, release, run_of, watched, weights_in_memory
from train_step import plain

from deepfloyd_core.config.flavours import FLAVOURS

STEPS = {"cuda": (16, 4), "cpu": (1, 1)}  # timed, and looked at for idle time


def training(asked: Asked, flavour: str, **keys: Any) -> Yields:
    """Peak memory, samples/s and idle share of a training."""
    batch, (steps, profiled) = _batch(asked), STEPS[asked.device]
    folder = bare_folder(asked, flavour)
    run = run_of(asked, folder, FLAVOURS[flavour].stage, batch, **keys)
    with weights_in_memory(asked.device), peak_memory(asked.device) as peak:
        found = watched(asked, run, folder, steps, profiled)
        yield "peak memory", *peak()
    yield "samples/s", batch / float(np.median(found.seconds)), _spread(found)
    yield "card idle", 100 * found.idle, f"of {profiled} steps"


def lora(asked: Asked, flavour: str, **keys: Any) -> Yields:
    """The same, and a plain loop beside it: everything in fp32, T5's rows in every step."""
    rate = 0.0
    for what, value, note in training(asked, flavour, **keys):
        rate = value if what == "samples/s" else rate
        yield what, value, note
    batch, (steps, _), folder = _batch(asked), STEPS[asked.device], bare_folder(asked, flavour)
    run = run_of(asked, folder, 1, batch, **keys)
    with weights_in_memory(asked.device):
        found = watched(replace(asked, any_kernels=True), run, folder, steps)
        yield "samples/s by any kernels", batch / float(np.median(found.seconds)), _spread(found)
    with weights_in_memory(asked.device), peak_memory(asked.device) as peak:
        seconds, _ = plain(run, folder, steps)
        yield "plain loop: peak memory", *peak()
    theirs = batch / float(np.median(seconds))
    yield "plain loop: samples/s", theirs, ""
    yield "times the plain loop", rate / theirs, ""


def compiled(asked: Asked, flavour: str, **keys: Any) -> Yields:
    """The loss of the first step, what compiling takes and what it gains. On the CPU it is traced alone."""
    batch, (steps, _), folder = max(2, _batch(asked)), STEPS[asked.device], bare_folder(asked, flavour)
    backend = "inductor" if asked.device == "cuda" else "aot_eager"
    ways = []
    with weights_in_memory(asked.device):
        for keys_of_way in ({}, {"dynamo_backend": backend}):
            run = run_of(asked, folder, 1, batch, **keys, **keys_of_way)
            ways.append(watched(asked, run, folder, steps))
            release()
    as_is, found = ways
    yield "loss, off by", abs(found.losses[0] / as_is.losses[0] - 1), backend
    yield "first step", found.first_s, f"{as_is.first_s:.1f} s as it is"
    rates = [batch / float(np.median(way.seconds)) for way in ways]
    yield "samples/s", rates[1], f"{rates[0]:.2f} as it is"
    yield "times the step that is not compiled", rates[1] / rates[0], ""


def _batch(asked: Asked) -> int:
    return 1 if asked.tiny else 4


def _spread(found: Watched) -> str:
    of = sorted(found.seconds)
    held = f", {torch.cuda.memory_allocated() / GIB:.2f} GiB held" if torch.cuda.is_initialized() else ""
    return f"a step {of[0] * 1e3:.0f} to {of[-1] * 1e3:.0f} ms, the first {found.first_s:.1f} s{held}"
