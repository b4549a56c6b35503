"""The drawn world of the tiny cascade: one flat shape on a plain light ground, and measures that recognise it.

Pictures come from formulas, so the shipped weights contain nobody's picture, and it can be measured without a learned
model whether a sample shows its caption. The base world has 12 captions, "a {colour} {shape}". "a purple star" is left
out of it: a fine-tune has to teach it, in colour and in outline. Numpy and Pillow only; a picture takes 0.3 ms at 64 px
and 6 ms at 256 px to draw, 5 to 20 ms to measure.

Pictures are uint8 (H, W, 3); masks are float32 (H, W) in [0, 1], 1 = shape; angles are in degrees, lengths in pixels.
"""

import colorsys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Picture = NDArray[np.uint8]
Mask = NDArray[np.bool_]

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 215),
    "yellow": (240, 205, 40),
    "purple": (140, 50, 180),
}
BASE_COLOURS = ("red", "green", "blue", "yellow")
BASE_SHAPES = ("circle", "square", "triangle")
BASE_CAPTIONS = tuple(f"a {colour} {shape}" for colour in BASE_COLOURS for shape in BASE_SHAPES)
NEW_CAPTION = "a purple star"

# Corners of the regular outlines; a circle is an ellipse. A five-pointed star's inner radius is 0.382 of the outer one.
CORNERS = {"square": 4, "triangle": 3, "star": 10}
STAR_INNER = 0.382
STAR_RING = 0.68  # of the outer radius: a circle between a star's inner corners and its tips, where arms are counted
MARGIN = 0.02  # of the shorter edge, between shape and picture edge

# Hue ranges of `main_colour`; the gaps (orange, lime, cyan, violet-blue) belong to no colour, so a near miss is a miss.
HUES = {"red": (330, 385), "yellow": (38, 75), "green": (80, 165), "blue": (190, 250), "purple": (258, 325)}
MIN_CHROMA = 60.0  # max - min channel of 255; drawn shapes have 120 to 200, grounds below 8
MIN_AREA, MAX_AREA = 0.012, 0.8  # share of the picture the shape may fill
RULER_PX = 128  # larger pictures are measured at this size; 64 px pictures as they are


@dataclass(frozen=True)
class Layout:
    """Where a shape lies: its radius as a share of the shorter edge, its centre as shares of the room that is left."""

    radius: float  # of the circumscribed circle; 0.20 to 0.36 in the base world
    across: float  # 0 = as far left as the radius allows, 1 = right
    down: float  # 0 = top, 1 = bottom
    turn: float  # degrees clockwise


def random_layout(rng: np.random.Generator, centred: float = 0.0) -> Layout:
    """Draw a layout. `centred` in [0, 1] pulls the shape to the middle (1 = exactly), so that a square crop keeps it."""
    pull = (1.0 - centred) * rng.uniform(-0.5, 0.5, 2)
    return Layout(rng.uniform(0.20, 0.36), 0.5 + pull[0], 0.5 + pull[1], rng.uniform(-10.0, 10.0))


def shape_mask(shape: str, width: int, height: int, layout: Layout) -> NDArray[np.float32]:
    """Antialiased coverage (H, W) in [0, 1] of one shape."""
    short = min(width, height)
    radius = layout.radius * short
    inset = radius + MARGIN * short
    centre = np.array([inset + layout.across * (width - 2 * inset), inset + layout.down * (height - 2 * inset)])
    if shape == "circle":
        return _covered(
            width, height, lambda brush, scale: brush.ellipse(_box(centre * scale, radius * scale), fill=255)
        )
    corners = CORNERS[shape]
    first = layout.turn + (45.0 if shape == "square" else 0.0)  # a square stands on its side
    angle = np.radians(first + np.arange(corners) * 360.0 / corners)
    reach = np.where(np.arange(corners) % 2 == 1, STAR_INNER, 1.0) if shape == "star" else np.ones(corners)
    return polygon_mask(centre + radius * (reach * np.stack([np.sin(angle), -np.cos(angle)])).T, width, height)


def polygon_mask(corners: NDArray[np.float64], width: int, height: int) -> NDArray[np.float32]:
    """Antialiased coverage (H, W) in [0, 1] of the polygon with these corners (K, 2), x and y in pixels."""

    def paint(brush: ImageDraw.ImageDraw, scale: int) -> None:
        brush.polygon([(float(x), float(y)) for x, y in corners * scale], fill=255)

    return _covered(width, height, paint)


def _box(centre: NDArray[np.float64], radius: float) -> tuple[float, float, float, float]:
    return (centre[0] - radius, centre[1] - radius, centre[0] + radius, centre[1] + radius)


def _covered(width: int, height: int, paint: Callable[[ImageDraw.ImageDraw, int], None]) -> NDArray[np.float32]:
    """What `paint(brush, scale)` fills, drawn `scale` times larger (4; 2 above 512 px) and box-averaged."""
    scale = 4 if max(width, height) <= 512 else 2
    canvas = Image.new("L", (width * scale, height * scale), 0)
    paint(ImageDraw.Draw(canvas), scale)
    return np.asarray(canvas.reduce(scale), dtype=np.float32) / 255.0


def jittered(rng: np.random.Generator, colour: str) -> NDArray[np.float32]:
    """A colour's RGB in [0, 255], off by at most 6 degrees of hue, 8 % of brightness and 5 % of saturation."""
    red, green, blue = COLOURS[colour]
    hue, saturation, value = colorsys.rgb_to_hsv(red / 255, green / 255, blue / 255)
    hue = (hue + rng.uniform(-6, 6) / 360) % 1.0
    saturation = min(1.0, saturation * rng.uniform(0.95, 1.05))
    value = min(1.0, value * rng.uniform(0.92, 1.08))
    return np.array(colorsys.hsv_to_rgb(hue, saturation, value), dtype=np.float32) * 255


def draw(
    rng: np.random.Generator, caption: str, width: int, height: int | None = None, layout: Layout | None = None
) -> Picture:
    """Draw a caption's picture (height, width, 3). The last two words of the caption are its colour and shape.

    Position, size, turn, ground (light grey, 204 to 255) and the colour's jitter come from `rng`, in that order; the
    same generator state gives the same layout at 64 and at 256 px.
    """
    height = width if height is None else height
    colour, shape = caption.split()[-2:]
    layout = random_layout(rng) if layout is None else layout
    ground = rng.uniform(0.8, 1.0) * 255 + rng.uniform(-2, 2, 3)
    ink = jittered(rng, colour)
    mask = shape_mask(shape, width, height, layout)[..., None]
    return np.asarray(np.clip(ground * (1 - mask) + ink * mask + 0.5, 0, 255), dtype=np.uint8)


def draw_strange(rng: np.random.Generator, side: int, any_ground: bool) -> Picture:
    """Draw a picture (side, side, 3) without a caption: one to three polygons without a name, in any colour.

    With `any_ground` (for Stage II) everything has any colour. Without it (for Stage I) the ground is light grey, as in
    `draw`, and nothing is purple, which only the demo teaches. From these pictures Stage I learns that outlines may
    have dents, and Stage II learns to copy the low-res picture instead of painting memorised shapes.
    """
    ground = _any_colour(rng, True) if any_ground else rng.uniform(0.8, 1.0) * 255 + rng.uniform(-2, 2, 3)
    picture = np.broadcast_to(ground, (side, side, 3)).astype(np.float32)
    for _ in range(int(rng.integers(1, 4)) if any_ground else 1):
        mask = polygon_mask(_strange_corners(rng, side), side, side)[..., None]
        picture = picture * (1 - mask) + _any_colour(rng, any_ground) * mask
    return np.asarray(np.clip(picture + 0.5, 0, 255), dtype=np.uint8)


def _strange_corners(rng: np.random.Generator, side: int) -> NDArray[np.float64]:
    """Corners (K, 2) in pixels, 3 to 12 at uneven angles and reaches around a centre."""
    count = int(rng.integers(3, 13))
    angle = 2 * np.pi * (np.arange(count) + rng.uniform(-0.35, 0.35, count)) / count + rng.uniform(0, 2 * np.pi)
    reach = side * rng.uniform(0.2, 0.36) * rng.uniform(rng.uniform(0.3, 0.9), 1.0, count)
    centre = side * (0.5 + rng.uniform(-0.15, 0.15, 2))
    return np.asarray(centre + reach[:, None] * np.stack([np.sin(angle), -np.cos(angle)], axis=1))


def _any_colour(rng: np.random.Generator, purple: bool) -> NDArray[np.float32]:
    """RGB in [0, 255] of any hue (but purple's surroundings), any saturation, any brightness above 0.15."""
    first, last = (0, 360) if purple else (HUES["purple"][1] + 10, HUES["purple"][0] - 10 + 360)
    hue = (rng.uniform(first, last) % 360) / 360
    return np.array(colorsys.hsv_to_rgb(hue, rng.uniform(0, 1), rng.uniform(0.15, 1)), dtype=np.float32) * 255


def main_colour(picture: Picture) -> str | None:
    """Name of the colour that at least 60 % of the saturated foreground has, or None."""
    small = _ruler_size(picture)
    mask = _foreground(small)
    if mask is None:
        return None
    hue = _hue(small)[mask]
    names = list(HUES)
    shares = [float(np.mean(((hue >= low) & (hue <= high)) | (hue + 360 <= high))) for low, high in HUES.values()]
    best = int(np.argmax(shares))
    return names[best] if shares[best] >= 0.6 else None


def main_shape(picture: Picture) -> str | None:
    """Outline of the saturated foreground by plain geometry: "circle", "square", "triangle", "star", or None.

    A star is the only shape that fills little of its convex hull (0.47; blurred at 64 px up to 0.7; the others 0.93 and
    more); it must also have its five arms, give or take one, or any ragged blot would pass. The convex shapes differ in
    how much of the circle around them their hull fills: 1.0, 0.64 and 0.41.
    """
    mask = _foreground(_ruler_size(picture))
    if mask is None:
        return None
    ys, xs = np.nonzero(mask)
    # Pixel corners, not centres: a hull of centres loses half a pixel on every side, 10 % of a small shape's area.
    points = np.concatenate([np.stack([xs + dx, ys + dy], axis=1) for dx in (0, 1) for dy in (0, 1)])
    hull = convex_hull(points)
    hull_area = polygon_area(hull)
    centre = np.array([xs.mean() + 0.5, ys.mean() + 0.5])
    reach = float(np.max(np.hypot(*(hull - centre).T)))
    if len(xs) / hull_area < 0.78:
        return "star" if 4 <= _arms(mask, centre, STAR_RING * reach) <= 6 else None
    if len(xs) / hull_area < 0.86:
        return None
    roundness = hull_area / (np.pi * reach**2)
    return "circle" if roundness > 0.8 else "square" if roundness > 0.58 else "triangle"


def shows(picture: Picture, caption: str) -> bool:
    """Whether a picture shows its caption: the colour must match and, for the star, the outline too."""
    words = caption.split()
    colour = next((word for word in words if word in COLOURS), None)
    if main_colour(picture) != colour:
        return False
    return "star" not in words or main_shape(picture) == "star"


def convex_hull(points: NDArray[np.integer]) -> NDArray[np.float64]:
    """Corners (K, 2) of the convex hull of integer points (N, 2), Andrew's monotone chain."""
    ordered = np.unique(points, axis=0).tolist()

    def half(sequence: list[list[int]]) -> list[list[int]]:
        chain: list[list[int]] = []
        for x, y in sequence:
            while len(chain) > 1 and _turn(chain[-2], chain[-1], (x, y)) <= 0:
                chain.pop()
            chain.append([x, y])
        return chain[:-1]

    return np.array(half(ordered) + half(ordered[::-1]), dtype=np.float64)


def polygon_area(corners: NDArray[np.float64]) -> float:
    """Area of a simple polygon (K, 2), the shoelace formula."""
    x, y = corners.T
    return float(abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))) / 2


def _arms(mask: Mask, centre: NDArray[np.float64], radius: float) -> int:
    """How often a circle (centre as x, y) enters the mask: the arms of a star."""
    angle = np.radians(np.arange(0, 360, 2))
    x = np.floor(centre[0] + radius * np.sin(angle)).astype(int).clip(0, mask.shape[1] - 1)
    y = np.floor(centre[1] - radius * np.cos(angle)).astype(int).clip(0, mask.shape[0] - 1)
    inside = mask[y, x]
    return int(np.count_nonzero(inside & ~np.roll(inside, 1)))


def _turn(a: list[int], b: list[int], c: tuple[int, int]) -> int:
    """Twice the signed area of a triangle: positive when a, b, c turn left."""
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])


def _ruler_size(picture: Picture) -> NDArray[np.float32]:
    """The picture as float32 (H, W, 3) in [0, 255], at most RULER_PX on its longer edge."""
    image = Image.fromarray(picture)
    image.thumbnail((RULER_PX, RULER_PX), Image.Resampling.BOX)
    return np.asarray(image, dtype=np.float32)


def _hue(rgb: NDArray[np.float32]) -> NDArray[np.float32]:
    """Hue (H, W) in [0, 360) of RGB (H, W, 3)."""
    red, green, blue = np.moveaxis(rgb, -1, 0)
    # The angle on the chromaticity plane; within 2 degrees of the hexagonal hue, and without its six cases.
    return np.asarray(np.degrees(np.arctan2(np.sqrt(3) * (green - blue), 2 * red - green - blue)) % 360, np.float32)


def _foreground(rgb: NDArray[np.float32]) -> Mask | None:
    """The largest saturated patch (H, W), without specks, or None where there is none of a plausible size."""
    chroma = rgb.max(axis=-1) - rgb.min(axis=-1)
    chroma = _box_sum(chroma, 1) / 9
    vivid = float(np.percentile(chroma, 99))
    if vivid < MIN_CHROMA:
        return None
    mask = chroma > 0.5 * vivid
    mask = _grown(mask, int(np.argmax(np.where(mask, _box_sum(mask.astype(np.float32), 3), 0))))
    return mask if MIN_AREA < float(mask.mean()) < MAX_AREA else None


def _grown(mask: Mask, seed: int) -> Mask:
    """The 8-connected part of a mask that holds the pixel with flat index `seed`."""
    patch = np.zeros_like(mask)
    patch.flat[seed] = True
    size = 0
    while size != (size := int(patch.sum())):
        patch = (_box_sum(patch.astype(np.float32), 1) > 0.5) & mask
    return patch


def _box_sum(values: NDArray[np.float32], reach: int) -> NDArray[np.float32]:
    """Sum over the (2 reach + 1) square around every pixel of (H, W), edges repeated."""
    padded = np.pad(values, reach, mode="edge")
    size = 2 * reach + 1
    rows = sum((padded[i : i + values.shape[0]] for i in range(size)), np.zeros((1, 1), np.float32))
    return sum((rows[:, i : i + values.shape[1]] for i in range(size)), np.zeros((1, 1), np.float32))
