"""Training without the flows around it, for the tests that look at what it makes."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from deepfloyd_core.artifacts import Artifact, WorkDir, materialise
from deepfloyd_core.batches import Draws
from deepfloyd_core.config import Run, RunConfig
from deepfloyd_core.embeds import embeds_request, run_captions
from deepfloyd_core.flavours import FLAVOURS, Stage
from deepfloyd_core.jobs import Job, job_function, run_job
from deepfloyd_core.ledger import caption_counts
from deepfloyd_core.parent import find_parent
from deepfloyd_core.products import lora_request
from deepfloyd_core.projected import text_is_frozen, text_request
from deepfloyd_core.stage_loss import Fed, Setup
from deepfloyd_core.types import caption_id, no_report

FOLDERS = {1: Path(FLAVOURS["tiny-i"].repo), 2: Path(FLAVOURS["tiny-ii"].repo)}


def prepared(run: Run, stages: Any) -> dict[str, Artifact]:
    """Everything that training needs. `stages`: a DataWorld."""
    index = stages.index(run)
    made = {"image_index": index, "eval_set": stages.eval_set(run, index)}
    made |= {f"stage{stage}_pixels": stages.pixels(run, index, stage) for stage in run.config.stages}
    captions = run_captions(run, caption_counts(index))
    options = {"captions": captions, "encoder": str(FOLDERS[1])}
    made["text_embeds"], _ = materialise(
        run.workspace,
        embeds_request(run, captions, FOLDERS[1]),
        lambda work: run_here("embed", run.config, {}, options, work),
    )
    return made


def recipe_of_other_trainers(setup: Setup, x_0: torch.Tensor, draws: Draws, captions: list[str | None]) -> Fed:
    """concat(x_t, x_t) with the timestep as class label: SimpleTuner's, and that of diffusers' example for IF."""
    x_t = setup.scheduler.add_noise(x_0, draws.fed, draws.t)
    text = setup.texts([caption_id(name or "") for name in captions])
    return Fed(torch.cat([x_t, x_t], dim=1), draws.t, draws.t, text)


def stage_text(run: Run, stage: Stage, embeds: Artifact) -> Artifact:
    if not text_is_frozen(run.config.stage(stage)):
        return embeds
    options = {"stage": stage, "model": str(FOLDERS[stage])}
    request = text_request(run, stage, FOLDERS[stage], embeds)
    inputs = {"text_embeds": embeds}
    return materialise(run.workspace, request, lambda work: run_here("project", run.config, inputs, options, work))[0]


def run_here(name: str, config: RunConfig, inputs: dict[str, Artifact], options: dict[str, Any], work: WorkDir) -> Any:
    """A job in this process: a child takes 8 s to import torch."""
    with restored_sigterm():
        return job_function(name)(Job(config, inputs, options, work.path, no_report))


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
    how: Callable[..., Any] = run_job,
) -> Artifact:
    text = text or stage_text(run, stage, made["text_embeds"])
    inputs = {"pixels": made[f"stage{stage}_pixels"], "text": text, "eval_set": made["eval_set"]}
    parent = find_parent(run, stage, FOLDERS[stage])
    options = {"stage": stage, "model": str(FOLDERS[stage]), "prompts": list(run.config.prompts)}
    options["parent"] = parent.option if parent else None
    sha256 = parent.sha256 if parent else None
    request = lora_request(run, stage, FOLDERS[stage], inputs, run.config.prompts, sha256)
    return materialise(workspace, request, lambda work: how("train", run.config, inputs, options, work))[0]
