"""Upscaled pictures: the user's own through Stage II, with a version, LoRAs or the base model, or Stage III. No torch."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from deepfloyd_core.adapters.mixed import mixed_loras
from deepfloyd_core.config.run import Run
from deepfloyd_core.config.stage3 import STAGE3
from deepfloyd_core.config.stages import STAGES, Stage
from deepfloyd_core.errors import DataError
from deepfloyd_core.models.folders import resolve
from deepfloyd_core.preflight.drawn_from import asked_loras
from deepfloyd_core.preflight.upscale import UpscaleOptions
from deepfloyd_core.preflight.versions import DrawnVersion
from deepfloyd_core.processes.jobs import run_job
from deepfloyd_core.sampling.identity import enlarge_request, upscale_request
from deepfloyd_core.sampling.stage3_jobs import stage3_of
from deepfloyd_core.sampling.texts_jobs import run_with_texts
from deepfloyd_core.sampling.upscale_jobs import OwnPicture, UpscaledSummary, enlarge_job, upscale_job
from deepfloyd_core.store.artifacts import Artifact, Request, WorkDir, materialise
from deepfloyd_core.store.counts import many
from deepfloyd_core.types import Report, no_report

log = logging.getLogger(__name__)


def upscale(
    run: Run, pictures: Sequence[OwnPicture], version: DrawnVersion, options: UpscaleOptions, report: Report = no_report
) -> Artifact:
    """Upscale pictures, or take them where the same were upscaled before.

    Raises DataError where no picture can be upscaled.
    """
    if options.stage == STAGE3:
        stage3 = stage3_of(run.config)
        enlarge = enlarge_job(run, pictures, options.seed, stage3)
        request = enlarge_request(run, pictures, options.seed, stage3)
        return _made(run, pictures, request, lambda work: run_job(enlarge, work, report))
    stage, first = run.config.upscalers[0], run.config.first_stage
    folders: dict[Stage, Path] = {
        one: resolve(run.config.stage(one).model, one, text=one == first) for one in dict.fromkeys((first, stage))
    }
    loras = mixed_loras(run, asked_loras(options.loras), {stage: folders[stage]})
    for lora in loras:
        log.info("%s upscales with %s", STAGES[stage].title, lora.told)
    job = upscale_job(run, pictures, options.seed, version.name, folders, version.bundle, loras)
    request = upscale_request(run, pictures, options.seed, version.name, folders, version.bundle, loras)
    return _made(run, pictures, request, lambda work: run_with_texts(job, work, report))


def _made(
    run: Run, pictures: Sequence[OwnPicture], request: Request, build: Callable[[WorkDir], UpscaledSummary]
) -> Artifact:
    artifact = materialise(run.workspace, request, build)
    summary = artifact.summary(UpscaledSummary)
    for name, fault in summary.left_out.items():
        log.warning("%s is left out: %s", name, fault)
    if not summary.pictures:
        raise DataError(f"None of {many(len(pictures), 'file')} can be upscaled; the log says why.")
    return artifact
