"""The jobs that upscale the user's own pictures: their requests and their reports. No torch."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from deepfloyd_core.adapters.mixed import MixedLora
from deepfloyd_core.config.base import Spec
from deepfloyd_core.config.run import Run
from deepfloyd_core.config.stages import STAGES, Stage
from deepfloyd_core.processes.jobs import JobRequest
from deepfloyd_core.sampling.jobs import DrawRequest, SampledStage
from deepfloyd_core.sampling.stage3_jobs import Stage3
from deepfloyd_core.store.artifacts import Artifact
from deepfloyd_core.store.manifest import Summary
from deepfloyd_core.store.pinned import PinnedFile
from deepfloyd_core.text.embeds import embeds_to_draw_with


class UpscaledSummary(Summary):
    """The summary of upscaled pictures."""

    pictures: int
    left_out: Mapping[str, str]  # files that cannot be upscaled, and why


class OwnPicture(Spec):
    """A picture of the user's own to upscale."""

    name: str  # its file's
    file: str  # the name of what is made
    prompt: str
    source: PinnedFile


class OwnPictures(Spec):
    """What all requests have that upscale the user's own pictures."""

    pictures: tuple[OwnPicture, ...]
    negative_prompt: str
    seed: int


class UpscaleRequest(DrawRequest[UpscaledSummary], OwnPictures):
    """Upscale pictures with the weights of a version or with the base model."""

    job = "upscale"
    entry = "deepfloyd_core.sampling.upscale:upscale_pictures"
    returns = UpscaledSummary
    upscaler: SampledStage
    loras: tuple[MixedLora, ...] = ()  # all at once, on the base model


def upscale_job(
    run: Run, pictures: Sequence[OwnPicture], seed: int, version: str, models: Mapping[Stage, Path],
    bundle: Artifact | None, loras: tuple[MixedLora, ...] = (),
) -> UpscaleRequest:  # fmt: skip
    """The job that upscales pictures. models: folders of the upscaler and of the stage that has the text encoder."""
    config, stage = run.config, run.config.upscalers[0]
    return UpscaleRequest(
        machine=config, upscaler=SampledStage(stage=stage, settings=config.stage(stage), model=models[stage]), text=config,
        texts=tuple(dict.fromkeys([*(own.prompt for own in pictures), config.validation_negative_prompt])),
        encoder_name=STAGES[config.first_stage].text_encoder, encoder=models[config.first_stage],
        embeds=embeds_to_draw_with(run, models[config.first_stage]),
        pictures=tuple(pictures), negative_prompt=config.validation_negative_prompt, seed=seed, version=version,
        bundle=bundle, loras=loras,
    )  # fmt: skip


class EnlargeRequest(JobRequest[UpscaledSummary], OwnPictures):
    """Upscale pictures with Stage III."""

    job = "enlarge"
    entry = "deepfloyd_core.sampling.upscale:enlarge_pictures"
    returns = UpscaledSummary
    stage3: Stage3


def enlarge_job(run: Run, pictures: Sequence[OwnPicture], seed: int, stage3: Stage3) -> EnlargeRequest:
    """The job that upscales pictures with Stage III."""
    return EnlargeRequest(
        machine=run.config, stage3=stage3, pictures=tuple(pictures),
        negative_prompt=run.config.validation_negative_prompt, seed=seed,
    )  # fmt: skip
