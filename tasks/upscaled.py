"""Upscaled pictures: the user's own through an upscaler, with a version's weights or with the base model."""

from collections.abc import Sequence

from prefect import task
from prefect.cache_policies import NO_CACHE

from deepfloyd_core.config.run import Run
from deepfloyd_core.drawing.upscaled import upscale
from deepfloyd_core.preflight.upscale import UpscaleOptions
from deepfloyd_core.preflight.versions import DrawnVersion
from deepfloyd_core.sampling.upscale_jobs import OwnPicture, UpscaledSummary
from deepfloyd_core.store.artifacts import Artifact
from tasks.artifact_page import show_artifact
from tasks.progress import progress

MOST_SHOWN = 4


@task(name="upscaled", cache_policy=NO_CACHE)
def upscaled(run: Run, pictures: Sequence[OwnPicture], version: DrawnVersion, options: UpscaleOptions) -> Artifact:
    """Raises DataError where no picture can be upscaled."""
    with progress("upscale") as report:
        artifact = upscale(run, pictures, version, options, report)
    summary = artifact.summary(UpscaledSummary)
    made = [one for one in pictures if one.name not in summary.left_out]
    show_artifact(artifact, summary, *((one.name, artifact.path / one.file) for one in made[:MOST_SHOWN]))
    return artifact
