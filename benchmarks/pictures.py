"""How fast crops are made, side by side with the literal recipe and others.

The corpus: 100 pictures of 0.5 to 12 megapixels from the photographs inside scikit-image and scikit-learn. Each is enlarged
at most twice and then mirrored at its edges, so that large ones keep natural detail; all of it follows from the numbers.
Every contender gets the same bytes and makes the same crop. Rounds are interleaved, one thread, CPU time.
"""

import argparse
import io
import os
import platform
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import numpy as np
import PIL
import skimage
import sklearn
from PIL import Image

from deepfloyd_core.pictures.geometry import Size, steps_down
from deepfloyd_core.pictures.resize import Box, take_crops

LANCZOS = Image.Resampling.LANCZOS
FOLDERS = Path(skimage.__file__).parent / "data", Path(sklearn.__file__).parent / "datasets" / "images"
NAMES = (
    "china.jpg", "flower.jpg", "astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg", "retina.jpg",
    "hubble_deep_field.jpg", "motorcycle_left.png", "ihc.png", "grass.png", "gravel.png", "brick.png", "moon.png",
    "camera.png", "coins.png",
)  # fmt: skip
MEGAPIXELS = (0.5, 0.8, 1.2, 1.6, 2, 3, 4, 5.2, 6, 8, 10, 12)
ASPECTS = (4 / 3, 3 / 4, 3 / 2, 1, 16 / 9)
QUALITIES = (75, 85, 90, 95)
PASSES = 8  # over the corpus, for the two processes: the end, when one has nothing left to do, then weighs little
FORMATS = ("4:2:0", "4:4:4", "4:2:0", "progressive", "4:2:0", "PNG", "4:2:0", "progressive", "4:4:4", "WEBP")


@dataclass(frozen=True)
class Sample:
    """One picture of the corpus and the crop that is made of it."""

    kind: str
    size: Size
    data: bytes
    scaled: Size
    box: Box

    @property
    def is_jpeg(self) -> bool:
        return self.kind not in ("PNG", "WEBP")

    @property
    def is_large(self) -> bool:
        return self.size[0] * self.size[1] > 5e6


def photograph(number: int) -> Image.Image:
    """Picture `number` of the corpus."""
    name = NAMES[number % len(NAMES)]
    source = Image.open(next(folder / name for folder in FOLDERS if (folder / name).exists())).convert("RGB")
    rng = np.random.default_rng(number)
    aspect = ASPECTS[number % len(ASPECTS)] * rng.uniform(0.97, 1.03)
    pixels = MEGAPIXELS[number * 5 % len(MEGAPIXELS)] * 1e6
    width = round((pixels * aspect) ** 0.5)
    height = round(pixels / width)
    grow = min(2.0, max(width / source.width, height / source.height))
    picture = np.asarray(source.resize((round(source.width * grow), round(source.height * grow)), LANCZOS))
    missing = [(0, max(0, side - have)) for side, have in zip((height, width), picture.shape[:2], strict=True)]
    picture = np.pad(picture, (*missing, (0, 0)), mode="symmetric")
    top, left = (int(rng.integers(have - side + 1)) for side, have in zip((height, width), picture.shape, strict=False))
    return Image.fromarray(np.ascontiguousarray(picture[top : top + height, left : left + width]))


def corpus(count: int, edge: int) -> list[Sample]:
    """`count` pictures; of each the middle square, its shorter edge brought to `edge`."""
    samples = []
    for number in range(count):
        picture, kind, buffer = photograph(number), FORMATS[number % len(FORMATS)], io.BytesIO()
        quality = QUALITIES[number // 3 % len(QUALITIES)]
        if kind == "PNG":
            picture.save(buffer, "PNG")
        elif kind == "WEBP":
            picture.save(buffer, "WEBP", quality=quality)
        else:
            subsampling = 0 if kind == "4:4:4" else 2
            picture.save(buffer, "JPEG", quality=quality, subsampling=subsampling, progressive=kind == "progressive")
        size = picture.size
        scaled = max(edge, round(size[0] * edge / min(size))), max(edge, round(size[1] * edge / min(size)))
        left, top = (scaled[0] - edge) // 2, (scaled[1] - edge) // 2
        samples.append(Sample(kind, size, buffer.getvalue(), scaled, (left, top, left + edge, top + edge)))
    return samples


def ours(sample: Sample) -> np.ndarray:
    return take_crops(sample.data, [(sample.scaled, sample.box)])[0][0]


def literal(sample: Sample) -> np.ndarray:
    """The recipe as it is written down, in Pillow."""
    picture = Image.open(io.BytesIO(sample.data)).convert("RGB")
    for size in steps_down(picture.size, sample.scaled):
        picture = picture.resize(size, LANCZOS)
    return np.asarray(picture.crop(sample.box))


def one_step(sample: Sample) -> np.ndarray:
    """A full decode and one LANCZOS."""
    picture = Image.open(io.BytesIO(sample.data)).convert("RGB")
    return np.asarray(picture.resize(sample.scaled, LANCZOS).crop(sample.box))


def floor(sample: Sample) -> None:
    """Nothing but a decode, of a JPEG at one eighth: what a crop costs at least without leaving scans out."""
    picture = Image.open(io.BytesIO(sample.data))
    picture.draft("RGB", (picture.width // 8, picture.height // 8))
    picture.load()


def img2dataset(edge: int) -> Callable[[Sample], object] | None:
    """img2dataset's Resizer as its users call it; its JPEG encoding of the result is included, and small."""
    try:
        import cv2
        from img2dataset.resizer import Resizer
    except ImportError:
        return None
    cv2.setNumThreads(1)
    resizer = Resizer(edge, "center_crop", resize_only_if_bigger=True, encode_quality=95)
    return lambda sample: resizer(io.BytesIO(sample.data))


def psnr(one: np.ndarray, two: np.ndarray) -> float:
    error = float(np.mean((one.astype(float) - two.astype(float)) ** 2))
    return float("inf") if error == 0 else 10 * np.log10(255**2 / error)


def cpu_times(samples: list[Sample], contenders: dict[str, Callable[[Sample], object]], rounds: int) -> np.ndarray:
    """CPU seconds, (round, contender, sample). The contenders take turns at every sample."""
    seconds = np.zeros((rounds, len(contenders), len(samples)))
    for turn in range(rounds):
        for place, sample in enumerate(samples):
            for which, contender in enumerate(contenders.values()):
                start = time.process_time()
                contender(sample)
                seconds[turn, which, place] = time.process_time() - start
    return seconds


def workers(samples: list[Sample], rounds: int) -> tuple[float, float]:
    """Wall seconds for `PASSES` times the corpus with one process and with two, medians of interleaved rounds.

    Each process has the pictures from its start, as a worker that reads its own files: none passes through a pipe.
    """
    walls: dict[int, list[float]] = {1: [], 2: []}
    shared = {"initializer": _corpus.extend, "initargs": (samples,), "mp_context": get_context("fork")}
    with ProcessPoolExecutor(1, **shared) as one, ProcessPoolExecutor(2, **shared) as two:
        numbers = list(range(len(samples))) * PASSES
        for pool in (one, two):
            list(pool.map(_crop, numbers[:8]))
        for _ in range(rounds):
            for count, pool in ((1, one), (2, two)):
                start = time.perf_counter()
                list(pool.map(_crop, numbers, chunksize=4))
                walls[count].append(time.perf_counter() - start)
    return median(walls[1]), median(walls[2])


_corpus: list[Sample] = []  # of a worker process


def _crop(number: int) -> None:
    ours(_corpus[number])


def report(samples: list[Sample], edge: int, rounds: int) -> None:
    """Print one table."""
    contenders: dict[str, Callable[[Sample], object]] = {
        "ours": ours, "literal": literal, "one LANCZOS": one_step, "floor": floor,
    }  # fmt: skip
    other = img2dataset(edge)
    if other:
        contenders["img2dataset"] = other
    quality = np.array([psnr(ours(sample), literal(sample)) for sample in samples])
    methods = [take_crops(sample.data, [(sample.scaled, sample.box)])[0][1] for sample in samples]
    seconds = cpu_times(samples, contenders, rounds)
    names = list(contenders)
    groups: dict[str, Callable[[Sample], bool]] = {
        "all JPEGs": lambda s: s.is_jpeg, "JPEG > 5 MP": lambda s: s.is_jpeg and s.is_large,
        "baseline JPEG": lambda s: s.kind.startswith("4:"), "progressive": lambda s: s.kind == "progressive",
        "PNG": lambda s: s.kind == "PNG", "WebP": lambda s: s.kind == "WEBP",
    }  # fmt: skip
    print(f"\n### {edge} px\n\npictures/s (spread of {rounds} rounds), x = times the literal recipe\n")
    print(f"| pictures | n | {' | '.join(names)} | x | of the floor | PSNR min | PSNR 5 % | literal |")
    print("|---" * (len(names) + 7) + "|")
    for title, belongs in groups.items():
        chosen = [place for place, sample in enumerate(samples) if belongs(sample)]
        rates = len(chosen) / seconds[:, :, chosen].sum(2)  # (round, contender)
        middle = np.median(rates, 0)
        spread = (rates.max(0) - rates.min(0)) / middle / 2
        cells = [f"{rate:.1f} ±{100 * part:.0f} %" for rate, part in zip(middle, spread, strict=True)]
        ratio, share = middle[0] / middle[1], middle[0] / middle[3]
        finite = np.minimum(quality[chosen], 99)
        used = sum(methods[place] == "literal" for place in chosen)
        print(f"| {title} | {len(chosen)} | {' | '.join(cells)} | {ratio:.1f} | {share:.0%} "
              f"| {finite.min():.1f} | {np.percentile(finite, 5):.1f} | {used} |")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100, help="pictures in the corpus")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--edges", type=int, nargs="+", default=[64, 128], help="edges of the crops, px")
    wanted = parser.parse_args()
    versions = f"Python {platform.python_version()}, Pillow {PIL.__version__}"
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; {versions}; {wanted.count} pictures"
    )
    if img2dataset(64) is None:
        print("img2dataset is not installed and not compared: pip install -e '.[bench]'")
    for edge in wanted.edges:
        report(corpus(wanted.count, edge), edge, wanted.rounds)
    jpegs = [sample for sample in corpus(wanted.count, 64) if sample.is_jpeg]
    one, two = workers(jpegs, wanted.rounds)
    made = PASSES * len(jpegs)
    rates = f"{made / one:.1f} and {made / two:.1f} JPEGs/s of wall time"
    print(f"\nTwo processes: {one / two:.2f}x one ({rates}, 64 px)")


if __name__ == "__main__":
    main()
