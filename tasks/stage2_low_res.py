"""Stage I's remakes of Stage II's low-res pictures, sampled in a process of its own."""

from prefect import task
from prefect.cache_policies import NO_CACHE

from deepfloyd_core.config.run import Run
from deepfloyd_core.crops.pixels import SHEET
from deepfloyd_core.models.folders import resolve
from deepfloyd_core.processes.jobs import run_job
from deepfloyd_core.sampling.identity import low_res_request
from deepfloyd_core.store.artifacts import Artifact, materialise
from tasks.progress import progress
from tasks.publish import publish_pictures


@task(name="stage2_low_res", cache_policy=NO_CACHE)
def stage2_low_res(run: Run, inputs: dict[str, Artifact]) -> Artifact:
    """inputs: pixels (of Stage II), stage1_lora, text_embeds. The sheet shows true low-res pictures and their remakes."""
    folder = resolve(run.config.stage(1).model, 1)
    options = {"model": str(folder)}
    with progress("stage II low-res") as report:
        remakes = materialise(
            run.workspace,
            low_res_request(run, folder, inputs),
            lambda work: run_job("remake", run.config, inputs, options, work, report),
        )
    publish_pictures(remakes, SHEET)
    return remakes


def low_res(run: Run, pixels: Artifact, stage1_lora: Artifact | None, embeds: Artifact) -> dict[str, Artifact]:
    """What a training of Stage II is given beside pixels and eval set; nothing unless it is to see Stage I's pictures."""
    if not run.config.remakes_low_res:
        return {}
    assert stage1_lora is not None  # the configuration was checked
    inputs = {"pixels": pixels, "stage1_lora": stage1_lora, "text_embeds": embeds}
    return {"low_res": stage2_low_res(run, inputs)}
