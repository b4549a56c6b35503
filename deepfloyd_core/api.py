"""The stable interface: model cards, docs, scripts and notebooks import from here. Loads torch."""

from collections.abc import Sequence
from pathlib import Path

from deepfloyd_core.adapters.controlnet import load_control
from deepfloyd_core.config.flavours import FLAVOURS
from deepfloyd_core.diffusion.back_projection import back_projecting
from deepfloyd_core.diffusion.conditioning import as_conditioning, conditioning_picture
from deepfloyd_core.drawing import compared, generated, upscaled
from deepfloyd_core.models.folders import resolve
from deepfloyd_core.preflight.check import check_run
from deepfloyd_core.preflight.generate import GenerateOptions
from deepfloyd_core.preflight.upscale import UpscaleOptions, upscaled_by
from deepfloyd_core.preflight.versions import drawn_version
from deepfloyd_core.processes.ahead import DRAWING
from deepfloyd_core.processes.jobs import job_starter
from deepfloyd_core.sampling.own_pictures import own_pictures, upscaled_files
from deepfloyd_core.sampling.pictures import drawn
from deepfloyd_core.store.artifacts import Artifact
from deepfloyd_core.store.leases import leased
from deepfloyd_core.text.embeds import Embeds

__all__ = [
    "FLAVOURS",
    "Artifact",
    "Embeds",
    "GenerateOptions",
    "UpscaleOptions",
    "as_conditioning",
    "back_projecting",
    "conditioning_picture",
    "generate",
    "load_control",
    "resolve",
    "upscale",
]


@leased
def generate(config: str | Path, options: GenerateOptions, overrides: Sequence[str] = ()) -> list[Path]:
    """Draw pictures as `deepfloyd generate` does, without Prefect. Returns their PNGs.

    They come in the order of versions, stages and pictures. config: a run file; overrides: its keys as KEY=VALUE. The
    pictures are kept in the workspace, and the same request is answered from there. Raises DeepFloydError for all that can
    be said before a model is loaded, and for a job that fails. It does not wait for a run that has the GPU.
    """
    run = check_run(Path(config), tuple(overrides), options)
    pictures = generated.listed_pictures(run, options)
    with job_starter(DRAWING):
        versions = {found.name: found for found in (drawn_version(run, one) for one in options.versions)}
        made = {name: generated.draw(run, pictures, version, options) for name, version in versions.items()}
    if len(made) > 1:
        compared.compare(run, pictures, made)
    return [file for artifact in made.values() for _, file in drawn(artifact.path)]


@leased
def upscale(config: str | Path, options: UpscaleOptions, overrides: Sequence[str] = ()) -> list[Path]:
    """Make pictures four times as wide and high as `deepfloyd upscale` does, without Prefect. Returns their PNGs.

    Arguments and errors are those of `generate`; a file that cannot be upscaled is left out, with a warning in the log.
    """
    run = check_run(Path(config), tuple(overrides), options)
    own = own_pictures(options.pictures, options.prompt)
    with job_starter(DRAWING):
        artifact = upscaled.upscale(run, own, upscaled_by(run, options), options)
    return upscaled_files(artifact.path)
