"""The job that encodes the texts of pictures: T5 has a process of its own. No torch.

It ends before the job that samples begins, so all of its memory is free for the first stage. Both jobs are forks of a
process that has imported torch, so the second one costs a tenth of a second.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deepfloyd_core.config.run_text import TextKeys
from deepfloyd_core.errors import DamagedError
from deepfloyd_core.processes.jobs import JobRequest, RunParts, S, run_job, run_parts
from deepfloyd_core.sampling.jobs import DrawRequest
from deepfloyd_core.store.artifacts import Artifact, WorkDir
from deepfloyd_core.store.manifest import Summary
from deepfloyd_core.types import Report

log = logging.getLogger(__name__)


class TextsSummary(Summary):
    """The summary of encoded texts."""

    encoded: int  # by this process; the others were there


class TextsRequest(JobRequest[TextsSummary]):
    """Encode texts, apart from those that the workspace's embeds have."""

    job = "encode-prompts"
    entry = "deepfloyd_core.sampling.stored:store_texts"
    returns = TextsSummary
    texts: tuple[str, ...]  # each once
    keys: TextKeys
    encoder_name: str  # in TEXT_ENCODERS
    encoder: Path  # folder of the model that has it
    embeds: Artifact | None


def texts_request(request: DrawRequest[Any]) -> TextsRequest:
    """For the texts of a request to draw."""
    return TextsRequest(
        machine=request.machine, texts=request.texts, keys=request.text, encoder_name=request.encoder_name,
        encoder=request.encoder, embeds=request.embeds,
    )  # fmt: skip


def run_with_texts(
    request: DrawRequest[S], work: WorkDir, report: Report, parts: Sequence[JobRequest[Any]] = (),
    run_all: RunParts = run_parts,
) -> S:  # fmt: skip
    """Run the job that encodes the texts of another one, then its parts and that. Where the workspace's embeds are
    damaged, all of the texts are encoded. run_all: runs the parts.
    """
    texts = texts_request(request)
    try:
        run_job(texts, work, report)
    except DamagedError as error:
        log.warning("%s The texts are encoded anew", error)
        run_job(texts.model_copy(update={"embeds": None}), work, report)
    return run_all(request, parts, work, report) if parts else run_job(request, work, report)
