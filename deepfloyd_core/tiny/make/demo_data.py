"""The demo's pictures: `python -m deepfloyd_core.tiny.make.demo_data datasets/demo` draws them again, byte for byte.

40 purple stars on light grounds, edges of 200 to 1,600 px within 2:1, as JPEG, PNG and WebP, each with a caption file.
Five more are what real folders hold: a sideways JPEG (EXIF), a PNG with a transparent ground, one too small to use, one
cut off, and one that is no picture. The bytes depend on Pillow's encoders, so another Pillow may compress differently.
"""

import argparse
import io
from pathlib import Path

import numpy as np
from PIL import Image

from deepfloyd_core.measures import drawn_world as world

SEED = 7
COUNT = 40
CENTRED = 0.8  # of `random_layout`: a centre crop keeps the whole star, even from a 2:1 picture
CAPTIONS = (world.NEW_CAPTION,) * 7 + (
    "a purple star on a light ground",
    "a photo of a purple star",
    "one purple star, drawn flat",
)
FORMATS = (".jpg", ".png", ".jpg", ".webp")
ORIENTATION, SIDEWAYS = 0x0112, 6  # EXIF: turn by 90 degrees clockwise to show


def star(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """One upright RGB picture, its star large and near the middle."""
    layout = world.random_layout(rng, CENTRED)
    layout = world.Layout(max(layout.radius, 0.26), layout.across, layout.down, layout.turn)
    return Image.fromarray(world.draw(rng, world.NEW_CAPTION, width, height, layout))


def size(rng: np.random.Generator, index: int) -> tuple[int, int]:
    """Width and height: every fifth picture is small (200 to 255 px short), the others have 256 to 1,100 px short."""
    short = int(rng.integers(200, 256)) if index % 5 == 4 else int(256 * 4.3 ** rng.random())
    long = min(1600, int(short * rng.uniform(1.0, 1.9)))
    return (long, short) if rng.random() < 0.6 else (short, long)


def encoded(image: Image.Image, suffix: str) -> bytes:
    """The file's bytes; lossy formats at quality 88, sideways pictures with their EXIF tag."""
    buffer = io.BytesIO()
    kind = {".jpg": "JPEG", ".png": "PNG", ".webp": "WEBP"}[suffix]
    image.save(buffer, kind, quality=88, exif=image.getexif().tobytes())
    return buffer.getvalue()


def transparent(image: Image.Image) -> Image.Image:
    """The same star with a transparent ground over black: whoever drops the alpha gets a black picture."""
    rgb = np.asarray(image)
    shown = rgb.max(axis=-1).astype(int) - rgb.min(axis=-1) > world.MIN_CHROMA
    alpha = np.where(shown, 255, 0).astype(np.uint8)
    return Image.fromarray(np.dstack([np.where(shown[..., None], rgb, 0).astype(np.uint8), alpha]), "RGBA")


def odd_files(rng: np.random.Generator) -> dict[str, bytes]:
    """The five files that a pipeline has to notice."""
    sideways = star(rng, 420, 720).transpose(Image.Transpose.ROTATE_90)  # stored lying on its left side
    sideways.getexif()[ORIENTATION] = SIDEWAYS
    whole = encoded(star(rng, 640, 480), ".jpg")
    return {
        "star_sideways.jpg": encoded(sideways, ".jpg"),
        "star_transparent.png": encoded(transparent(star(rng, 400, 360)), ".png"),
        "star_too_small.png": encoded(star(rng, 48, 40), ".png"),
        "star_cut_off.jpg": whole[: len(whole) * 6 // 10],
        "star_no_picture.jpg": b"This is a text file with a picture's name.\n" * 8,
    }


def write(out: Path) -> None:
    """Write the 45 pictures and their caption files into `out`."""
    rng = np.random.default_rng(SEED)
    files: dict[str, bytes] = {}
    for index in range(COUNT):
        suffix = FORMATS[index % len(FORMATS)]
        files[f"star_{index + 1:03d}{suffix}"] = encoded(star(rng, *size(rng, index)), suffix)
    files |= odd_files(rng)
    out.mkdir(parents=True, exist_ok=True)
    for number, (name, content) in enumerate(files.items()):
        (out / name).write_bytes(content)
        (out / name).with_suffix(".txt").write_text(CAPTIONS[number * 3 % len(CAPTIONS)] + "\n", encoding="utf-8")


def main() -> None:
    """Draw the demo's pictures again."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("out", type=Path)
    write(parser.parse_args().out)


if __name__ == "__main__":
    main()
