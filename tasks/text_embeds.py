"""Text embeds: every caption and prompt through T5, in a process of its own."""

from prefect import task
from prefect.cache_policies import NO_CACHE

from deepfloyd_core.config.run import Run
from deepfloyd_core.index.ledger import caption_counts
from deepfloyd_core.models.folders import resolve
from deepfloyd_core.store.artifacts import Artifact, WorkDir, materialise
from deepfloyd_core.text.embeds import (
    FILES,
    EmbedsSummary,
    embeds_request,
    encode_job,
    encode_parts,
    older_embeds,
    run_captions,
)
from tasks.job_parts import run_parts
from tasks.progress import progress
from tasks.ui_pages import show_embeds


@task(name="text_embeds", cache_policy=NO_CACHE)
def text_embeds(run: Run, index: Artifact) -> Artifact:
    """The rows of every text the run will ask for; T5 is loaded only for texts that are nowhere yet."""
    stage = run.config.first_stage
    encoder = resolve(run.config.stage(stage).model, stage, text=True)
    captions = run_captions(run, caption_counts(index))
    request = embeds_request(run, captions, encoder)

    def encode(work: WorkDir) -> EmbedsSummary:
        job = encode_job(run, captions, encoder, work.before or older_embeds(run.workspace, request))
        return run_parts(run.config, job, encode_parts(job), work, report)

    with progress("text embeds") as report:
        embeds = materialise(run.workspace, request, encode, parts=FILES)
    show_embeds(embeds, index)
    return embeds
