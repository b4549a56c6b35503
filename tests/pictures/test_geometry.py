"""Where a crop comes from: inside the picture, of an aligned size, never upsampled, and traced back to the original."""

import io
import math
from typing import Any

import numpy as np
import pytest
from data_world import DataWorld
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from deepfloyd_core.config.data_blocks import AspectBucket
from deepfloyd_core.config.data_sets import ImageDataset
from deepfloyd_core.config.run import RunConfig
from deepfloyd_core.config.stage import StageConfig
from deepfloyd_core.config.stages import STAGES
from deepfloyd_core.crops.shards import open_shard, read_rows
from deepfloyd_core.pictures.draws import Draw, hash_units, image_keys, seeded
from deepfloyd_core.pictures.geometry import (
    BLOCK,
    REASONS,
    Crop,
    Crops,
    Geometry,
    geometry,
    judge_sizes,
    plan_crops,
    steps_down,
)
from deepfloyd_core.pictures.resize import take_crops

ours = settings(deadline=None, database=None, derandomize=True, max_examples=60)

Size = tuple[int, int]
EDGES = st.integers(1, 20_000)
SIZES = st.tuples(EDGES, EDGES)
UNIT = st.floats(0, 1, exclude_max=True)
STYLES = st.sampled_from(["center", "corner", "random"])
ASPECTS = st.sampled_from([0.25, 0.5, 0.5625, 0.66, 0.75, 1.0, 1.23, 1.33, 1.5, 1.78, 2.0, 4.0])


def png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    """Rules that a data file may hold: every measure, shape and style, with maximum and target or without."""
    edge = draw(st.sampled_from([8, 16, 64, 72, 128, 256, 512]))
    by_area = draw(st.booleans())

    def measure(px: int) -> float:
        return float(px**2 if by_area else px)

    minimum = draw(st.none() | st.integers(1, 2000))
    target = edge + draw(st.integers(0, 1000)) if draw(st.booleans()) else None
    maximum = None if target is None else target + draw(st.integers(0, 1000))
    return Geometry(
        measure(edge),
        None if minimum is None else measure(minimum),
        None if maximum is None else measure(maximum),
        None if target is None else measure(target),
        draw(STYLES),
        by_area,
        draw(st.sampled_from(["square", "own", "closest", "random"])),
        tuple(draw(st.lists(st.tuples(ASPECTS, st.floats(0.1, 10)), min_size=1, max_size=4))),
        draw(st.sampled_from([(0.0, math.inf), (0.25, 4.0), (1.0, 1.0), (0.5, 1.2)])),
        draw(st.none() | st.integers(1, 3)),
        draw(st.sampled_from([8, 16, 32])),
    )


def fixed(**units: float) -> Draw:
    """The same numbers for every picture, 0.5 for what is not named."""

    def draw(purpose: str, part: slice) -> np.ndarray:
        return np.full(part.stop - part.start, units.get(purpose, 0.5))

    return draw


def plan_one(size: Size, rules: Geometry, **units: float) -> Crop | None:
    return plan_crops(np.array([size]), rules, fixed(**units)).crop(0)


# ---- the same, one picture at a time in plain Python ------------------------------------------------------------------


def plain_shape(aspect: float, rules: Geometry, up: float) -> Size:
    if rules.by_area:
        edges = math.sqrt(rules.resolution * aspect), math.sqrt(rules.resolution / aspect)
    else:
        edges = rules.resolution * max(aspect, 1.0), rules.resolution * max(1.0 / aspect, 1.0)
    width, height = (rules.alignment * max(1, math.floor(edge / rules.alignment + up)) for edge in edges)
    if not rules.by_area:
        short = int(rules.resolution)
        width = short if aspect <= 1 else max(short, width)
        height = short if aspect >= 1 else max(short, height)
    return width, height


def plain_target(size: Size, rules: Geometry, units: dict[str, float]) -> Size | None:
    """The training size, None when the picture can fill none."""
    aspect = size[0] / size[1]
    if rules.rounding is not None:
        aspect = max(float(np.round(aspect, rules.rounding)), 10.0**-rules.rounding)
    scored = []
    if rules.aspect in ("closest", "random"):
        for number, (shape, weight) in enumerate(rules.buckets):
            far = abs(math.log(aspect / shape))
            drawn = -math.log1p(-units.get(f"aspect {number}", 0.5)) / weight
            scored.append((far if rules.aspect == "closest" else drawn, number, plain_shape(shape, rules, 0.5)))
    else:
        own = aspect if rules.aspect == "own" else 1.0
        scored = [(0.0, 0, plain_shape(own, rules, 0.5)), (1.0, 1, plain_shape(own, rules, 1e-6))]
    fitting = [(score, number, shape) for score, number, shape in scored if shape[0] <= size[0] and shape[1] <= size[1]]
    return min(fitting)[2] if fitting else None


def plain_crop(size: Size, rules: Geometry, units: dict[str, float]) -> Crop | str:
    w, h = size
    measured = w * h if rules.by_area else min(size)
    if not rules.aspect_range[0] <= w / h <= rules.aspect_range[1]:
        return "aspect_out_of_range"
    target = plain_target(size, rules, units)
    if target is None or (rules.minimum is not None and measured < rules.minimum):
        return "too_small"
    if target[0] * h >= target[1] * w:
        cover = target[0], max(target[1], round(h * target[0] / w))
    else:
        cover = max(target[0], round(w * target[1] / h)), target[1]
    scaled = cover
    if rules.maximum is not None and rules.target is not None:
        scaled = size
        if measured > rules.maximum:
            if rules.by_area:
                shrink = math.sqrt(rules.target / (w * h))
                scaled = round(w * shrink), round(h * shrink)
            else:
                goal = int(rules.target)
                other = max(goal, round(max(size) * goal / min(size)))
                scaled = (goal, other) if w <= h else (other, goal)
            if scaled[0] < target[0] or scaled[1] < target[1]:
                scaled = cover
    slack = scaled[0] - target[0], scaled[1] - target[1]
    places = {
        "center": (slack[0] // 2, slack[1] // 2),
        "corner": (0, 0),
        "random": (int(units.get("x", 0.5) * (slack[0] + 1)), int(units.get("y", 0.5) * (slack[1] + 1))),
    }
    left, top = places["center" if rules.whole else rules.crop_style]
    return Crop(size, scaled, left, top, *target)


@settings(ours, max_examples=150)
@given(
    st.lists(SIZES, min_size=1, max_size=8),
    geometries(),
    st.fixed_dictionaries({"x": UNIT, "y": UNIT, "aspect 1": UNIT}),
)
def test_arrays_give_what_plain_python_gives_one_picture_at_a_time(
    sizes: list[Size], rules: Geometry, units: dict[str, float]
) -> None:
    crops = plan_crops(np.array(sizes), rules, fixed(**units))
    reasons = [REASONS[int(reason)] for reason in judge_sizes(np.array(sizes), rules)]
    for number, size in enumerate(sizes):
        expected = plain_crop(size, rules, units)
        assert (crops.crop(number) or reasons[number]) == expected
        assert (reasons[number] is None) == isinstance(expected, Crop)


def test_blocks_change_nothing() -> None:
    rng = np.random.default_rng(0)
    sizes = rng.integers(60, 2000, (BLOCK + 1000, 2))
    keys, repeats = rng.integers(0, 2**63, len(sizes)).astype(np.uint64), np.arange(len(sizes)) % 3
    rules = Geometry(64, 64, 256, 128, "random", aspect="random", buckets=((0.5, 1.0), (1.0, 2.0), (2.0, 1.0)))
    faces = rng.uniform(0, 2000, (len(sizes), 2))
    for style in ("random", "face"):
        styled = Geometry(**{**vars(rules), "crop_style": style})
        every = plan_crops(sizes, styled, seeded(1, keys, repeats), faces)
        order = rng.permutation(len(sizes))
        turned = plan_crops(sizes[order], styled, seeded(1, keys[order], repeats[order]), faces[order])
        for name in ("reason", "scaled", "place", "target"):
            assert np.array_equal(getattr(every, name)[order], getattr(turned, name))


# ---- what holds for every picture and every rule ----------------------------------------------------------------------

MANY = np.exp(np.random.default_rng(1).uniform(0, np.log(20_000), (400, 2))).astype(np.int32)
MANY[200:] = MANY[200:, :1] * np.random.default_rng(2).uniform(0.3, 3, (200, 2)) + 1  # not too long and thin
KEYS = np.random.default_rng(3).integers(0, 2**63, len(MANY)).astype(np.uint64)


def plan_many(rules: Geometry) -> Crops:
    """The crops of those of many sizes that fit the rules."""
    sizes = MANY[judge_sizes(MANY, rules) == 0]
    return plan_crops(sizes, rules, seeded(0, KEYS[: len(sizes)], np.zeros(len(sizes), int)))


@ours
@given(geometries(), st.booleans())
def test_a_crop_lies_inside_the_picture_and_its_size_is_aligned(rules: Geometry, whole: bool) -> None:
    crops = plan_many(Geometry(**{**vars(rules), "whole": whole}))
    assert not crops.reason.any()
    assert (crops.place >= 0).all()
    assert (crops.place + crops.target <= crops.scaled).all()
    for number in range(0, len(crops.sizes), 40):
        crop = crops.crop(number)
        assert crop is not None
        assert crop.box == (crop.left, crop.top, crop.left + crop.width, crop.top + crop.height)
        left, top, width, height = crop.source_box
        assert min(left, top) >= 0
        assert left + width <= crop.original[0] * (1 + 1e-12)
        assert top + height <= crop.original[1] * (1 + 1e-12)
    if rules.by_area:
        assert not (crops.target % rules.alignment).any()
    else:
        assert (crops.target.min(axis=1) == rules.resolution).all()
        long = crops.target.max(axis=1)
        assert ((long % rules.alignment == 0) | (long == rules.resolution)).all()
    if rules.aspect == "square":
        assert (crops.target[:, 0] == crops.target[:, 1]).all()


@ours
@given(geometries())
def test_nothing_is_upsampled_and_the_aspect_is_kept_within_a_pixel(rules: Geometry) -> None:
    crops = plan_many(rules)
    assert (crops.scaled <= crops.sizes).all()
    # The other edge at exactly the scale of one edge; rounding moves each by half a pixel at most.
    scales = crops.scaled / crops.sizes
    off = np.abs(scales[:, 0] - scales[:, 1]) * np.minimum(crops.sizes[:, 0], crops.sizes[:, 1])
    assert (off <= 1.0 + 1e-9).all()


@ours
@given(geometries())
def test_minimum_maximum_and_target_mean_what_the_guide_says(rules: Geometry) -> None:
    measured = np.prod(MANY.astype(float), axis=1) if rules.by_area else MANY.min(axis=1)
    if rules.minimum is not None:
        assert (judge_sizes(MANY[measured < rules.minimum], rules) > 0).all()
    crops = plan_many(rules)
    measured = np.prod(crops.sizes.astype(float), axis=1) if rules.by_area else crops.sizes.min(axis=1)
    covering = (crops.scaled == crops.target).any(axis=1)  # shrunk as far as the crop allows
    if rules.maximum is None or rules.target is None:
        assert covering.all()
        return
    own, large = measured <= rules.maximum, measured > rules.maximum
    assert (crops.scaled[own] == crops.sizes[own]).all(), "at or below the maximum a picture keeps its own scale"
    if rules.by_area:
        goal = crops.sizes * np.sqrt(rules.target / measured)[:, None]
        assert (covering | (np.abs(crops.scaled - goal).max(axis=1) <= 0.5 + 1e-6))[large].all()
    else:
        assert (covering | (crops.scaled.min(axis=1) == rules.target))[large].all()


@pytest.mark.parametrize("by_area", [False, True])
def test_a_picture_of_the_resolution_or_more_always_has_a_size_of_its_own_aspect(by_area: bool) -> None:
    rules = Geometry(4096 if by_area else 64, None, None, None, "center", by_area, "own")
    sizes = MANY[MANY.min(axis=1) >= 64]
    crops = plan_crops(sizes, rules, fixed())
    assert len(sizes) > 100
    assert not crops.reason.any()
    wider, taller = crops.target[:, 0] > crops.target[:, 1], crops.target[:, 0] < crops.target[:, 1]
    assert (sizes[wider, 0] > sizes[wider, 1]).all()
    assert (sizes[taller, 0] < sizes[taller, 1]).all()


@pytest.mark.parametrize(
    ("size", "target"),
    [((640, 480), (88, 64)), ((600, 400), (96, 64)), ((400, 600), (64, 96)), ((1920, 1080), (112, 64)), ((70, 64), (72, 64)),
     ((66, 64), (64, 64)), ((71, 64), (64, 64)), ((128, 64), (128, 64)), ((100, 64), (96, 64))],
)  # fmt: skip
def test_the_picture_s_own_aspect_gives_the_nearest_size_that_it_can_fill(size: Size, target: Size) -> None:
    crop = plan_one(size, Geometry(64, None, None, None, "center", aspect="own"))
    assert crop is not None
    if size == (70, 64):
        target = (64, 64)  # 72 px would have to be upsampled
    assert (crop.width, crop.height) == target


def test_the_maximum_itself_is_not_above_the_maximum() -> None:
    rules = Geometry(64, 64, 256, 128, "center")
    scaled = {size: crop.scaled if (crop := plan_one(size, rules)) else None
              for size in ((256, 400), (257, 400), (400, 257), (64, 64), (63, 4000))}  # fmt: skip
    assert scaled == {
        (256, 400): (256, 400), (257, 400): (128, 199), (400, 257): (199, 128), (64, 64): (64, 64), (63, 4000): None,
    }  # fmt: skip


def test_a_shape_longer_than_the_target_brings_the_picture_down_less_far() -> None:
    rules = Geometry(64, 64, 256, 64, "center", aspect="closest", buckets=((2.0, 1.0),))
    crop = plan_one((400, 400), rules)
    assert crop is not None
    assert (crop.scaled, crop.width, crop.height) == ((128, 128), 128, 64)


# ---- shapes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shapes", [(1.0,), (0.5, 1.0, 2.0), (0.5, 2.0), (1.78, 0.5625, 1.33, 0.75), (2.0, 1.0, 1.23)])
def test_closest_takes_the_shape_that_keeps_most_of_the_picture(shapes: tuple[float, ...]) -> None:
    rules = Geometry(64, None, None, None, "center", aspect="closest", buckets=tuple((shape, 1.0) for shape in shapes))
    sizes = MANY[MANY.min(axis=1) >= 128]  # large enough for each of them
    crops = plan_crops(sizes, rules, fixed())
    for (w, h), target in zip(sizes.tolist(), crops.target.tolist(), strict=True):
        best = max(shapes, key=lambda shape: min(w / h / shape, shape / (w / h)))
        assert tuple(target) == plain_shape(best, rules, 0.5)


def test_random_shapes_come_up_as_often_as_their_weights_say() -> None:
    total, weights = 40_000, {0.5: 1.0, 1.0: 2.0, 2.0: 5.0}
    keys = np.random.default_rng(3).integers(0, 2**63, total).astype(np.uint64)
    rules = Geometry(64, None, None, None, "center", aspect="random", buckets=tuple(weights.items()))
    sizes = np.full((total, 2), 500)
    crops = plan_crops(sizes, rules, seeded(7, keys, np.zeros(total, int)))
    drawn = crops.target[:, 0] / crops.target[:, 1]
    for shape, weight in weights.items():
        assert abs(np.mean(drawn == shape) - weight / 8) < 0.01
    small = plan_crops(np.full((total, 2), 100), rules, seeded(7, keys, np.zeros(total, int)))
    assert set(map(tuple, small.target.tolist())) == {(64, 64)}, "nothing is upsampled for the other shapes"
    again = plan_crops(sizes, rules, seeded(7, keys, np.ones(total, int)))
    assert np.mean(again.target[:, 0] != crops.target[:, 0]) > 0.2, "each repeat draws its own"


@ours
@given(geometries())
def test_stage_two_is_four_times_stage_one_wherever_the_picture_can_fill_it(rules: Geometry) -> None:
    times = 16 if rules.by_area else 4
    lengths = ("resolution", "minimum", "maximum", "target")
    quadruple = {name: None if vars(rules)[name] is None else vars(rules)[name] * times for name in lengths}
    large = Geometry(**{**vars(rules), **quadruple, "alignment": rules.alignment * 4})
    draw = seeded(1, KEYS, np.zeros(len(KEYS), int))
    one, two = (plan_crops(MANY, part, draw) for part in (rules, large))
    both = (one.reason == 0) & (two.reason == 0) & (one.target * 4 <= MANY).all(axis=1)
    assert (one.target[both] * 4 == two.target[both]).all()


# ---- places -----------------------------------------------------------------------------------------------------------


def test_crop_styles_take_the_middle_the_corner_the_face_or_where_the_draws_say() -> None:
    def place(style: str, size: Size = (101, 64), face: Size | None = None, **units: float) -> Size:
        faces = np.array([face or (np.nan, np.nan)], float)
        crop = plan_crops(np.array([size]), Geometry(64, None, 1000, 64, style), fixed(**units), faces).crop(0)
        assert crop is not None
        return crop.left, crop.top

    assert place("center", x=0.9, y=0.9) == (18, 0)
    assert place("corner", x=0.9, y=0.9) == (0, 0)
    assert place("random", x=0.5, y=0.9) == (19, 0)
    assert place("face") == (18, 0), "no face was found"
    assert place("face", face=(90, 10)) == (37, 0)
    assert place("face", face=(0, 0)) == (0, 0)
    assert place("face", (200, 200), face=(100, 60)) == (68, 28), "the face's centre in the crop's centre"


def test_a_face_is_followed_through_the_downsampling() -> None:
    rules = Geometry(64, None, 300, 128, "face")
    crop = plan_crops(np.array([(512, 512)]), rules, fixed(), np.array([(400.0, 100.0)])).crop(0)
    assert crop is not None
    assert (crop.scaled, crop.left, crop.top) == ((128, 128), 64, 0)


@ours
@given(st.integers(0, 300), st.integers(0, 300))
def test_random_places_reach_both_ends_and_are_uniform(slack_x: int, slack_y: int) -> None:
    rules, size = Geometry(64, None, 1000, 64, "random"), (64 + slack_x, 64 + slack_y)
    units = (np.arange(3 * (slack_x + 1)) + 0.5) / (3 * (slack_x + 1))  # three for each place
    crops = plan_crops(np.full((len(units), 2), size), rules, lambda purpose, part: units[part])
    assert np.bincount(crops.place[:, 0]).tolist() == [3] * (slack_x + 1)
    last = plan_one(size, rules, x=math.nextafter(1, 0), y=math.nextafter(1, 0))
    assert last is not None
    assert (last.left, last.top) == (slack_x, slack_y)


def test_draws_are_uniform_independent_and_the_same_on_every_machine() -> None:
    keys = image_keys(f"{number * 0x9E3779B97F4A7C15 % 2**64:016x}" for number in range(100_000))
    zeros = np.zeros(len(keys), int)
    x, y, next_pass = (
        hash_units("x", 1, keys, zeros),
        hash_units("y", 1, keys, zeros),
        hash_units("x", 1, keys, zeros + 1),
    )
    for units in (x, y, next_pass, hash_units("x", 2, keys, zeros)):
        assert units.min() >= 0
        assert units.max() < 1
        assert np.abs(np.histogram(units, 20, (0, 1))[0] - 5000).max() < 400
    assert max(abs(np.corrcoef(x, other)[0, 1]) for other in (y, next_pass)) < 0.02
    one = hash_units(
        "x", 42, image_keys(["ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"]), zeros[:1]
    )
    assert one.tolist() == [0.5768615304118044], "crops move when this does"


# ---- from the data file -----------------------------------------------------------------------------------------------

CONFIG = RunConfig(
    workspace="w", data_backend_config="d", stage1=StageConfig(model_flavour="tiny-i"), stage2=None, stage3=None
)


def dataset(**keys: Any) -> ImageDataset:
    return ImageDataset(id="x", type="local", instance_data_dir=".", **keys)


def test_stage_two_of_a_64_px_set_is_four_times_as_large_in_every_length() -> None:
    keys = {"minimum_image_size": 70, "maximum_image_size": 100, "target_downsample_size": 80}
    small, large = (geometry(CONFIG, dataset(resolution=64, **keys), stage) for stage in (1, 2))
    assert small == Geometry(64, 70, 100, 80, "center", alignment=8)
    assert large == Geometry(256, 280, 400, 320, "center", alignment=32)
    assert geometry(CONFIG, dataset(resolution=256), 1) is None
    assert geometry(CONFIG, dataset(resolution=256), 2) == Geometry(256, None, None, None, "center", alignment=32)


def test_areas_are_megapixels_or_the_edge_of_their_square() -> None:
    for keys in ({"resolution_type": "pixel_area", "resolution": 64, "minimum_image_size": 80},
                 {"resolution_type": "area", "resolution": 0.004096, "minimum_image_size": 0.0064}):  # fmt: skip
        for stage, times in zip(STAGES, (1, 16), strict=True):
            found = geometry(CONFIG, dataset(**keys), stage)
            assert found == Geometry(
                4096 * times, 6400 * times, None, None, "center", True, alignment=8 * (1, 4)[stage - 1]
            )
    exact = geometry(CONFIG, dataset(resolution_type="area", resolution=0.0105, minimum_image_size=0.105), 1)
    assert exact is not None
    assert exact.minimum == 105_000, "not one part in 10^16 more, which a picture of 350 x 300 px would miss"


def test_without_a_crop_the_whole_picture_goes_in_whatever_the_crop_keys_say() -> None:
    keys: dict[str, Any] = {
        "crop": False,
        "crop_aspect": "square",
        "maximum_image_size": 256,
        "target_downsample_size": 128,
    }
    rules = geometry(CONFIG, dataset(crop_style="random", **keys), 1)
    assert rules is not None
    crop = plan_one((1000, 700), rules, x=0.0, y=0.99)
    assert crop == Crop((1000, 700), (91, 64), 1, 0, 88, 64)


def test_the_run_s_keys_set_alignment_and_rounding() -> None:
    config = CONFIG.model_copy(update={"aspect_bucket_alignment": 32, "aspect_bucket_rounding": 1})
    rules = geometry(config, dataset(crop_aspect="preserve"), 1)
    assert rules is not None
    assert (rules.alignment, rules.rounding) == (32, 1)
    crops: Crops = plan_crops(np.array([(1000, 640), (1000, 700), (900, 640)]), rules, fixed())
    assert crops.target.tolist() == [[96, 64], [96, 64], [96, 64]]  # 1.6, 1.4, 1.4


def test_listed_shapes_may_have_weights() -> None:
    parts = (1.0, AspectBucket(aspect_bucket=0.5, weight=3.0))
    rules = geometry(CONFIG, dataset(crop_aspect="random", crop_aspect_buckets=parts), 1)
    assert rules is not None
    assert rules.buckets == ((1.0, 1.0), (0.5, 3.0))


def test_a_picture_s_own_aspect_is_bounded_unless_the_data_set_says_otherwise() -> None:
    def reasons(**keys: Any) -> list[str | None]:
        rules = geometry(CONFIG, dataset(**keys), 1)
        assert rules is not None
        sizes = np.array([(512, 128), (513, 128), (128, 512), (128, 513), (100, 100)])
        return [REASONS[int(reason)] for reason in judge_sizes(sizes, rules)]

    out = "aspect_out_of_range"
    assert reasons() == [None] * 5
    assert reasons(crop_aspect="preserve") == reasons(crop=False) == [None, out, None, out, None]
    assert reasons(crop_aspect="preserve", maximum_aspect_ratio=9.0, minimum_aspect_ratio=0.1) == [None] * 5
    assert reasons(minimum_aspect_ratio=1.0) == [None, None, out, out, None]
    assert reasons(maximum_aspect_ratio=1.0) == [out, out, None, None, None]


# ---- pixels -----------------------------------------------------------------------------------------------------------

LARGE = st.tuples(st.integers(8, 20_000), st.integers(8, 20_000))  # 8 px is the smallest legal edge


@ours
@given(LARGE, st.floats(0.001, 1), st.floats(0.001, 1))
def test_steps_shrink_by_a_quarter_until_within_1_5_of_the_goal(size: Size, x: float, y: float) -> None:
    goal = max(8, int(size[0] * x)), max(8, int(size[1] * y))
    expected, edges = [], size
    while edges[0] > 1.5 * goal[0] or edges[1] > 1.5 * goal[1]:
        edges = max(goal[0], round(edges[0] * 0.75)), max(goal[1], round(edges[1] * 0.75))
        expected.append(edges)
    assert steps_down(size, goal) in ([*expected, goal], expected)
    assert steps_down(size, goal)[-1] == goal


@ours
@given(st.tuples(st.integers(256, 3000), st.integers(256, 3000)), UNIT, UNIT)
def test_both_stages_show_the_same_part_of_a_large_picture(size: Size, x: float, y: float) -> None:
    one = plan_one(size, Geometry(64, None, None, None, "random"), x=x, y=y)
    two = plan_one(size, Geometry(256, None, None, None, "random", alignment=32), x=x, y=y)
    assert one is not None
    assert two is not None
    pixel = min(size) / 64  # one pixel of Stage I, in the original
    for small, large in zip(one.source_box, two.source_box, strict=True):
        assert abs(small - large) <= 1.6 * pixel


@pytest.mark.parametrize("size", [(640, 480), (413, 701), (1000, 256), (300, 300)])
@pytest.mark.parametrize(
    "rules",
    [Geometry(64, None, None, None, "random"), Geometry(64, None, 200, 96, "random"),
     Geometry(128, None, 1000, 128, "random"), Geometry(64, None, 200, 96, "random", aspect="own"),
     Geometry(9216, None, None, None, "random", True, "own")],
)  # fmt: skip
def test_the_source_box_is_where_the_pixels_come_from(size: Size, rules: Geometry) -> None:
    # Red rises with x and green with y, so a crop's corners tell its place in the original.
    x, y = np.meshgrid((np.arange(size[0]) + 0.5) / size[0], (np.arange(size[1]) + 0.5) / size[1])
    original = Image.fromarray(np.rint(np.stack([255 * x, 255 * y, 0 * x], axis=-1)).astype(np.uint8))
    crop = plan_one(size, rules, x=0.73, y=0.21)
    assert crop is not None
    ((made, _),) = take_crops(png(original), [(crop.scaled, crop.box)])
    assert made.shape == (crop.height, crop.width, 3)
    left, top, width, height = crop.source_box
    box = (left, top, left + width, top + height)
    direct = original.resize((crop.width, crop.height), Image.Resampling.LANCZOS, box=box)
    assert np.abs(made.astype(int) - np.asarray(direct)).max() <= 3
    middle = ((left + width / 2) / size[0] * 255, (top + height / 2) / size[1] * 255)
    assert np.allclose(made[..., :2].mean(axis=(0, 1)), middle, atol=1.0)


def test_a_crop_at_its_own_scale_is_a_copy_of_the_pixels() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    ((made, method),) = take_crops(png(Image.fromarray(pixels)), [((120, 90), (31, 17, 31 + 72, 17 + 64))])
    assert method == "kept"
    assert np.array_equal(made, pixels[17:81, 31:103])


ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270,
}  # fmt: skip


def smooth(width: int, height: int) -> Image.Image:
    """A picture that looks different from every corner."""
    rng = np.random.default_rng(5)
    return Image.fromarray(rng.integers(0, 256, (6, 9, 3), dtype=np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )


@pytest.mark.parametrize(
    "keys",
    [{"crop_aspect": "preserve", "crop_style": "random"}, {"crop": False}, {"crop_style": "corner"},
     {"crop_aspect": "random", "crop_aspect_buckets": [0.5, 1.5], "crop_style": "random", "resolution_type": "pixel_area",
      "maximum_image_size": 120, "target_downsample_size": 110}],
    ids=["preserve", "whole", "corner", "random"],
)  # fmt: skip
def test_the_stored_box_of_a_turned_picture_gives_the_shard_s_pixels(world: DataWorld, keys: dict[str, Any]) -> None:
    upright = smooth(360, 270)
    for tag in range(1, 9):
        exif, buffer = Image.Exif(), io.BytesIO()
        exif[0x0112] = tag
        stored = upright.transpose(ORIENTATIONS[tag]) if tag > 1 else upright
        stored.save(buffer, "PNG", exif=exif, compress_level=1)
        world.add(f"{tag}.png", buffer.getvalue())
    run = world.load(keys)
    index = world.index(run)
    for stage in (1, 2):
        pixels = world.pixels(run, index, stage)
        seen = set()
        for file in sorted(pixels.path.glob("*.parquet")):
            for picture, row in zip(open_shard(file), read_rows(file), strict=True):
                assert (row.original_width, row.original_height) == upright.size
                box = (row.crop_left, row.crop_top, row.crop_left + row.crop_width, row.crop_top + row.crop_height)
                expected = upright.resize((row.width, row.height), Image.Resampling.LANCZOS, box=box)
                error = np.mean((picture.astype(float) - np.asarray(expected)) ** 2)
                assert error <= 255**2 / 10**3, "below 30 dB"
                seen.add(row.source)
        assert seen == {f"{tag}.png" for tag in range(1, 9)}
