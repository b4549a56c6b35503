"""The eval set: the pictures held out of training, the same ones in every run."""

from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from deepfloyd_core.artifacts import Artifact, WorkDir, materialise
from deepfloyd_core.config import Run
from deepfloyd_core.pixels import SHEET, build_shard, eval_request, finish_pixels, plan_eval
from tasks.publish import publish_pictures


@task(name="eval_set", cache_policy=NO_CACHE)
def eval_set(run: Run, index: Artifact) -> Artifact:
    """Held-out crops for every stage of the run."""

    def build(work: WorkDir) -> dict[str, Any]:
        layout = plan_eval(run, index, work)
        results = [build_shard(shard, work.path, layout.older) for shard in layout.made]
        return finish_pixels(layout, results, work)

    held_out, _ = materialise(run.workspace, eval_request(run, index), build)
    publish_pictures(held_out, SHEET)
    return held_out
