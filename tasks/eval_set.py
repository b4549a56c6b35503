"""The eval set: the pictures held out of training, the same ones in every run."""

from prefect import task
from prefect.cache_policies import NO_CACHE

from deepfloyd_core.artifacts import Artifact, materialise
from deepfloyd_core.config import Run
from deepfloyd_core.pixels import SHEET, build_shards, eval_request, plan_eval
from tasks.publish import publish_pictures


@task(name="eval_set", cache_policy=NO_CACHE)
def eval_set(run: Run, index: Artifact) -> Artifact:
    """Held-out crops for every stage of the run."""
    held_out, _ = materialise(
        run.workspace, eval_request(run, index), lambda work: build_shards(plan_eval(run, index, work), work)
    )
    publish_pictures(held_out, SHEET)
    return held_out
