"""Pictures that the job `generate` draws in the test's process."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from deepfloyd_core.config.run import Run
from deepfloyd_core.config.stage3 import STAGE3
from deepfloyd_core.drawing.generated import drawn_from
from deepfloyd_core.preflight.generate import GenerateOptions, drawn_stages, pictures_of
from deepfloyd_core.processes.jobs import Job
from deepfloyd_core.sampling.generate import generate_pictures
from deepfloyd_core.sampling.identity import generate_request
from deepfloyd_core.sampling.jobs import DrawRequest, GenerateRequest, generate_job
from deepfloyd_core.sampling.stage3_jobs import stage3_of
from deepfloyd_core.sampling.stored import store_texts
from deepfloyd_core.sampling.texts_jobs import texts_request
from deepfloyd_core.types import no_report


def job_here(run: Run, models: dict[Any, Path], options: GenerateOptions) -> GenerateRequest:
    """The job that draws with the base models."""
    stages = drawn_stages(run.config, options.stages)
    pictures, given = pictures_of(run, options), drawn_from(run, options, models)
    folders = {stage: folder for stage, folder in models.items() if stage in stages}
    stage3 = stage3_of(run.config) if STAGE3 in stages else None
    identity = generate_request(run, pictures, "base", folders, None, given, stage3)
    return generate_job(run, pictures, "base", folders, identity, None, given, stage3)


def texts_here(job: DrawRequest[Any], out: Path) -> None:
    """Encode the texts of a job, which needs them in its folder."""
    store_texts(Job(texts_request(job), out, no_report))


def drawn_here(run: Run, models: dict[Any, Path], out: Path, options: GenerateOptions) -> dict[str, Path]:
    """Draw with the base models. Returns the PNGs by their size."""
    out.mkdir(exist_ok=True)
    job = job_here(run, models, options)
    texts_here(job, out)
    generate_pictures(Job(job, out, no_report))
    return {file.stem.rpartition("-")[2]: file for file in out.glob("picture-*.png")}


def pixels(file: Path) -> np.ndarray:
    """Of a picture, as whole numbers that can be subtracted."""
    with Image.open(file) as picture:
        return np.asarray(picture).astype(int)
