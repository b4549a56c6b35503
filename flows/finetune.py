"""The main flow: from a folder of captioned pictures to a published bundle. Each line makes one artifact."""

from pathlib import Path

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Completed

from deepfloyd_core.bundle.planned import sample_prompts
from deepfloyd_core.config.run import Run
from deepfloyd_core.preflight.load import load_run
from deepfloyd_core.processes.jobs import job_starter
from deepfloyd_core.store.artifacts import Artifact
from deepfloyd_core.store.versions import Version, current, news_of
from tasks import VERSION
from tasks.cascade_samples import cascade_samples
from tasks.conditioning import conditioning
from tasks.eval_set import eval_set
from tasks.image_index import image_index
from tasks.lora_bundle import lora_bundle, publish_version
from tasks.outbox import server_awaited
from tasks.runners import reach_workers
from tasks.stage2_low_res import low_res
from tasks.stage_lora import check_models, stage_lora
from tasks.stage_pixels import stage_pixels
from tasks.stage_text import stage_text
from tasks.text_embeds import text_embeds


@flow(name="finetune", version=VERSION)
@server_awaited
def finetune(config: str, overrides: list[str] | None = None) -> "State[Version]":
    """Fine-tune the stages that CONFIG names and publish the result: as a new version, unless it is the current one's."""
    run = load_run(Path(config), tuple(overrides or ()))
    before = current(run.workspace)
    check_models(run, run.config.stages)
    reach_workers(run)
    version = make_bundle(run, image_index(run))
    return Completed(message=news_of(run.workspace, version, before), data=version)


@job_starter()
def make_bundle(run: Run, index: Artifact) -> Version:
    """Everything after the index; what is already there is reused. Pictures come first: T5 takes long, and they may fail."""
    pixels = {stage: stage_pixels(run, index, stage) for stage in run.config.stages}
    held_out = eval_set(run, index)
    embeds = text_embeds(run, index)
    prompts = sample_prompts(run, index)
    follow = conditioning(run, index, pixels, held_out)
    loras: dict[str, Artifact] = {}
    for stage in run.config.stages:
        inputs = {"pixels": pixels[stage], "text": stage_text(run, stage, embeds), "eval_set": held_out}
        inputs |= follow if stage == 1 else low_res(run, pixels[2], loras.get("stage1_lora"), embeds)
        loras[f"stage{stage}_lora"] = stage_lora(run, stage, inputs, prompts)
    samples = cascade_samples(run, prompts, {"text_embeds": embeds, "eval_set": held_out, **follow, **loras})
    bundle = lora_bundle(run, prompts, {"image_index": index, "cascade_samples": samples, **loras})
    return publish_version(run, bundle, index)
