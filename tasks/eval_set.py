"""The eval set: the pictures held out of training, the same ones in every run."""

import logging

from prefect import task
from prefect.cache_policies import NO_CACHE

from deepfloyd_core.config.run import Run
from deepfloyd_core.crops.identity import eval_request
from deepfloyd_core.crops.pixels import PARTS, build_shards, eval_change, plan_eval
from deepfloyd_core.store.artifacts import Artifact, materialise, newest
from deepfloyd_core.store.counts import many
from tasks.ui_pages import show_crops

log = logging.getLogger(__name__)


@task(name="eval_set", cache_policy=NO_CACHE)
def eval_set(run: Run, index: Artifact) -> Artifact:
    """Held-out crops for every stage of the run. Says so when they are new and not those that were made before."""
    request = eval_request(run, index)
    before = newest(run.workspace, "eval_set", request.format)
    held_out = materialise(run.workspace, request, lambda work: build_shards(plan_eval(run, index, work), work), PARTS)
    came, went = eval_change(before, held_out) if before and not held_out.reused else (0, 0)
    if came or went:
        log.warning(
            "eval_set %s: %s added and %d removed since %s, so earlier figures on held-out pictures are not "
            "comparable", held_out.fingerprint, many(came, "held-out picture"), went,
            before.fingerprint if before else "",
        )  # fmt: skip
    show_crops(held_out)
    return held_out
