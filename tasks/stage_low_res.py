"""Remakes of an upscaler's low-res pictures by the stage before it, sampled in a process of its own."""

from prefect import task
from prefect.cache_policies import NO_CACHE

from deepfloyd_core.config.run import Run
from deepfloyd_core.config.stages import STAGES, Stage
from deepfloyd_core.crops.pixels import PARTS, SHEET
from deepfloyd_core.models.folders import resolve
from deepfloyd_core.processes.jobs import run_job
from deepfloyd_core.sampling.identity import low_res_request
from deepfloyd_core.sampling.jobs import LowResInputs, LowResSummary, remake_job
from deepfloyd_core.store.artifacts import Artifact, materialise
from tasks.artifact_page import show_artifact
from tasks.progress import progress


@task(name="stage_low_res", task_run_name="stage{stage}_low_res", cache_policy=NO_CACHE)
def stage_low_res(run: Run, stage: Stage, inputs: LowResInputs[Artifact]) -> Artifact:
    """A remake of the low-res picture of each of an upscaler's crops. The sheet shows true ones and their remakes."""
    source = STAGES[stage].upscales
    assert source is not None
    folder = resolve(run.config.stage(source).model, source)
    with progress(f"stage {STAGES[stage].roman} low-res") as report:
        remakes = materialise(
            run.workspace,
            low_res_request(run, stage, folder, inputs),
            lambda work: run_job(remake_job(run, stage, folder, inputs), work, report),
            PARTS,
        )
    show_artifact(remakes, remakes.summary(LowResSummary), SHEET)
    return remakes
