"""Text embeds: every caption and prompt through T5, in a process of its own."""

from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from deepfloyd_core.config.run import Run
from deepfloyd_core.index.ledger import caption_counts
from deepfloyd_core.models.folders import resolve
from deepfloyd_core.processes.jobs import run_parts
from deepfloyd_core.store.artifacts import Artifact, WorkDir, materialise
from deepfloyd_core.text.embeds import FILES, TOKENS_SHEET, embeds_request, older_embeds, run_captions, truncated_texts
from tasks.progress import progress
from tasks.publish import publish_pictures, publish_truncated


@task(name="text_embeds", cache_policy=NO_CACHE)
def text_embeds(run: Run, index: Artifact) -> Artifact:
    """The rows of every text the run will ask for; T5 is loaded only for texts that are nowhere yet."""
    stage = run.config.stages[0]
    encoder = resolve(run.config.stage(stage).model, stage, text=True)
    captions = run_captions(run, caption_counts(index))
    options = {"captions": captions, "encoder": str(encoder)}
    request = embeds_request(run, captions, encoder)

    def encode(work: WorkDir) -> dict[str, Any]:
        older = older_embeds(run.workspace, request)
        inputs = {"older": older} if older else {}
        return run_parts("embed", run.config, inputs, options, work, report)

    with progress("text embeds") as report:
        embeds = materialise(run.workspace, request, encode, parts=FILES)
    publish_pictures(embeds, TOKENS_SHEET)
    publish_truncated(truncated_texts(embeds, most=100))
    return embeds
