"""The LoRA of a stage, trained in a process of its own."""

from prefect import task
from prefect.cache_policies import NO_CACHE

from deepfloyd_core.artifacts import Artifact, materialise
from deepfloyd_core.config import Run
from deepfloyd_core.flavours import Stage, resolve
from deepfloyd_core.jobs import run_job
from deepfloyd_core.products import lora_request, shares
from tasks.progress import progress
from tasks.publish import publish_pictures


@task(name="stage_lora", task_run_name="stage{stage}_lora", cache_policy=NO_CACHE)
def stage_lora(run: Run, stage: Stage, inputs: dict[str, Artifact]) -> Artifact:
    """inputs: pixels, text, eval_set. The result loads in diffusers' stock pipeline."""
    folder = resolve(run.config.stage(stage).model, stage)
    options = {"stage": stage, "model": str(folder), "shares": shares(run)}
    with progress(f"stage {'I' * stage} LoRA") as report:
        lora, _ = materialise(
            run.workspace,
            lora_request(run, stage, folder, inputs),
            lambda work: run_job("train", run.config, inputs, options, work, report),
        )
    publish_pictures(lora, "loss.png")
    return lora
