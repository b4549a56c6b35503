"""Text embeds: every caption and prompt through T5, in a process of its own."""

from prefect import task
from prefect.cache_policies import NO_CACHE

from deepfloyd_core.artifacts import Artifact, materialise
from deepfloyd_core.config import Run
from deepfloyd_core.embeds import embeds_request, run_captions
from deepfloyd_core.flavours import resolve
from deepfloyd_core.jobs import run_job
from deepfloyd_core.ledger import caption_counts
from tasks.progress import progress
from tasks.publish import publish_pictures


@task(name="text_embeds", cache_policy=NO_CACHE)
def text_embeds(run: Run, index: Artifact) -> Artifact:
    """The rows of every text the run will ask for; T5 is loaded only when they are not there yet."""
    stage = run.config.stages[0]
    encoder = resolve(run.config.stage(stage).model, stage, text=True)
    captions = run_captions(run, caption_counts(index))
    options = {"captions": captions, "encoder": str(encoder)}
    with progress("text embeds") as report:
        embeds, _ = materialise(
            run.workspace,
            embeds_request(run, captions, encoder),
            lambda work: run_job("embed", run.config, {}, options, work, report),
        )
    publish_pictures(embeds)
    return embeds
