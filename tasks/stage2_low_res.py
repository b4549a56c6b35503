"""Stage I's remakes of Stage II's low-res pictures, sampled in a process of its own."""

from prefect import task
from prefect.cache_policies import NO_CACHE

from deepfloyd_core.config.run import Run
from deepfloyd_core.crops.pixels import SHEET
from deepfloyd_core.models.folders import resolve
from deepfloyd_core.processes.jobs import run_job
from deepfloyd_core.sampling.identity import low_res_request
from deepfloyd_core.sampling.jobs import LowResInputs, LowResSummary, remake_job
from deepfloyd_core.store.artifacts import Artifact, materialise
from tasks.progress import progress
from tasks.ui_pages import show_pictures


@task(name="stage2_low_res", cache_policy=NO_CACHE)
def stage2_low_res(run: Run, inputs: LowResInputs[Artifact]) -> Artifact:
    """A remake of the low-res picture of each of Stage II's crops. The sheet shows true ones and their remakes."""
    folder = resolve(run.config.stage(1).model, 1)
    with progress("stage II low-res") as report:
        remakes = materialise(
            run.workspace,
            low_res_request(run, folder, inputs),
            lambda work: run_job(remake_job(run, folder, inputs), work, report),
        )
    show_pictures(remakes, remakes.summary(LowResSummary), SHEET)
    return remakes
