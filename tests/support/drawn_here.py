"""Pictures that the job `generate` draws in the test's process."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from deepfloyd_core.config.run import Run
from deepfloyd_core.drawing.generated import drawn_from
from deepfloyd_core.preflight.generate import GenerateOptions, pictures_of
from deepfloyd_core.processes.jobs import Job
from deepfloyd_core.sampling.generate import generate_pictures
from deepfloyd_core.sampling.identity import generate_request
from deepfloyd_core.sampling.jobs import generate_job
from deepfloyd_core.types import no_report


def drawn_here(run: Run, models: dict[Any, Path], out: Path, options: GenerateOptions) -> dict[str, Path]:
    """Draw with the base models. Returns the PNGs by their size."""
    out.mkdir()
    pictures, given = pictures_of(run, options), drawn_from(run, options, models)
    identity = generate_request(run, pictures, "base", models, None, given)
    generate_pictures(Job(generate_job(run, pictures, "base", models, identity, None, given), out, no_report))
    return {file.stem.rpartition("-")[2]: file for file in out.glob("picture-*.png")}


def pixels(file: Path) -> np.ndarray:
    """Of a picture, as whole numbers that can be subtracted."""
    with Image.open(file) as picture:
        return np.asarray(picture).astype(int)
