"""Checks what pictures are drawn from beside their texts: a picture of the user's own, and several LoRAs."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from deepfloyd_core.config.run import Run
from deepfloyd_core.config.stages import STAGES, Stage
from deepfloyd_core.errors import ConfigError, DeepFloydError, attempt
from deepfloyd_core.models.folders import folder_here
from deepfloyd_core.store.events import SERVING

if TYPE_CHECKING:
    from deepfloyd_core.adapters.mixed import AskedLora
    from deepfloyd_core.preflight.generate import GenerateOptions

MOST_LORAS = 16
BASE = "base"  # in place of a version: the base models


def start_faults(
    run: Run, options: "GenerateOptions", drawing: Sequence[Stage], small: Iterable[tuple[int, int]] = ()
) -> Iterator[str]:
    """Why pictures cannot start from the user's own one. drawing: the stages of the run that draw. small: the sizes of the
    first one that are drawn.
    """
    image, mask, strength = options.image, options.mask, options.noise_strength
    if image is None:
        for name, value in (("mask", mask), ("strength", options.strength), ("style", options.style)):
            if value is not None:
                yield f"--{name} is given without --image, the picture to start from. Give both, or neither."
        return
    # Not above: it takes Pillow.
    from deepfloyd_core.pictures.decode import picture_size, read_mask

    if not 0 < strength <= 1:
        yield f"The strength is {strength:g}; give a number above 0, at most 1."
    else:
        starting = [one for one in drawing if STAGES[one].starts_from_picture(options.style is not None)]
        for stage in starting:
            steps = run.config.stage(stage).validation_num_inference_steps
            if int(steps * strength) < 1:
                yield f"The strength is {strength:g} and {STAGES[stage].title} has {steps} steps: that is less than one."
    yield from _style_faults(run, options, drawing)
    files = [image, *([mask] if mask else [])]
    faults: list[DeepFloydError] = []
    sizes = [attempt(faults, picture_size, file) for file in files]
    yield from map(str, faults)
    if faults or mask is None:
        return
    if sizes[0] != sizes[1]:
        width, height, own = *(sizes[0] or (0, 0)), "x".join(map(str, sizes[1] or ()))
        yield f"The mask {mask} has {own} px, and the image {width}x{height}. They must have the same size."
        return
    for width, height in dict.fromkeys(small):
        for stage in drawing:
            scale = STAGES[stage].scale // STAGES[run.config.first_stage].scale
            if not read_mask(mask, (width * scale, height * scale)).any():
                yield (
                    f"The mask {mask} has nothing white at {STAGES[stage].title}'s {width * scale}x{height * scale} px, so "
                    "nothing would be drawn anew. Make a larger part white, or give other --sizes."
                )
                return


def _style_faults(run: Run, options: "GenerateOptions", drawing: Sequence[Stage]) -> Iterator[str]:
    """Why pictures cannot take a style."""
    if options.style is None:
        return
    if not options.style.strip():
        yield "The style is empty."
    if options.mask is not None:
        yield "--style gives all of a picture another style. Leave out --mask."
    for stage in drawing:
        guidance = run.config.stage(stage).validation_guidance
        if guidance <= 1:
            yield (
                f"--style works through the guidance, and {STAGES[stage].table}.validation_guidance is {guidance:g}. Set it "
                "above 1."
            )


def asked_loras(loras: Sequence[str]) -> "tuple[AskedLora, ...]":
    """LoRAs as a user names them. Raises ConfigError for one that cannot be understood."""
    if not loras:
        return ()
    from deepfloyd_core.adapters.mixed import parse_lora

    return tuple(parse_lora(text) for text in loras)


def asked_version(version: str | None, loras: Sequence[str]) -> str:
    """The version to draw with, where it may be left out: the one that serves, or for LoRAs the base models."""
    return version if version is not None else BASE if loras else SERVING[0]


def asked_lora_faults(loras: Sequence[str], version: str | None) -> list[DeepFloydError]:
    """What can be said of LoRAs without the run file. version: as it is asked for."""
    faults: list[DeepFloydError] = []
    attempt(faults, asked_loras, loras)
    if len(loras) > MOST_LORAS:
        faults.append(ConfigError(f"--lora is given {len(loras)} times; at most {MOST_LORAS} are drawn with at once."))
    if loras and version not in (None, BASE):
        faults.append(
            ConfigError("--lora draws with the base models: leave out --version. A version's LoRA is --lora version:N.")
        )
    return faults


def lora_faults(
    run: Run, asked: "Sequence[AskedLora]", stage: Stage, folder: Path, drawing: Iterable[Stage] | None = None
) -> list[DeepFloydError]:
    """LoRAs that are not there or fit no stage that draws. Nothing while another one's model is not on this machine: a file
    may be of that one. folder: the model of a stage. drawing: the stages that draw, unless all of the run do.
    """
    if not asked:
        return []
    # Not above: it takes safetensors, which other options do not need.
    from deepfloyd_core.adapters.mixed import found_loras, is_lora_missing

    asked = [one for one in asked if not is_lora_missing(one)]
    faults: list[DeepFloydError] = []
    others = [other for other in drawing or run.config.stages if other != stage]
    folders = {other: attempt([], folder_here, run.config.stage(other).model, other, False) for other in others}
    here = {other: found for other, found in folders.items() if found is not None}
    if len(here) == len(others):
        attempt(faults, found_loras, run, asked, {**here, stage: folder})
    return faults
