"""Checks what pictures are drawn from beside their texts: a picture of the user's own, and several LoRAs."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from deepfloyd_core.config.run import Run
from deepfloyd_core.config.stages import STAGES, Stage
from deepfloyd_core.errors import DeepFloydError, attempt
from deepfloyd_core.models.folders import folder_here

if TYPE_CHECKING:
    from deepfloyd_core.adapters.mixed import AskedLora
    from deepfloyd_core.preflight.generate import GenerateOptions


def start_faults(run: Run, options: "GenerateOptions", small: Iterable[tuple[int, int]] = ()) -> Iterator[str]:
    """Why pictures cannot start from the user's own one. small: the sizes of the first stage that are drawn."""
    image, mask, strength = options.image, options.mask, options.noise_strength
    if image is None:
        for name, value in (("mask", mask), ("strength", options.strength)):
            if value is not None:
                yield f"--{name} is given without --image, the picture to start from. Give both, or neither."
        return
    # Not above: it takes Pillow.
    from deepfloyd_core.pictures.decode import picture_size, read_mask

    if not 0 < strength <= 1:
        yield f"The strength is {strength:g}; give a number above 0, at most 1."
    else:
        for stage in run.config.stages:
            steps = run.config.stage(stage).validation_num_inference_steps
            if int(steps * strength) < 1:
                yield f"The strength is {strength:g} and {STAGES[stage].title} has {steps} steps: that is less than one."
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
        for stage in run.config.stages:
            scale = STAGES[stage].scale // STAGES[run.config.first_stage].scale
            if not read_mask(mask, (width * scale, height * scale)).any():
                yield (
                    f"The mask {mask} has nothing white at {STAGES[stage].title}'s {width * scale}x{height * scale} px, so "
                    "nothing would be drawn anew. Make a larger part white, or give other --sizes."
                )
                return


def lora_faults(run: Run, asked: "Sequence[AskedLora]", stage: Stage, folder: Path) -> list[DeepFloydError]:
    """LoRAs that are not there or fit no stage. Nothing while another stage's model is not on this machine: a file may be of
    that one. folder: the model of a stage.
    """
    if not asked:
        return []
    # Not above: it takes safetensors, which other options do not need.
    from deepfloyd_core.adapters.mixed import found_loras

    faults: list[DeepFloydError] = []
    others = [other for other in run.config.stages if other != stage]
    folders = {other: attempt([], folder_here, run.config.stage(other).model, other, False) for other in others}
    here = {other: found for other, found in folders.items() if found is not None}
    if len(here) == len(others):
        attempt(faults, found_loras, run, asked, {**here, stage: folder})
    return faults
