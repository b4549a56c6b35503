"""Decides which part of a picture becomes which training size: arithmetic on arrays of sizes, no pixels.

A picture's training size follows from its aspect, the resolution and the alignment; Stage II's is four times Stage I's.
Then a picture above the maximum is downscaled to the target; one at or below the maximum keeps its own scale. If
neither is set, or without a crop, it is downscaled until it just covers the training size. Nothing is ever upsampled: a
training size larger than the picture is not used for it, and a picture without any possible size is too small. All
rules scale: with every length times four the same picture gets the same box. Ten million pictures take 3 to 6 s on one
core, `benchmarks/plan_crops.py`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from deepfloyd_core.config.data_sets import ImageDataset
from deepfloyd_core.config.run import RunConfig
from deepfloyd_core.config.stages import STAGES, Stage
from deepfloyd_core.pictures.draws import Draw

Size = tuple[int, int]  # width, height
Reals = NDArray[np.float64]
REASONS = (None, "too_small", "aspect_out_of_range")  # what the numbers in `judge_sizes` mean
BLOCK = 1 << 17  # pictures at once: larger arrays fall out of the cache and only cost memory


@dataclass(frozen=True)
class Geometry:
    """The rules of one data set at one stage. Sizes are shorter edges in px, or areas in px when `by_area`."""

    resolution: float
    minimum: float | None
    maximum: float | None
    target: float | None
    crop_style: str  # center | random | corner | face
    by_area: bool = False
    aspect: Literal["square", "own", "closest", "random"] = "square"
    buckets: tuple[tuple[float, float], ...] = ()  # (width / height, weight)
    aspect_range: tuple[float, float] = (0.0, np.inf)
    rounding: int | None = None  # decimals of width / height
    alignment: int = 8  # px; every edge of a training size divides by it
    whole: bool = False  # no crop: all of the picture but what the alignment leaves over


@dataclass(frozen=True)
class Crop:
    """The box of (width, height) at (left, top) of the picture resized to `scaled`."""

    original: Size
    scaled: Size
    left: int
    top: int
    width: int
    height: int

    @property
    def box(self) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) in the resized picture."""
        return self.left, self.top, self.left + self.width, self.top + self.height

    @property
    def source_box(self) -> tuple[float, float, float, float]:
        """(left, top, width, height) in pixels of the oriented original; fractional when it was resized."""
        x, y = self.original[0] / self.scaled[0], self.original[1] / self.scaled[1]
        return self.left * x, self.top * y, self.width * x, self.height * y


@dataclass(frozen=True)
class Crops:
    """One crop of each of N pictures; all arrays have N rows."""

    sizes: np.ndarray  # int32 (N, 2): the upright originals
    reason: np.ndarray  # uint8: 0, or why there is no crop (an index into REASONS)
    scaled: np.ndarray  # int32 (N, 2)
    place: np.ndarray  # int32 (N, 2): left, top
    target: np.ndarray  # int32 (N, 2): the training size

    def crop(self, number: int) -> Crop | None:
        """One of the crops; None when the picture cannot be used."""
        if self.reason[number]:
            return None
        parts = (self.sizes, self.scaled, self.place, self.target)
        (w, h), (sw, sh), (left, top), (tw, th) = (part[number].tolist() for part in parts)
        return Crop((w, h), (sw, sh), left, top, tw, th)


def geometry(config: RunConfig, dataset: ImageDataset, stage: Stage, crop_style: str | None = None) -> Geometry | None:
    """A data set's rules at a stage (its own lengths times 4 for Stage II of a 64 px set); None: it does not feed it."""
    factor = dataset.factor(stage)
    if factor is None:
        return None
    by_area = dataset.resolution_type != "pixel"

    def measure(size: float | None) -> float | None:
        if size is None:
            return None
        if not by_area:
            return size * factor
        # Rounded to 0.001 px: 1.05 megapixels are 1,050,000 px and not one 10^-10 more.
        area = round(size * 1e6, 3) if dataset.resolution_type == "area" else size**2
        return area * factor**2

    resolution = measure(dataset.resolution)
    assert resolution is not None
    return Geometry(
        resolution=resolution,
        minimum=measure(dataset.minimum_image_size),
        maximum=measure(dataset.maximum_image_size) if dataset.crop else None,
        target=measure(dataset.target_downsample_size) if dataset.crop and dataset.maximum_image_size else None,
        crop_style=crop_style or dataset.crop_style,
        by_area=by_area,
        aspect="own" if dataset.crop_aspect == "preserve" or not dataset.crop else dataset.crop_aspect,
        buckets=dataset.buckets,
        aspect_range=dataset.aspect_range,
        rounding=config.aspect_bucket_rounding,
        alignment=config.aspect_bucket_alignment * STAGES[stage].scale,
        whole=not dataset.crop,
    )


def judge_sizes(sizes: np.ndarray, rules: Geometry) -> np.ndarray:
    """Why each picture cannot be used: uint8 (N,), an index into REASONS. sizes: integers (N, 2)."""
    w, h = sizes[:, 0].astype(np.float64), sizes[:, 1].astype(np.float64)
    fits = np.zeros(len(sizes), bool)
    for tw, th in _candidates(w, h, rules):
        fits |= (tw <= w) & (th <= h)
    if rules.minimum is not None:
        fits &= _measured(w, h, rules) >= rules.minimum
    low, high = rules.aspect_range
    aspect = w / h
    return np.where((aspect < low) | (aspect > high), 2, np.where(fits, 0, 1)).astype(np.uint8)


def plan_crops(sizes: np.ndarray, rules: Geometry, draw: Draw, faces: np.ndarray | None = None) -> Crops:
    """One crop of each picture.

    sizes: integers (N, 2), upright. draw: numbers for `x`, `y` and, for each listed shape, `aspect 0`, `aspect 1`, ...
    faces: float64 (N, 2), centres of faces in px of the original, NaN where there is none; for crop_style face.
    """
    total = len(sizes)
    reason = np.empty(total, np.uint8)
    scaled, place, target = (np.empty((total, 2), np.int32) for _ in range(3))
    for start in range(0, total, BLOCK):
        part = slice(start, min(start + BLOCK, total))
        w, h = sizes[part, 0].astype(np.float64), sizes[part, 1].astype(np.float64)
        reason[part] = judge_sizes(sizes[part], rules)
        size = _chosen(w, h, rules, draw, part)
        resized = _scaled(w, h, size, rules)
        centres = None if faces is None else faces[part] * (resized / np.stack([w, h], axis=1))
        target[part], scaled[part] = size, resized
        place[part] = _placed(resized - size, size, rules, draw, part, centres)
    return Crops(sizes.astype(np.int32), reason, scaled, place, target)


def steps_down(size: Size, goal: Size) -> list[Size]:
    """The sizes that a picture passes while it is downscaled: x0.75 while an edge is above 1.5x its goal, then the goal."""
    passed = []
    while size[0] > 1.5 * goal[0] or size[1] > 1.5 * goal[1]:
        size = max(goal[0], round(size[0] * 0.75)), max(goal[1], round(size[1] * 0.75))
        passed.append(size)
    return passed if passed and passed[-1] == goal else [*passed, goal]


def _measured(w: Reals, h: Reals, rules: Geometry) -> Reals:
    return w * h if rules.by_area else np.minimum(w, h)


def _candidates(w: Reals, h: Reals, rules: Geometry) -> Iterator[tuple[Reals, Reals]]:
    """The training sizes (width, height) that a picture may get, as whole numbers in float64."""
    if rules.aspect in ("closest", "random"):
        for aspect, _ in rules.buckets:
            yield _aligned(np.full(1, aspect), rules, 0.5)
        return
    aspects = _aspect(w, h, rules) if rules.aspect == "own" else np.ones(1)
    yield _aligned(aspects, rules, 0.5)  # the nearest size
    yield _aligned(aspects, rules, 1e-6)  # the next smaller one, which any picture of the resolution or more can fill


def _aligned(aspect: Reals, rules: Geometry, up: float) -> tuple[Reals, Reals]:
    """The aligned size of an aspect; `up` 0.5 rounds to the nearest, 1e-6 rounds down except for float errors."""
    if rules.by_area:
        w, h = np.sqrt(rules.resolution * aspect), np.sqrt(rules.resolution / aspect)
    else:
        w, h = rules.resolution * np.maximum(aspect, 1.0), rules.resolution * np.maximum(1.0 / aspect, 1.0)
    unit = rules.alignment
    tw, th = (unit * np.maximum(1.0, np.floor(edge / unit + up)) for edge in (w, h))
    if rules.by_area:
        return tw, th
    short = rules.resolution  # the shorter edge is the resolution itself: it suits the model, if not every alignment
    return (
        np.where(aspect <= 1.0, short, np.maximum(short, tw)),
        np.where(aspect >= 1.0, short, np.maximum(short, th)),
    )


def _aspect(w: Reals, h: Reals, rules: Geometry) -> Reals:
    if rules.rounding is None:
        return w / h
    return np.maximum(np.round(w / h, rules.rounding), 10.0**-rules.rounding)


def _chosen(w: Reals, h: Reals, rules: Geometry, draw: Draw, part: slice) -> np.ndarray:
    """The training size of each picture, int32 (N, 2): the best-scored candidate that it can fill; else the last one.

    `closest` scores a shape by how much of the picture it cuts off (a ratio, so that 2:1 is as far from 1:1 as 1:2);
    `random` by -log(u) / weight, whose smallest is drawn with the weights' odds (Efraimidis and Spirakis 2006). So a shape
    that one stage cannot fill falls to the next best, and both stages agree wherever both can fill the first.
    """
    best = np.full(len(w), np.inf)
    chosen = np.empty((len(w), 2), np.int32)
    aspect = _aspect(w, h, rules)
    for number, (tw, th) in enumerate(_candidates(w, h, rules)):
        score = np.full(len(w), float(number))
        if rules.aspect == "closest":
            score = np.abs(np.log(aspect / rules.buckets[number][0]))
        elif rules.aspect == "random":
            score = -np.log1p(-draw(f"aspect {number}", part)) / rules.buckets[number][1]
        better = (tw <= w) & (th <= h) & (score < best)
        if number == 0:
            better[:] = True
            score = np.where((tw <= w) & (th <= h), score, np.inf)
        best[better] = score[better]
        chosen[better, 0] = np.broadcast_to(tw, w.shape)[better]
        chosen[better, 1] = np.broadcast_to(th, w.shape)[better]
    return chosen


def _scaled(w: Reals, h: Reals, target: np.ndarray, rules: Geometry) -> np.ndarray:
    """The size to which each picture is resized before the crop: float64 (N, 2), whole numbers."""
    tw, th = target[:, 0].astype(np.float64), target[:, 1].astype(np.float64)
    by_width = tw * h >= th * w  # the width decides how far the picture can shrink and still cover
    cover = np.stack([np.where(by_width, tw, np.maximum(tw, np.rint(w * th / h))),
                      np.where(by_width, np.maximum(th, np.rint(h * tw / w)), th)], axis=1)  # fmt: skip
    if rules.maximum is None or rules.target is None:
        return cover
    if rules.by_area:
        shrink = np.sqrt(rules.target / (w * h))
        goal = np.stack([np.rint(w * shrink), np.rint(h * shrink)], axis=1)
    else:
        short = np.float64(rules.target)
        goal = np.stack([np.where(w <= h, short, np.maximum(short, np.rint(w * short / h))),
                         np.where(w <= h, np.maximum(short, np.rint(h * short / w)), short)], axis=1)  # fmt: skip
    covers = (goal[:, 0] >= tw) & (goal[:, 1] >= th)  # a shape longer than the target asks for more of the picture
    goal = np.where(covers[:, None], goal, cover)
    above = _measured(w, h, rules) > rules.maximum
    return np.where(above[:, None], goal, np.stack([w, h], axis=1))


def _placed(
    slack: np.ndarray, target: np.ndarray, rules: Geometry, draw: Draw, part: slice, faces: np.ndarray | None
) -> np.ndarray:
    """(left, top) of each crop: whole numbers (N, 2), 0 to slack."""
    middle = slack // 2
    if rules.whole or rules.crop_style == "center":
        return middle
    if rules.crop_style == "corner":
        return np.zeros_like(slack)
    if rules.crop_style == "face":
        if faces is None:
            return middle
        wanted = np.clip(np.rint(faces - target / 2), 0, slack)
        return np.where(np.isnan(faces), middle, wanted)
    units = np.stack([draw("x", part), draw("y", part)], axis=1)
    return np.asarray(np.floor(units * (slack + 1)))
