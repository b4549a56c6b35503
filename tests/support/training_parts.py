"""Training without the flows around it, for the tests that look at what it makes."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

import numpy as np
import pytest
import torch
from data_world import DataWorld
from PIL import Image
from safetensors.torch import load_file
from small_run import SmallRun

from deepfloyd_core.adapters.files import LORA_FILE
from deepfloyd_core.adapters.start_from import find_parent
from deepfloyd_core.bundle.planned import planned_bundle
from deepfloyd_core.config.flavours import FLAVOURS
from deepfloyd_core.config.run import Run
from deepfloyd_core.config.stages import Stage
from deepfloyd_core.hashing import caption_id
from deepfloyd_core.index.ledger import caption_counts
from deepfloyd_core.preflight.load import load_run
from deepfloyd_core.processes.jobs import Job, JobRequest, imported, run_job
from deepfloyd_core.store.artifacts import Artifact, WorkDir, materialise
from deepfloyd_core.store.manifest import Summary
from deepfloyd_core.text.embeds import embeds_request, encode_job, run_captions
from deepfloyd_core.text.projection import project_job, text_is_frozen, text_request
from deepfloyd_core.training import eval_loss as held_out
from deepfloyd_core.training import steps as loop
from deepfloyd_core.training.batches import Draws
from deepfloyd_core.training.forward import TrainingContext, UNetInput
from deepfloyd_core.training.identity import lora_request
from deepfloyd_core.training.jobs import TrainingInputs, TrainingSummary, TrainRequest, train_job
from deepfloyd_core.types import Report, no_report

S = TypeVar("S", bound=Summary)
FOLDERS = {1: Path(FLAVOURS["tiny-i"].repo), 2: Path(FLAVOURS["tiny-ii"].repo)}
ONE_TIMESTEP = held_out.TIMESTEPS[1:2]  # held-out losses at all of them would be half of a small training


def prepared(run: Run, stages: DataWorld) -> dict[str, Artifact]:
    """Everything that training needs."""
    index = stages.index(run)
    made = {"image_index": index, "eval_set": stages.eval_set(run, index)}
    made |= {f"stage{stage}_pixels": stages.pixels(run, index, stage) for stage in run.config.stages}
    captions = run_captions(run, caption_counts(index))
    made["text_embeds"] = materialise(
        run.workspace,
        embeds_request(run, captions, FOLDERS[1]),
        lambda work: run_here(encode_job(run, captions, FOLDERS[1]), work),
    )
    return made


def recipe_of_other_trainers(
    context: TrainingContext, x_0: torch.Tensor, draws: Draws, captions: list[str | None], *_: None
) -> UNetInput:
    """concat(x_t, x_t) with the timestep as class label: SimpleTuner's, and that of diffusers' example for IF."""
    x_t = context.scheduler.add_noise(x_0, draws.fed, draws.t)
    text = context.texts([caption_id(name or "") for name in captions])
    return UNetInput(draws.cut(torch.cat([x_t, x_t], dim=1)), draws.t, draws.t, text)


def stage_text(run: Run, stage: Stage, embeds: Artifact) -> Artifact:
    if not text_is_frozen(run.config.stage(stage)):
        return embeds
    request = text_request(run, stage, FOLDERS[stage], embeds)
    return materialise(
        run.workspace, request, lambda work: run_here(project_job(run, stage, FOLDERS[stage], embeds), work)
    )


def run_here(request: JobRequest[S], work: WorkDir, report: Report = no_report) -> S:
    """A job in this process: a child takes 8 s to import torch. Its held-out losses are at one timestep."""
    with restored_sigterm(), patch.object(held_out, "TIMESTEPS", ONE_TIMESTEP):
        made: S = imported(request.entry)(Job(request, work.path, report))
        return made


@contextmanager
def restored_sigterm() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def train_stage(
    run: Run,
    made: dict[str, Artifact],
    stage: Stage,
    workspace: Path,
    text: Artifact | None = None,
    how: Callable[[TrainRequest, WorkDir], TrainingSummary] = run_job,
) -> Artifact:
    text = text or stage_text(run, stage, made["text_embeds"])
    low_res = made["stage2_low_res"] if run.config.stage(stage).remakes_low_res else None
    pixels = made[f"stage{stage}_pixels"]
    inputs = TrainingInputs(pixels=pixels, text=text, eval_set=made["eval_set"], low_res=low_res)
    found, prompts = find_parent(run, stage, FOLDERS[stage]), run.config.prompts
    parent = found.pinned if found else None
    request = lora_request(run, stage, FOLDERS[stage], inputs, prompts, parent.sha256 if parent else None)
    job = train_job(run, stage, FOLDERS[stage], inputs, prompts, parent)
    return materialise(workspace, request, lambda work: how(job, work))


def weights(lora: Artifact) -> dict[str, torch.Tensor]:
    """Those that begin at zero: the others' random start is far larger than what a few steps add."""
    loaded: dict[str, torch.Tensor] = load_file(lora.path / LORA_FILE)
    return {name: tensor for name, tensor in loaded.items() if "lora_B" in name}


def difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """Between two sets of tensors: the length of what differs, beside that of all."""
    assert first.keys() == second.keys() and first
    squares = [((first[name] - second[name]).square().sum(), first[name].square().sum()) for name in first]
    apart, whole = (float(sum(each)) for each in zip(*squares, strict=True))
    return float((apart / whole) ** 0.5)


def resized(channel: np.ndarray, width: int, height: int) -> np.ndarray:
    """Pillow's bicubic of one channel, float32 (H, W)."""
    return np.asarray(Image.fromarray(channel, "F").resize((width, height), Image.Resampling.BICUBIC))


def break_in_step(monkeypatch: pytest.MonkeyPatch, number: int) -> list[int]:
    """Make training fail the first time that it comes to a step, from 0. Returns the steps that were begun, as they are."""
    real, begun = loop.take_step, list[int]()

    def breaks(*args: Any, **named: Any) -> Any:
        begun.append(args[-1])
        if args[-1] == number and begun.count(number) == 1:
            raise RuntimeError("broken")
        return real(*args, **named)

    monkeypatch.setattr(loop, "take_step", breaks)
    return begun


def forked(
    run: Run, made: dict[str, Artifact], workspace: Path, stage: Stage = 1
) -> "multiprocessing.process.BaseProcess":
    """The training in a process of its own, which need not import torch again."""
    process = multiprocessing.get_context("fork").Process(
        target=train_stage, args=(run, made, stage, workspace), kwargs={"how": run_here}
    )
    process.start()
    return process


def newest_checkpoint(workspace: Path) -> int:
    """Its step, 0 without one."""
    records = workspace.glob("stage*_lora/*/.checkpoints/*/checkpoint.json")
    return max((int(path.parent.name.removeprefix("step-")) for path in records), default=0)


def train_and_kill(run: Run, made: dict[str, Artifact], stage: Stage, workspace: Path, after_steps: int) -> None:
    """SIGKILL a training once it has a checkpoint this many steps beyond those it started with."""
    first, process = newest_checkpoint(workspace), forked(run, made, workspace, stage)
    while process.is_alive() and newest_checkpoint(workspace) - first < after_steps:
        time.sleep(0.01)
    assert process.is_alive(), "it was over before it could be killed"
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL


def planned_name(run: SmallRun, keys: Sequence[str]) -> str:
    """The bundle that a small run would make with some `--set=KEY=VALUE`, by its index and settings alone."""
    loaded = load_run(run.config, tuple(key.removeprefix("--set=") for key in keys))
    (path,) = (run.workspace / "image_index").iterdir()
    planned = planned_bundle(loaded, Artifact("image_index", path.name, path))
    assert planned is not None
    return planned.name
