"""The order in which artifacts are made from each other, for every flow. Finished artifacts are reused.

`bundle.planned` follows the same order with requests in place of artifacts.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import wraps
from typing import ParamSpec, TypeVar

from deepfloyd_core.bundle.planned import FROM_BASE, Starts
from deepfloyd_core.config.run import Run
from deepfloyd_core.config.stages import STAGES, Stage
from deepfloyd_core.errors import DamagedError
from deepfloyd_core.sampling.jobs import LowResInputs
from deepfloyd_core.store.artifacts import Artifact
from deepfloyd_core.training.jobs import TrainingInputs
from tasks.conditioning import eval_conditioning, stage_conditioning
from tasks.eval_set import eval_set
from tasks.stage_lora import stage_lora
from tasks.stage_low_res import stage_low_res
from tasks.stage_pixels import stage_pixels
from tasks.stage_text import stage_text

P = ParamSpec("P")
R = TypeVar("R")
log = logging.getLogger(__name__)


def mended(make: Callable[P, R]) -> Callable[P, R]:
    """Decorates what makes artifacts from each other: where a reader finds a damaged file, it is called once more, and makes
    that file again. Finished artifacts are reused, and a training goes on from its checkpoint.

    A file that is damaged a second time ends the run: then it is not the file.
    """

    @wraps(make)
    def again(*args: P.args, **kwargs: P.kwargs) -> R:
        told: set[str] = set()
        while True:
            try:
                return make(*args, **kwargs)
            except DamagedError as error:
                if str(error) in told:
                    raise
                told.add(str(error))
                log.warning("%s", error)

    return again


@dataclass(frozen=True)
class Pictures:
    """An image index, and the crops from its pictures."""

    index: Artifact
    pixels: dict[Stage, Artifact]
    eval_set: Artifact
    conditioning: Artifact | None = None  # what a ControlNet follows: for its stage's pixels, and for the eval set
    eval_conditioning: Artifact | None = None

    @property
    def artifacts(self) -> list[Artifact]:
        """In the order in which they are made."""
        made = [self.index, *self.pixels.values(), self.eval_set, self.conditioning, self.eval_conditioning]
        return [artifact for artifact in made if artifact is not None]


@dataclass(frozen=True)
class Training:
    """A stage's LoRA, and its inputs."""

    inputs: TrainingInputs[Artifact]
    lora: Artifact

    @property
    def artifacts(self) -> list[Artifact]:
        """In the order in which they are made."""
        return [*self.inputs.by_field.values(), self.lora]


def make_pictures(run: Run, index: Artifact, stages: tuple[Stage, ...]) -> Pictures:
    """The crops of some stages, and the held-out pictures."""
    pixels = {stage: stage_pixels(run, index, stage) for stage in stages}
    pictures = Pictures(index, pixels, eval_set(run, index))
    paired = run.config.paired_stage
    if paired not in stages:
        return pictures
    return replace(
        pictures,
        conditioning=stage_conditioning(run, index, pixels[paired]),
        eval_conditioning=eval_conditioning(run, index, pictures.eval_set),
    )


def make_trainings(
    run: Run, pictures: Pictures, embeds: Artifact, prompts: list[str], starts: Starts = FROM_BASE
) -> dict[Stage, Training]:
    """The LoRA of each stage that has pictures, in the order of the cascade. prompts: of the validations."""
    trainings: dict[Stage, Training] = {}
    for stage, pixels in pictures.pixels.items():
        text, start = stage_text(run, stage, embeds), starts.get(stage)
        inputs = TrainingInputs(pixels=pixels, text=text, eval_set=pictures.eval_set, start=start)
        config, source = run.config.stage(stage), STAGES[stage].upscales
        if config.paired:
            inputs = replace(inputs, conditioning=pictures.conditioning, eval_conditioning=pictures.eval_conditioning)
        if source is not None and config.remakes_low_res:
            remade_from = LowResInputs(pixels=pixels, stage1_lora=trainings[source].lora, text_embeds=embeds)
            inputs = replace(inputs, low_res=stage_low_res(run, stage, remade_from))
        trainings[stage] = Training(inputs, stage_lora(run, stage, inputs, prompts))
    return trainings
