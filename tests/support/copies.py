"""Pictures to copy, the ways in which copies are made, and what of them a run trains on."""

import io
from typing import Any

import numpy as np
from artifact_rows import live_rows
from data_world import DataWorld
from PIL import Image

from deepfloyd_core.config.run import Run
from deepfloyd_core.crops.rows import held_out_ids
from deepfloyd_core.store.artifacts import Artifact
from deepfloyd_core.training.batches import TrainingRows

LANCZOS = Image.Resampling.LANCZOS


def encoded(picture: Image.Image, kind: str, **how: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **how)
    return buffer.getvalue()


def resized(picture: Image.Image, factor: float) -> Image.Image:
    return picture.resize((round(picture.width * factor), round(picture.height * factor)), LANCZOS)


def turned(picture: Image.Image) -> bytes:
    """A JPEG that lies on its side, with the EXIF tag that turns it upright."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(picture.transpose(Image.Transpose.ROTATE_90), "JPEG", quality=90, exif=exif)


COPIES = {
    "q60.jpg": lambda one: encoded(one, "JPEG", quality=60),
    "q95.jpg": lambda one: encoded(one, "JPEG", quality=95),
    "progressive.jpg": lambda one: encoded(one, "JPEG", quality=80, progressive=True),
    "same pixels.png": lambda one: encoded(one, "PNG", compress_level=1),
    "lossy.webp": lambda one: encoded(one, "WEBP", quality=60),
    "half.jpg": lambda one: encoded(resized(one, 0.5), "JPEG", quality=60),
    "two thirds.png": lambda one: encoded(resized(one, 2 / 3), "PNG", compress_level=1),
    "twice.jpg": lambda one: encoded(resized(one, 2), "JPEG", quality=75),
    "on its side.jpg": turned,
}


def scene(seed: int, edge: int = 200) -> Image.Image:
    """A picture with contrast and colour, unlike that of another seed."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((edge, edge * 3 // 4), Image.Resampling.BICUBIC)


def trained(world: DataWorld, run: Run, index: Artifact, evals: Artifact) -> set[str]:
    """The names of the pictures that a training may see."""
    pixels = world.pixels(run, index, 1)
    rows = TrainingRows(pixels, held_out_ids(evals))
    numbers = [row for size, count in rows.counts.items() for row in rows.take(size, np.arange(count)).rows]
    live = live_rows(pixels)
    return {live[number]["source"] for number in numbers}
