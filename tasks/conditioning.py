"""The conditioning pictures of a paired ControlNet: the pairs of its stage's pixels and of the held-out pictures."""

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from deepfloyd_core.config.run import Run
from deepfloyd_core.crops.conditioning import plan_conditioning, plan_eval_conditioning
from deepfloyd_core.crops.identity import conditioning_request
from deepfloyd_core.crops.pixels import PARTS, SHEET, build_shards
from deepfloyd_core.crops.summary import CropsSummary
from deepfloyd_core.store.artifacts import Artifact, materialise
from tasks import VERSION
from tasks.artifact_page import show_artifact
from tasks.outbox import call_subflow, server_awaited
from tasks.progress import progress
from tasks.stage_pixels import make_shards


def stage_conditioning(run: Run, index: Artifact, pixels: Artifact) -> Artifact:
    """The pairs of Stage I's crops, as a subflow like that of the crops. The sheet shows each crop and its pair."""
    pairs = call_subflow(_stage_conditioning, run, index, pixels)
    show_artifact(pairs, pairs.summary(CropsSummary), SHEET)
    return pairs


@flow(name="stage1_conditioning", version=VERSION, flow_run_name="stage1_conditioning", validate_parameters=False)
@server_awaited
def _stage_conditioning(run: Run, index: Artifact, pixels: Artifact) -> Artifact:
    """The pairs of Stage I's crops."""
    with progress("conditioning") as report:
        return materialise(
            run.workspace,
            conditioning_request(run, index, pixels),
            lambda work: make_shards(run, plan_conditioning(run, index, work), work, report, pixels),
            PARTS,
        )


@task(name="eval_conditioning", cache_policy=NO_CACHE)
def eval_conditioning(run: Run, index: Artifact, held_out: Artifact) -> Artifact:
    """The pairs of Stage I's held-out crops, with a sheet of both."""
    pairs = materialise(
        run.workspace,
        conditioning_request(run, index, held_out),
        lambda work: build_shards(plan_eval_conditioning(run, index, work), work, held_out),
        PARTS,
    )
    show_artifact(pairs, pairs.summary(CropsSummary), SHEET)
    return pairs
