"""What each scheduler costs and loses in few steps: `python benchmarks/schedulers.py`, some 8 minutes on one core.

The tiny cascade's Stage I draws its own captions: the share of pictures with their caption's colour and with its outline.
Stage II upscales drawn pictures that it never saw: PSNR in dB. Every scheduler has the same prompts, seeds and steps. CPU
seconds are of one picture, without loading.
"""

import argparse
import time
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deepfloyd_core.config.flavours import FLAVOURS
from deepfloyd_core.config.run_machine import Machine
from deepfloyd_core.config.run_text import TextKeys
from deepfloyd_core.config.stage import StageConfig
from deepfloyd_core.config.stage_sampling import SCHEDULER_KINDS
from deepfloyd_core.config.stages import Stage
from deepfloyd_core.diffusion.loss import to_bytes
from deepfloyd_core.measures import drawn_world
from deepfloyd_core.models.folders import resolve
from deepfloyd_core.pictures.sheets import save_picture, titled_rows
from deepfloyd_core.sampling.jobs import SampledStage
from deepfloyd_core.sampling.sampler import Sampler, make_sampler, sample_from_text, sample_upscaled
from deepfloyd_core.text.encode import encode_prompts
from deepfloyd_core.tiny.make.measure import caption_following, held_out, psnr

STEPS = 5, 10, 20, 50
SHOWN, SHOWN_STEPS = 8, (10, 50)  # pictures of a row of the sheet, and its rows


def tiny_sampler(stage: Stage, name: str, steps: int, **keys: Any) -> Sampler:
    """A stage of the tiny cascade with a scheduler."""
    flavour = FLAVOURS[f"tiny-{'i' * stage}"]
    settings = StageConfig.model_validate({
        "model_flavour": flavour.name, "mixed_precision": "no", "validation_noise_scheduler": name,
        "validation_num_inference_steps": steps, **keys,
    })  # fmt: skip
    one = SampledStage(stage=stage, settings=settings, model=resolve(flavour.repo, stage))
    return make_sampler(one, None, Machine(device="cpu"), lambda _: None)


def main() -> None:
    """Print the tables and save the sheet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=96, help="of Stage I; a quarter of them of Stage II")
    parser.add_argument("--sheet", type=Path, help="where to save the sheet of Stage I's pictures")
    wanted = parser.parse_args()
    count, upscaled = wanted.pictures, wanted.pictures // 4
    captions = [drawn_world.BASE_CAPTIONS[number % len(drawn_world.BASE_CAPTIONS)] for number in range(count)]
    folder = resolve(FLAVOURS["tiny-i"].repo, 1, text=True)
    rows = encode_prompts([*captions, ""], "t5", folder, TextKeys(text_encoder_dtype="fp32"), Machine(device="cpu"))
    text, negative = rows[:-1], rows[-1:].expand(count, -1, -1)
    truth, low = held_out(captions[:upscaled])
    sheet = []
    print(f"{count} pictures of Stage I, {upscaled} of Stage II\n")
    print("| scheduler | steps | colour | outline | CPU s | PSNR, dB | CPU s |\n|---|--:|--:|--:|--:|--:|--:|")
    for name, steps in product(SCHEDULER_KINDS, STEPS):
        began = time.process_time()
        small = sample_from_text(
            tiny_sampler(1, name, steps, validation_guidance=3.0), text, negative, list(range(count)), (64, 64)
        )
        one = (time.process_time() - began) / count
        pictures: list[np.ndarray] = list(to_bytes(small).numpy())
        colour, outline = caption_following(pictures, captions)
        if steps in SHOWN_STEPS:
            sheet.append((f"{SCHEDULER_KINDS[name].title}, {steps} steps", pictures[:SHOWN]))
        began = time.process_time()
        large = sample_upscaled(
            tiny_sampler(2, name, steps, validation_guidance=1.0, validation_noise_level=50),
            text[:upscaled], negative[:upscaled], list(range(upscaled)), low,
        )  # fmt: skip
        two = (time.process_time() - began) / upscaled
        title = SCHEDULER_KINDS[name].title
        told = f"{colour:.2f} | {outline:.2f} | {one:.2f} | {psnr(large, truth):.2f} | {two:.2f}"
        print(f"| {title} | {steps} | {told} |", flush=True)
    if wanted.sheet:
        save_picture(titled_rows(sheet, 64, "the same prompts and seeds"), wanted.sheet)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
