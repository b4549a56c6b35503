"""One flow for each stage of the pipeline, for those who want to run or schedule them apart."""

from pathlib import Path

from prefect import flow

from deepfloyd_core.bundle.planned import sample_prompts
from deepfloyd_core.config.flavours import Stage
from deepfloyd_core.config.run import Run
from deepfloyd_core.preflight.load import load_run
from deepfloyd_core.processes.jobs import job_starter
from deepfloyd_core.store.artifacts import Artifact
from tasks import VERSION
from tasks.conditioning import conditioning
from tasks.eval_set import eval_set
from tasks.image_index import image_index
from tasks.outbox import server_awaited
from tasks.runners import reach_workers
from tasks.stage2_low_res import low_res
from tasks.stage_lora import check_models, stage_lora
from tasks.stage_pixels import stage_pixels
from tasks.stage_text import stage_text
from tasks.text_embeds import text_embeds


@flow(name="prepare", version=VERSION)
@server_awaited
def prepare(config: str, overrides: list[str] | None = None) -> list[Artifact]:
    """Index the pictures and cut the crops of every stage, the eval set, and what a ControlNet follows for both."""
    run = load_run(Path(config), tuple(overrides or ()))
    reach_workers(run)
    index = image_index(run)
    pixels = {stage: stage_pixels(run, index, stage) for stage in run.config.stages}
    held_out = eval_set(run, index)
    follow = conditioning(run, index, pixels, held_out)
    return [index, *pixels.values(), held_out, *follow.values()]


@flow(name="embed", version=VERSION)
@server_awaited
def embed(config: str, overrides: list[str] | None = None) -> list[Artifact]:
    """Encode every caption and prompt."""
    run = load_run(Path(config), tuple(overrides or ()))
    index = image_index(run)
    return [index, text_embeds(run, index)]


@flow(name="train-stage1", version=VERSION)
@server_awaited
def train_stage1(config: str, overrides: list[str] | None = None) -> list[Artifact]:
    """Train the Stage I LoRA, and make what it needs."""
    return _train(load_run(Path(config), tuple(overrides or ())), 1)


@flow(name="train-stage2", version=VERSION)
@server_awaited
def train_stage2(config: str, overrides: list[str] | None = None) -> list[Artifact]:
    """Train the Stage II LoRA, and make what it needs: Stage I's as well, where that makes low-res pictures for it."""
    return _train(load_run(Path(config), tuple(overrides or ())), 2)


@job_starter()
def _train(run: Run, stage: Stage) -> list[Artifact]:
    run.config.stage(stage)  # a run without this stage fails here, before anything is made
    stages: tuple[Stage, ...] = (1, 2) if stage == 2 and run.config.remakes_low_res else (stage,)
    check_models(run, stages)
    reach_workers(run)
    index = image_index(run)
    pixels = {each: stage_pixels(run, index, each) for each in stages}
    held_out = eval_set(run, index)
    embeds = text_embeds(run, index)
    made = [index, embeds]
    loras: dict[str, Artifact] = {}
    for each in stages:
        inputs = {"pixels": pixels[each], "text": stage_text(run, each, embeds), "eval_set": held_out}
        if each == 1:
            inputs |= conditioning(run, index, {1: pixels[1]}, held_out)
        else:
            inputs |= low_res(run, pixels[2], loras.get("stage1_lora"), embeds)
        loras[f"stage{each}_lora"] = stage_lora(run, each, inputs, sample_prompts(run, index))
        made += [*inputs.values(), loras[f"stage{each}_lora"]]
    return list(dict.fromkeys(made))  # the text can be the embeds themselves
