"""Where a training picture comes from inside its original: pure arithmetic on sizes, no pixels.

A picture whose shorter edge is above the maximum is first brought down to the target; one at or below it keeps its own
scale; with neither set the shorter edge is brought to the crop's edge. Nothing is ever upsampled: too small is a reason.
"""

from dataclasses import dataclass

from deepfloyd_core.datafile import ImageDataset
from deepfloyd_core.flavours import Stage

Size = tuple[int, int]  # width, height


@dataclass(frozen=True)
class Geometry:
    """The sizes (px) of one data set at one stage."""

    edge: int
    minimum: int | None
    maximum: int | None
    target: int | None
    crop_style: str


@dataclass(frozen=True)
class Crop:
    """A square of `edge` px at (left, top) of the picture after it was resized to `scaled`."""

    original: Size
    scaled: Size
    left: int
    top: int
    edge: int

    @property
    def source_box(self) -> tuple[float, float, float, float]:
        """(left, top, width, height) in pixels of the oriented original; fractional when it was resized."""
        x, y = self.original[0] / self.scaled[0], self.original[1] / self.scaled[1]
        return self.left * x, self.top * y, self.edge * x, self.edge * y


def geometry(dataset: ImageDataset, stage: Stage, crop_style: str | None = None) -> Geometry | None:
    """A data set's sizes at a stage (its own ones times 4 for Stage II of a 64 px set); None: it does not feed it."""
    factor = dataset.factor(stage)
    if factor is None:
        return None

    def times(px: int | None) -> int | None:
        return None if px is None else px * factor

    return Geometry(
        edge=dataset.resolution * factor,
        minimum=times(dataset.minimum_image_size),
        maximum=times(dataset.maximum_image_size),
        target=times(dataset.target_downsample_size),
        crop_style=crop_style or dataset.crop_style,
    )


def scaled_size(size: Size, sizes: Geometry) -> Size | None:
    """The size to which a picture is resized before the crop; None when it is too small."""
    short, long = min(size), max(size)
    if sizes.minimum is not None and short < sizes.minimum:
        return None
    if sizes.maximum is None or sizes.target is None:
        goal = sizes.edge
    else:
        goal = sizes.target if short > sizes.maximum else short
    if goal > short or goal < sizes.edge:
        return None
    other = max(goal, round(long * goal / short))
    return (goal, other) if size[0] <= size[1] else (other, goal)


def plan_crop(size: Size, sizes: Geometry, draws: tuple[float, float] = (0.0, 0.0)) -> Crop | None:
    """Plan one crop of a picture of `size`; `draws` in [0, 1) place a random one. None when it is too small."""
    scaled = scaled_size(size, sizes)
    if scaled is None:
        return None
    slack = scaled[0] - sizes.edge, scaled[1] - sizes.edge
    if sizes.crop_style == "center":
        left, top = slack[0] // 2, slack[1] // 2
    elif sizes.crop_style == "corner":
        left, top = 0, 0
    else:
        left, top = int(draws[0] * (slack[0] + 1)), int(draws[1] * (slack[1] + 1))
    return Crop(size, scaled, left, top, sizes.edge)


def steps_down(size: Size, goal: Size) -> list[Size]:
    """The sizes a picture passes on its way down: x0.75 while an edge is above 1.5x its goal, then the goal."""
    passed = []
    while size[0] > 1.5 * goal[0] or size[1] > 1.5 * goal[1]:
        size = max(goal[0], round(size[0] * 0.75)), max(goal[1], round(size[1] * 0.75))
        passed.append(size)
    return passed if passed and passed[-1] == goal else [*passed, goal]
