"""Makes training crops that match the literal recipe to 40 dB PSNR, in a tenth of its time.

The literal recipe resizes by 0.75 with LANCZOS while an edge is above 1.5x its goal, then to the goal with LANCZOS.
Most of its time goes into pixels that are averaged away. Means of 2x2, 4x4 or 8x8 pixels cost almost nothing; a JPEG
decoder even computes them without a full decode. So: take the coarsest means that are still twice the goal, resize them
to the recipe's last size but one, and do its last step. A single LANCZOS step to the goal differs more from the recipe
than these means do (39 dB on grass).

The means fail for detail that they hide: fine stripes become wider stripes (aliasing). Each step of the recipe also
clips its ringing at black and white, which makes thin bright lines brighter; the means do not. So the detail is
measured first, and a picture beyond the limits below is resized literally.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import cached_property
from math import ceil, floor

import numpy as np
from PIL import Image, ImageFilter

from deepfloyd_core.pictures.decode import Reduced, decode_reduced, decode_rgb, read_header
from deepfloyd_core.pictures.detail import Detail, detail_of, detail_of_jpeg
from deepfloyd_core.pictures.faults import Unreadable
from deepfloyd_core.pictures.geometry import Size, steps_down
from deepfloyd_core.pictures.jpeg_scans import Layout, read_layout
from deepfloyd_core.pictures.plain import reduced_plain

Box = tuple[int, int, int, int]  # left, top, right, bottom
LITERAL, KEPT = "literal", "kept"
DIVISORS = (8, 4, 2, 1)
LARGE_PX = 1 << 25  # a third of a GB while it is cropped
MIN_RATIO = 2.0  # of means to goal, each edge
# Levels of 255, root mean square. Unaltered photographs have at most 33, 10, 46 and 12.
MAX_CONTRAST = 34.0  # inside 8x8 px
MAX_REGULAR = 3.5  # times the ratio: the finer the means, the less of a regular pattern they get wrong
MAX_REACH = 48.0  # inside and between the means, strongest channel
MAX_CLIPPED = 12.0  # by how much that goes beyond black and white, mean
SEEN_PX = 1 << 14  # so many pixels tell it to a few per cent
_LANCZOS, _REACH = Image.Resampling.LANCZOS, 3


def take_crops(
    data: bytes, crops: Sequence[tuple[Size, Box]], alone: Callable[[], AbstractContextManager[object]] = nullcontext
) -> list[tuple[np.ndarray, str]]:
    """Resize a picture's upright sRGB pixels to each size and cut the box out: uint8 (height, width, 3), and the method.

    alone: a lock, held from a decode of more than LARGE_PX pixels to the last crop, so that only one of many workers
    has such a picture in memory.

    Method: "kept" (its own size), "literal", or "scaled 1/2", "scaled 1/4", "scaled 1/8". The picture is decoded at
    most once at each scale. Raises Unreadable.
    """
    with ExitStack() as stack:
        try:
            source = _Source(data, lambda: stack.enter_context(alone()))
            made = [_shrink(source, scaled, box) for scaled, box in crops]
            return [(np.asarray(picture, dtype=np.uint8), method) for picture, method in made]
        except MemoryError:
            raise Unreadable("out_of_memory", "its crops do not fit into the memory that is left") from None


class _Source:
    """A picture's bytes, and the pixels decoded from them so far."""

    def __init__(self, data: bytes, enter_alone: Callable[[], object]) -> None:
        self.data, self._enter_alone, self._is_alone = data, enter_alone, False
        self.is_jpeg = data.startswith(b"\xff\xd8\xff")
        self.header = read_header(data)
        self.size = self.header.size
        self._reduced: dict[int, Reduced | None] = {}

    @cached_property
    def plain(self) -> np.ndarray | None:
        """The pixels, uint8 (H, W, 3), of a PNG or WebP that needs no conversion."""
        if self.header.plain is None:
            return None
        self._before(1)
        return self.header.plain.pixels(self.data)

    @cached_property
    def full(self) -> Image.Image:
        self._before(1)
        return decode_rgb(self.data) if self.plain is None else Image.fromarray(self.plain)

    def _before(self, divisor: int) -> None:
        """Wait for other workers before a decode at 1 / divisor of each edge that takes much memory."""
        if not self._is_alone and self.size[0] * self.size[1] > LARGE_PX * divisor**2:
            self._enter_alone()
            self._is_alone = True

    @cached_property
    def layout(self) -> Layout | None:
        return read_layout(self.data) if self.is_jpeg else None

    @cached_property
    def detail(self) -> Detail | None:
        if self.is_jpeg:
            return detail_of_jpeg(self.data, self.layout)
        return detail_of(self.full) if self.plain is None else detail_of(self.plain)

    def reduced(self, divisor: int) -> Reduced | None:
        if divisor not in self._reduced:
            self._reduced[divisor] = self._reduce(divisor)
        return self._reduced[divisor]

    def _reduce(self, divisor: int) -> Reduced | None:
        if self.is_jpeg:
            self._before(divisor)
            return decode_reduced(self.data, self.header, divisor, self.layout)
        width, height = self.size
        means = self.full.reduce(divisor) if self.plain is None else reduced_plain(self.plain, divisor)
        return Reduced(means, (0, 0, width / divisor, height / divisor))


def _shrink(source: _Source, scaled: Size, box: Box) -> tuple[Image.Image, str]:
    if scaled == source.size:
        return source.full.crop(box), KEPT
    ratio = min(source.size[0] / scaled[0], source.size[1] / scaled[1])
    if ratio >= DIVISORS[-1] * MIN_RATIO and source.detail and source.detail.contrast <= MAX_CONTRAST:
        least = max(MIN_RATIO, source.detail.regular / MAX_REGULAR)
        divisor = next((divisor for divisor in DIVISORS if ratio >= divisor * least), None)
        reduced = source.reduced(divisor) if divisor else None
        if divisor and reduced and _is_safe(reduced, scaled, box, source.detail):
            return _finish(source.size, reduced, scaled, box), f"scaled 1/{divisor}"
    return literal(source.full, scaled).crop(box), LITERAL


def literal(picture: Image.Image, scaled: Size) -> Image.Image:
    """The recipe itself: x0.75 with LANCZOS while an edge is above 1.5x its goal, then LANCZOS to the goal."""
    for size in steps_down(picture.size, scaled):
        picture = picture.resize(size, _LANCZOS)
    return picture


def _is_safe(reduced: Reduced, scaled: Size, box: Box, detail: Detail) -> bool:
    """Whether a crop's detail, inside the means and between them, is moderate and seldom reaches black or white."""
    left, top, right, bottom = reduced.box
    across, down = (right - left) / scaled[0], (bottom - top) / scaled[1]
    area = left + box[0] * across, top + box[1] * down, left + box[2] * across, top + box[3] * down
    picture = reduced.pixels.crop((floor(area[0]), floor(area[1]), ceil(area[2]), ceil(area[3])))
    pixels = np.asarray(picture)
    # Rows at random, not every third: a pattern may have that period.
    some = np.random.default_rng(0).permutation(len(pixels) - 1)[: ceil(SEEN_PX / picture.width)]
    rows, below = pixels[some].astype(np.float32), pixels[some + 1].astype(np.float32)
    between = (_mean_square(below - rows) + _mean_square(rows[:, 1:] - rows[:, :-1])) / 2
    levels, reach = np.arange(256), (detail.contrast**2 + float(between.max())) ** 0.5
    shares = np.bincount(pixels[some].ravel(), minlength=256) / rows.size
    clipped = shares @ np.maximum(0, reach - np.minimum(levels, 255 - levels))
    return bool(reach <= MAX_REACH and clipped <= MAX_CLIPPED)


def _mean_square(pixels: np.ndarray) -> np.ndarray:
    """Of each channel: (H, W, C) -> (C,). NumPy's own mean over two axes takes three times as long."""
    flat = pixels.reshape(-1, pixels.shape[-1])
    squares: np.ndarray = np.einsum("ij,ij->j", flat, flat)
    return squares / len(flat)


def _finish(original: Size, reduced: Reduced, scaled: Size, box: Box) -> Image.Image:
    """From means to the crop by the recipe's last size but one; only what the crop needs is resized."""
    middle = steps_down(original, scaled)[-2]
    left, top, right, bottom = reduced.box
    wide = max(0, box[0] - 1), max(0, box[1] - 1), min(scaled[0], box[2] + 1), min(scaled[1], box[3] + 1)
    x0, x1 = _needed(wide[0], wide[2], scaled[0], middle[0])
    y0, y1 = _needed(wide[1], wide[3], scaled[1], middle[1])
    x, y = (right - left) / middle[0], (bottom - top) / middle[1]
    source = (
        left + x0 * x,
        top + y0 * y,
        min(left + x1 * x, reduced.pixels.width),
        min(top + y1 * y, reduced.pixels.height),
    )
    picture = reduced.pixels.resize((x1 - x0, y1 - y0), _LANCZOS, source)
    x, y = middle[0] / scaled[0], middle[1] / scaled[1]
    inner = wide[0] * x - x0, wide[1] * y - y0, min(wide[2] * x - x0, x1 - x0), min(wide[3] * y - y0, y1 - y0)
    picture = picture.resize((wide[2] - wide[0], wide[3] - wide[1]), _LANCZOS, inner)
    picture = _unblur(picture, min((right - left) / scaled[0], (bottom - top) / scaled[1]))
    return picture.crop((box[0] - wide[0], box[1] - wide[1], box[2] - wide[0], box[3] - wide[1]))


def _needed(start: int, end: int, goal: int, size: int) -> tuple[int, int]:
    """The pixels of `size` that LANCZOS reads to make `start` to `end` of `goal`."""
    factor = size / goal
    margin = _REACH * factor + 1
    return max(0, floor(start * factor - margin)), min(size, ceil(end * factor + margin))


def _unblur(picture: Image.Image, ratio: float) -> Image.Image:
    """Undo the blur of a mean over 1 / ratio of a pixel: subtract the second derivative.

    A box of width w has the response sinc(w f) = 1 - (pi w f)^2 / 6, which the Laplacian times w^2 / 24 corrects; 1/15
    is fitted to 80 photographs, since the resize also blurs (43.2 dB against 41.5 at worst, 0 to 3 dB each).
    """
    part = 1 / (15 * ratio**2)
    kernel = (0, -part, 0, -part, 1 + 4 * part, -part, 0, -part, 0)
    return picture.filter(ImageFilter.Kernel((3, 3), kernel, scale=1))
