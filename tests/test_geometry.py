"""Where a crop comes from: inside the picture, of the exact edge, never upsampled, and traced back to the original."""

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from deepfloyd_core.datafile import ImageDataset
from deepfloyd_core.geometry import Geometry, geometry, plan_crop, scaled_size, steps_down
from deepfloyd_core.shrink import take_crop

ours = settings(deadline=None, database=None, derandomize=True, max_examples=300)

EDGES = st.integers(1, 20_000)
SIZES = st.tuples(EDGES, EDGES)
UNIT = st.floats(0, 1, exclude_max=True)
STYLES = st.sampled_from(["center", "corner", "random"])


def png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    """Sizes that a data file may hold: with maximum and target (edge <= target <= maximum) or without."""
    edge = draw(st.sampled_from([8, 16, 64, 72, 128, 256, 512]))
    minimum = draw(st.none() | st.integers(1, 2000))
    if draw(st.booleans()):
        return Geometry(edge, minimum, None, None, draw(STYLES))
    target = edge + draw(st.integers(0, 1000))
    return Geometry(edge, minimum, target + draw(st.integers(0, 1000)), target, draw(STYLES))


@ours
@given(SIZES, geometries(), st.tuples(UNIT, UNIT))
def test_a_crop_lies_inside_the_scaled_picture_and_has_the_exact_edge(
    size: tuple[int, int], sizes: Geometry, draws: tuple[float, float]
) -> None:
    crop = plan_crop(size, sizes, draws)
    assume(crop is not None)
    assert crop is not None
    assert crop.edge == sizes.edge
    assert crop.original == size
    assert 0 <= crop.left <= crop.scaled[0] - crop.edge
    assert 0 <= crop.top <= crop.scaled[1] - crop.edge
    left, top, width, height = crop.source_box
    assert left >= 0
    assert top >= 0
    assert left + width <= size[0] * (1 + 1e-12)
    assert top + height <= size[1] * (1 + 1e-12)


@ours
@given(SIZES, geometries())
def test_nothing_is_upsampled_and_the_aspect_is_kept_within_a_pixel(size: tuple[int, int], sizes: Geometry) -> None:
    scaled = scaled_size(size, sizes)
    assume(scaled is not None)
    assert scaled is not None
    assert scaled[0] <= size[0]
    assert scaled[1] <= size[1]
    exact = max(size) * min(scaled) / min(size)
    assert abs(max(scaled) - exact) <= 0.5
    assert (scaled[0] <= scaled[1]) == (size[0] <= size[1]) or scaled[0] == scaled[1]


@ours
@given(SIZES, geometries())
def test_minimum_maximum_and_target_mean_what_the_guide_says(size: tuple[int, int], sizes: Geometry) -> None:
    short, scaled = min(size), scaled_size(size, sizes)
    if short < sizes.edge or (sizes.minimum is not None and short < sizes.minimum):
        assert scaled is None, "too small"
    elif sizes.maximum is None:
        assert scaled is not None
        assert min(scaled) == sizes.edge
    elif short > sizes.maximum:
        assert scaled is not None
        assert min(scaled) == sizes.target
    else:
        assert scaled == size, "at or below the maximum a picture keeps its own scale"


def test_the_maximum_itself_is_not_above_the_maximum() -> None:
    sizes = Geometry(64, 64, 256, 128, "center")
    assert scaled_size((256, 400), sizes) == (256, 400)
    assert scaled_size((257, 400), sizes) == (128, 199)
    assert scaled_size((400, 257), sizes) == (199, 128)
    assert scaled_size((64, 64), sizes) == (64, 64)
    assert scaled_size((63, 4000), sizes) is None


def test_crop_styles_take_the_middle_the_corner_or_where_the_draws_say() -> None:
    def place(style: str, draws: tuple[float, float] = (0.0, 0.0)) -> tuple[int, int]:
        crop = plan_crop((101, 64), Geometry(64, None, None, None, style), draws)
        assert crop is not None
        return crop.left, crop.top

    assert place("center", (0.9, 0.9)) == (18, 0)
    assert place("corner", (0.9, 0.9)) == (0, 0)
    assert place("random", (0.5, 0.9)) == (19, 0)


@ours
@given(st.integers(0, 300), st.integers(0, 300))
def test_random_places_reach_both_ends_and_are_uniform(slack_x: int, slack_y: int) -> None:
    sizes = Geometry(64, None, 1000, 64, "random")
    draws = [(n + 0.5) / (3 * (slack_x + 1)) for n in range(3 * (slack_x + 1))]  # three for each place
    crops = [plan_crop((64 + slack_x, 64 + slack_y), sizes, (draw, 0.0)) for draw in draws]
    lefts = [crop.left for crop in crops if crop is not None]
    assert [lefts.count(place) for place in range(slack_x + 1)] == [3] * (slack_x + 1)
    last = plan_crop((64 + slack_x, 64 + slack_y), sizes, (math.nextafter(1, 0), math.nextafter(1, 0)))
    assert last is not None
    assert (last.left, last.top) == (slack_x, slack_y)


def dataset(folder: Path, **keys: Any) -> ImageDataset:
    return ImageDataset(id="x", type="local", instance_data_dir=str(folder), **keys)


def test_stage_two_of_a_64_px_set_is_four_times_as_large_in_every_length(tmp_path: Path) -> None:
    keys = {"minimum_image_size": 70, "maximum_image_size": 100, "target_downsample_size": 80}
    small, large = (geometry(dataset(tmp_path, resolution=64, **keys), stage) for stage in (1, 2))
    assert small == Geometry(64, 70, 100, 80, "center")
    assert large == Geometry(256, 280, 400, 320, "center")
    assert geometry(dataset(tmp_path, resolution=256), 1) is None
    assert geometry(dataset(tmp_path, resolution=256), 2) == Geometry(256, None, None, None, "center")


@settings(ours, max_examples=100)
@given(st.tuples(st.integers(256, 3000), st.integers(256, 3000)), st.tuples(UNIT, UNIT))
def test_both_stages_show_the_same_part_of_a_large_picture(size: tuple[int, int], draws: tuple[float, float]) -> None:
    one = plan_crop(size, Geometry(64, None, None, None, "random"), draws)
    two = plan_crop(size, Geometry(256, None, None, None, "random"), draws)
    assert one is not None
    assert two is not None
    pixel = min(size) / 64  # one pixel of Stage I, in the original
    for small, large in zip(one.source_box, two.source_box, strict=True):
        assert abs(small - large) <= 1.6 * pixel


LARGE = st.tuples(st.integers(8, 20_000), st.integers(8, 20_000))  # 8 px is the smallest legal edge


@ours
@given(LARGE, st.floats(0.001, 1), st.floats(0.001, 1))
def test_steps_shrink_by_a_quarter_until_within_1_5_of_the_goal(size: tuple[int, int], x: float, y: float) -> None:
    goal = max(8, int(size[0] * x)), max(8, int(size[1] * y))
    expected, edges = [], size
    while edges[0] > 1.5 * goal[0] or edges[1] > 1.5 * goal[1]:
        edges = max(goal[0], round(edges[0] * 0.75)), max(goal[1], round(edges[1] * 0.75))
        expected.append(edges)
    assert steps_down(size, goal) in ([*expected, goal], expected)
    assert steps_down(size, goal)[-1] == goal


@pytest.mark.parametrize("size", [(640, 480), (413, 701), (1000, 256), (300, 300)])
@pytest.mark.parametrize(("edge", "maximum", "target"), [(64, None, None), (64, 200, 96), (128, 1000, 128)])
def test_the_source_box_is_where_the_pixels_come_from(
    size: tuple[int, int], edge: int, maximum: int | None, target: int | None
) -> None:
    # Red rises with x and green with y, so a crop's corners tell its place in the original.
    x, y = np.meshgrid((np.arange(size[0]) + 0.5) / size[0], (np.arange(size[1]) + 0.5) / size[1])
    original = Image.fromarray(np.rint(np.stack([255 * x, 255 * y, 0 * x], axis=-1)).astype(np.uint8))
    crop = plan_crop(size, Geometry(edge, None, maximum, target, "random"), (0.73, 0.21))
    assert crop is not None
    made, _ = take_crop(png(original), crop.scaled, (crop.left, crop.top, crop.left + edge, crop.top + edge))
    assert made.shape == (edge, edge, 3)
    left, top, width, height = crop.source_box
    direct = original.resize((edge, edge), Image.Resampling.LANCZOS, box=(left, top, left + width, top + height))
    assert np.abs(made.astype(int) - np.asarray(direct)).max() <= 3
    middle = ((left + width / 2) / size[0] * 255, (top + height / 2) / size[1] * 255)
    assert np.allclose(made[..., :2].mean(axis=(0, 1)), middle, atol=1.0)


def test_a_crop_at_its_own_scale_is_a_copy_of_the_pixels() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    made, method = take_crop(png(Image.fromarray(pixels)), (120, 90), (31, 17, 31 + 64, 17 + 64))
    assert method == "kept"
    assert np.array_equal(made, pixels[17:81, 31:95])
