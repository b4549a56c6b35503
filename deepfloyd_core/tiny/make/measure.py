"""Measures the shipped weights through the stock pipelines: `python -m deepfloyd_core.tiny.make.measure`.

Stage I: the share of samples that have their caption's main colour and outline, and that "a purple star" is still
unknown. Stage II: mean PSNR on drawn pictures that training never saw (other seeds), compared with bilinear
interpolation. About 4 minutes on one core.
"""

import argparse
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import IFPipeline, IFSuperResolutionPipeline
from torch.nn import functional as F

from deepfloyd_core.measures import drawn_world as world

log = logging.getLogger("tiny")
SHIPPED = Path(__file__).parents[1]
HELD_OUT = 1_000_000  # seeds of measured pictures; training uses (20, step)


@dataclass(frozen=True)
class Sampling:
    """How to sample. The defaults are what the figures in the README were measured with."""

    steps: int = 20
    guidance: float = 3.0
    seed: int = 0
    noise_level: int = 50  # Stage II only


STAGE1 = Sampling()
STAGE2 = Sampling(steps=10, guidance=1.0)  # 1.0 switches guidance off: half the price


def load(folder: Path) -> Any:
    """A shipped pipeline by its stock loader, silent."""
    kind: Any = IFSuperResolutionPipeline if (folder / "image_noising_scheduler").exists() else IFPipeline
    pipe = kind.from_pretrained(folder, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def stage1_pictures(pipe: Any, captions: Sequence[str], how: Sampling = STAGE1) -> list[world.Picture]:
    """One picture (64, 64, 3) a caption, in batches of 32; each batch has its own seed."""
    pictures: list[world.Picture] = []
    for start in range(0, len(captions), 32):
        rows, negative = pipe.encode_prompt(list(captions[start : start + 32]))
        images = pipe(
            prompt_embeds=rows,
            negative_prompt_embeds=negative,
            num_inference_steps=how.steps,
            guidance_scale=how.guidance,
            generator=torch.Generator().manual_seed(how.seed + start),
            output_type="pt",
        ).images
        pictures += list(to_uint8(images))
    return pictures


@torch.no_grad()
def stage2_pictures(pipe: Any, low: torch.Tensor, captions: Sequence[str], how: Sampling = STAGE2) -> torch.Tensor:
    """Upscale low (B, 3, 64, 64) in [-1, 1] to (B, 3, 256, 256) in [-1, 1]."""
    rows, negative = pipe.encode_prompt(list(captions))
    images: torch.Tensor = pipe(
        image=low,
        prompt_embeds=rows,
        negative_prompt_embeds=negative,
        height=256,
        width=256,
        num_inference_steps=how.steps,
        guidance_scale=how.guidance,
        noise_level=how.noise_level,
        generator=torch.Generator().manual_seed(how.seed),
        output_type="pt",
    ).images
    return images.clamp(-1, 1)


def to_uint8(images: torch.Tensor) -> world.Picture:
    """(B, 3, H, W) in [-1, 1] to uint8 (B, H, W, 3)."""
    return np.asarray(((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy(), np.uint8)


def held_out(captions: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Drawn pictures (B, 3, 256, 256) in [-1, 1] and their antialiased 4x downscale (B, 3, 64, 64)."""
    drawn = [world.draw(np.random.default_rng(HELD_OUT + i), caption, 256) for i, caption in enumerate(captions)]
    pictures = torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return pictures, F.interpolate(pictures, (64, 64), mode="bicubic", antialias=True).clamp(-1, 1)


def psnr(found: torch.Tensor, truth: torch.Tensor) -> float:
    """Mean over pictures of the PSNR in dB; both (B, 3, H, W) in [-1, 1]."""
    error = (found - truth).square().mean(dim=(1, 2, 3))
    return float((10 * torch.log10(4.0 / error)).mean())


def caption_following(pictures: Sequence[world.Picture], captions: Sequence[str]) -> tuple[float, float]:
    """Shares of pictures with their caption's main colour and with its outline."""
    words = [caption.split()[-2:] for caption in captions]
    colour = [world.main_colour(picture) == word[0] for picture, word in zip(pictures, words, strict=True)]
    shape = [world.main_shape(picture) == word[1] for picture, word in zip(pictures, words, strict=True)]
    return float(np.mean(colour)), float(np.mean(shape))


def enlargement(pipe: Any, captions: Sequence[str], how: Sampling = STAGE2) -> dict[str, float]:
    """Mean PSNR of Stage II and of both kinds of bilinear interpolation on held-out pictures of `captions`."""
    truth, low = held_out(captions)
    found = {"stage2": stage2_pictures(pipe, low, captions, how)}
    for aligned in (False, True):
        name = "bilinear_aligned" if aligned else "bilinear"
        found[name] = F.interpolate(low, (256, 256), mode="bilinear", align_corners=aligned)
    return {name: psnr(images, truth) for name, images in found.items()}


def main() -> None:
    """Measure the pipelines in FOLDER/i and FOLDER/ii."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=SHIPPED)
    folder = parser.parse_args().folder
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    pipe = load(folder / "i")
    captions = list(world.BASE_CAPTIONS) * 8
    colour, shape = caption_following(stage1_pictures(pipe, captions), captions)
    log.info("stage 1, %d samples: colour %.3f, shape %.3f", len(captions), colour, shape)
    stars = stage1_pictures(pipe, [world.NEW_CAPTION] * 32)
    shown = np.mean([world.shows(star, world.NEW_CAPTION) for star in stars])
    log.info("stage 1, %r: shown by %.3f of %d", world.NEW_CAPTION, shown, len(stars))
    pipe = load(folder / "ii")
    for caption_list in (list(world.BASE_CAPTIONS), [world.NEW_CAPTION] * 6):
        figures = enlargement(pipe, caption_list)
        rounded = {name: round(value, 2) for name, value in figures.items()}
        log.info("stage 2, %d pictures, %r first: %s", len(caption_list), caption_list[0], rounded)


if __name__ == "__main__":
    main()
