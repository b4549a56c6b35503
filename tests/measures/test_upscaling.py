"""Measures of pictures against scikit-image and plain formulas, and Stage II's table against pictures that are known."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from data_world import DataWorld
from hypothesis import given, settings
from hypothesis import strategies as st
from narrowing import known
from PIL import Image
from skimage import data
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from small_run import SmallRun

from deepfloyd_core.config.stages import STAGES
from deepfloyd_core.crops.rows import shard_files
from deepfloyd_core.crops.shards import ShardRow, open_shard
from deepfloyd_core.diffusion.loss import low_res, to_bytes, to_model_range
from deepfloyd_core.measures.comparison import Compared, Picture, enlarged
from deepfloyd_core.measures.figures import LevelFigures, UpscalingFigures
from deepfloyd_core.measures.files import UpscalingFiles
from deepfloyd_core.measures.pixel import (
    FEWEST,
    busiest,
    colour_shift,
    colour_spread,
    detail_energy,
    mean_and_interval,
    psnr,
    ssim,
)
from deepfloyd_core.measures.tables import gained
from deepfloyd_core.measures.upscaling import (
    HELD_OUT,
    Upscaler,
    level_figures,
    measure_samples,
    measure_upscalers,
    measured,
)
from deepfloyd_core.measures.upscaling_sheets import save_sheets
from deepfloyd_core.preflight.load import load_run
from deepfloyd_core.sampling.jobs import SamplesSummary

PHOTOGRAPHS = [data.astronaut()[:96, :120], data.coffee()[100:196, :120], data.chelsea()[:96, 100:220]]


def noised(picture: np.ndarray, seed: int, spread: float) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(0, spread, picture.shape)
    return np.clip(picture + noise, 0, 255).round().astype(np.uint8)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2), st.integers(0, 99), st.floats(0.1, 80))
def test_psnr_and_ssim_are_scikit_images(which: int, seed: int, spread: float) -> None:
    truth = PHOTOGRAPHS[which]
    picture = noised(truth, seed, spread)
    theirs = structural_similarity(
        truth, picture, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, channel_axis=2, data_range=255
    )
    assert ssim(picture, truth) == pytest.approx(theirs, abs=1e-7)
    if (picture != truth).any():
        assert psnr(picture, truth) == pytest.approx(peak_signal_noise_ratio(truth, picture), abs=1e-9)


def test_equal_pictures_have_the_best_of_each_measure() -> None:
    picture, blank = PHOTOGRAPHS[0], np.zeros((16, 16, 3), np.uint8)
    assert (psnr(picture, picture), ssim(picture, picture), colour_shift(picture, picture)) == (100.0, 1.0, 0.0)
    assert colour_spread(picture, picture) == detail_energy(blank, blank) == 0.0


def test_a_tint_is_a_colour_shift_and_a_blur_has_no_detail() -> None:
    grey = np.full((32, 32, 3), 100, np.uint8)
    assert colour_shift(grey + np.array([30, 0, 0], np.uint8), grey) == pytest.approx(10)
    assert detail_energy(np.full_like(grey, 102), grey) == 4.0


def test_washed_out_colours_have_the_right_mean_and_another_spread() -> None:
    picture = PHOTOGRAPHS[0].astype(np.float64)
    grey = picture.mean((0, 1)) + (picture - picture.mean((0, 1))) / 2
    assert colour_spread(grey, picture) == pytest.approx(np.mean([picture[..., one].std() / 2 for one in range(3)]))
    assert colour_shift(grey, picture) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(("pictures", "least"), [(FEWEST, 83), (40, 88)])
def test_an_interval_holds_the_mean_and_shrinks_as_pictures_come(pictures: int, least: int) -> None:
    """95 of 100 such intervals should hold the true mean; of few pictures it is 90, and chance adds or takes some."""
    rng = np.random.default_rng(7)
    held = widths = 0.0
    for seed in range(100):
        found, low, high = mean_and_interval(rng.normal(2.0, 1.0, pictures).tolist(), seed)
        held += low <= 2.0 <= high
        widths += high - low
        assert low <= found <= high
    assert least <= held <= 99
    assert widths / 100 == pytest.approx(2 * 1.96 / pictures**0.5, rel=0.16)


def test_too_few_pictures_give_no_interval() -> None:
    assert mean_and_interval([1.0, 5.0, 3.0]) == (3.0,)
    assert gained((3.0,), "dB") == "+3.00 dB (fewer than 10 pictures: no interval)"
    assert mean_and_interval([3.0] * FEWEST) == (3.0, 3.0, 3.0)
    assert gained((0.5, -0.25, 1.25), "dB") == "+0.50 dB (-0.25 to +1.25, 95 %)"


def test_a_smooth_picture_among_others_does_not_decide_the_detail(tmp_path: Path) -> None:
    """Truth plus noise has about the truth's detail; of the gradient alone it would be hundreds of times as much."""
    across = np.linspace(60, 160, 96)[None, :, None] + np.zeros((96, 96, 3))
    pictures = [photograph[:96, :96] for photograph in PHOTOGRAPHS] + [across.round().astype(np.uint8)]
    table: list[dict[str, Any]] = [
        {"way": "noisy", **measured(Compared(Picture(noised(truth, 0, 3.0)), Picture(truth), truth[::4, ::4]), "truth")}
        for truth in pictures
    ]
    assert table[3]["detail"] > 50 * table[3]["true_detail"]
    assert 1.0 < known(level_figures(table, ["noisy"], "truth").upscaled["noisy"]["detail"]) < 1.2


def means_of(figures: UpscalingFigures | LevelFigures) -> dict[str, dict[str, float]]:
    """The mean of each measure by method, where there is one."""
    return {
        method: {name: mean for name, mean in means.items() if mean is not None}
        for method, means in figures.upscaled.items()
    }


@dataclass(frozen=True)
class Upscaled:
    """What was measured of two upscalers at two noise levels, and where its table and sheets are."""

    figures: UpscalingFigures
    truth: list[np.ndarray]  # the held-out pictures of each size, uint8 (N, H, W, 3)
    files: UpscalingFiles


@pytest.fixture(scope="module")
def upscaled(
    tmp_path_factory: pytest.TempPathFactory,
    new_small_run: Callable[[Path], SmallRun],
    new_world: Callable[[Path], DataWorld],
) -> Upscaled:
    """The truth itself, and the truth with noise, as upscalers."""
    out = tmp_path_factory.mktemp("upscaled")
    run = load_run(new_small_run(out / "run").config)
    stages = new_world(run.workspace)
    files = shard_files(stages.eval_set(run, stages.index(run)), 2)
    truth = {tuple(part.shape[1:3]): part for part in (open_shard(file).all() for file in files)}

    def upscaler(spread: float) -> Upscaler:
        def upscale(rows: list[ShardRow], small: torch.Tensor, noise_level: int) -> torch.Tensor:
            true = truth[small.shape[-2] * 4, small.shape[-1] * 4]
            assert len(rows) == len(small) == len(true)
            return to_model_range(torch.from_numpy(noised(true, 0, spread * (1 + noise_level / 100))))

        return upscale

    ways = {"noisy": partial(upscaler, 20.0), "perfect": partial(upscaler, 0.0)}
    made = {("noisy", 0): [torch.zeros(3, 256, 256)]}
    rows, _ = measure_samples(1, ["a sample"], [torch.zeros(3, 64, 64)], made, (0,))
    written = UpscalingFiles(2, out)
    return Upscaled(measure_upscalers(files, ways, (0, 100), written, rows)["held_out"], list(truth.values()), written)


def test_the_table_of_upscalers_says_which_is_best(upscaled: Upscaled) -> None:
    found, means, gain = upscaled.figures, means_of(upscaled.figures), upscaled.figures.gain
    assert list(means) == ["bilinear", "bicubic", "noisy", "perfect"] and list(gain) == ["bilinear", "bicubic", "noisy"]
    best = {"psnr": 100.0, "ssim": 1.0, "consistency": 100.0, "detail": 1.0, "colour_shift": 0.0, "colour_spread": 0.0}
    assert means["perfect"] == best
    assert means["noisy"]["psnr"] == pytest.approx(10 * np.log10(255**2 / 400), abs=2)
    assert means["noisy"]["detail"] > 1 > means["bicubic"]["detail"] > means["bilinear"]["detail"]
    for way, more in gain.items():
        assert more["psnr"][0] == pytest.approx(100 - means[way]["psnr"], abs=1e-3)

    later = found.other_levels[100]
    assert (found.noise_level, list(found.other_levels)) == (0, [100])
    assert later.upscaled["bicubic"] == means["bicubic"]
    assert later.upscaled["noisy"]["psnr"] == pytest.approx(10 * np.log10(255**2 / 1600), abs=2)
    assert later.gain["noisy"]["psnr"][0] == pytest.approx(100 - known(later.upscaled["noisy"]["psnr"]), abs=1e-3)
    assert list(found.by_level) == [0, 100]


def test_the_rows_of_the_table_are_those_of_each_picture(upscaled: Upscaled) -> None:
    """Plain enlargements against Pillow's."""
    written = pq.read_table(upscaled.files.table).to_pylist()
    assert [(row["image_id"], row["way"]) for row in written if row["low_res"] == "stage1"] == [
        ("a sample", way) for way in ("bilinear", "bicubic", "noisy")
    ]
    table = [row for row in written if row["low_res"] == HELD_OUT]
    counts = Counter((row["way"], row["noise_level"]) for row in table)
    ways = [
        ("bilinear", None),
        ("bicubic", None),
        *((way, level) for way in ("noisy", "perfect") for level in (0, 100)),
    ]
    assert counts == dict.fromkeys(ways, sum(map(len, upscaled.truth)))
    for true in upscaled.truth:
        for picture in true:
            small = Image.fromarray(picture).resize(
                (picture.shape[1] // 4, picture.shape[0] // 4), Image.Resampling.BICUBIC
            )
            large = np.asarray(small.resize((picture.shape[1], picture.shape[0]), Image.Resampling.BILINEAR))
            near = [row for row in table if row["way"] == "bilinear" and abs(row["psnr"] - psnr(large, picture)) < 0.1]
            assert near, "no row of the table is this picture enlarged by Pillow"


def test_the_sheet_of_details_ends_with_the_truth_three_times_as_large(upscaled: Upscaled) -> None:
    assert Image.open(upscaled.files.sheet).height > 6 * 192
    shown = np.asarray(Image.open(upscaled.files.details))
    assert shown.shape == np.asarray(Image.open(upscaled.files.sheet)).shape
    first = upscaled.truth[0][0]
    low = low_res(to_model_range(torch.from_numpy(first)[None]))
    blurred = ((enlarged(low, "bicubic")[0].permute(1, 2, 0).numpy() + 1) * 127.5).round()
    top, left = busiest(first, blurred, 64, 4)
    large = first[top : top + 64, left : left + 64].repeat(3, 0).repeat(3, 1)
    assert (shown[-204:-12, 6:198] == large).all(), (
        "the last line begins with the first picture's truth, three times as large"
    )


def test_spoilt_low_res_pictures_are_measured_beside_the_true_ones(
    tmp_path: Path, new_small_run: Callable[[Path], SmallRun], new_world: Callable[[Path], DataWorld]
) -> None:
    """Darkened by a tenth: what bicubic makes of them is Pillow's, and consistency is that with the true ones."""
    run = load_run(new_small_run(tmp_path / "run").config)
    world = new_world(run.workspace)
    (file,) = shard_files(world.eval_set(run, world.index(run)), 2)
    truths, plain, both = open_shard(file).all(), tmp_path / "plain", tmp_path / "both"
    plain.mkdir()
    both.mkdir()
    given: list[tuple[int, float]] = []

    def upscale(rows: list[ShardRow], small: torch.Tensor, noise_level: int) -> torch.Tensor:
        given.append((noise_level, float(small.mean())))
        return enlarged(small, "bilinear")

    def darker(rows: list[ShardRow], small: torch.Tensor) -> torch.Tensor:
        assert len(rows) == len(small)
        return (small - 24 / 127.5).clamp(-1, 1)

    before = measure_upscalers([file], {"tuned": lambda: upscale}, (0, 100), UpscalingFiles(2, plain))
    brightness = given[0][1]
    assert "spoilt" not in before and not (plain / "eval_spoilt.png").exists()
    given.clear()
    found = measure_upscalers([file], {"tuned": lambda: upscale}, (0, 100), UpscalingFiles(2, both), spoil=darker)
    assert {key: value for key, value in found.items() if key != "spoilt"} == before
    assert given[:2] == [(0, brightness), (100, brightness)]
    assert len(given) == 3 and given[2][0] == 0, "the first level alone"
    assert given[2][1] == pytest.approx(brightness - 24 / 127.5, abs=0.02)
    spoilt, rows = found["spoilt"], pq.read_table(UpscalingFiles(2, both).table).to_pylist()
    assert list(spoilt.by_level) == [0] and list(spoilt.gain) == ["bilinear", "bicubic"]
    for truth, row in zip(truths, (row for row in rows if row["low_res"] == "spoilt"), strict=False):
        small = np.asarray(Image.fromarray(truth).resize((64, 64), Image.Resampling.BICUBIC)).astype(float)
        darkened = Image.fromarray((small - 24).clip(0, 255).round().astype(np.uint8))
        large = np.asarray(darkened.resize((256, 256), Image.Resampling.BILINEAR))
        assert row["way"] == "bilinear" and row["psnr"] == pytest.approx(psnr(large, truth), abs=0.1)
        again = np.asarray(Image.fromarray(large).resize((64, 64), Image.Resampling.BICUBIC))
        assert row["consistency"] == pytest.approx(psnr(again, small.astype(np.uint8)), abs=0.1)
    tables = [pq.read_table(UpscalingFiles(2, folder).table).to_pylist() for folder in (plain, both)]
    named = [{(row["image_id"], row["conditions"]) for row in table} for table in tables]
    assert named[0] == named[1] and len(named[0]) == len(truths), "one name for each picture, whatever else is measured"
    measure_upscalers([file], {}, (0,), UpscalingFiles(2, plain), sampled_with="30 steps")
    others = {row["conditions"] for row in pq.read_table(UpscalingFiles(2, plain).table).to_pylist()}
    assert not others & {conditions for _, conditions in named[0]}, "another sampler is another condition"
    for name in ("eval_spoilt.png", "eval_spoilt_details.png"):
        assert Image.open(both / name).size == Image.open(both / "eval.png").size


def test_files_titles_and_keys_of_another_upscaler_are_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    third: Any = 3
    monkeypatch.setitem(STAGES, third, replace(STAGES[2], number=third, roman="III", upscales=2))
    truth = np.ascontiguousarray(PHOTOGRAPHS[0][:64, :64])
    small = low_res(to_model_range(torch.from_numpy(truth)[None]))
    _, figures = measure_samples(2, ["a"], list(small), {("tuned", 0): list(enlarged(small, "bicubic"))}, (0,))
    second, another = ({*paths(UpscalingFiles(stage, tmp_path))} for stage in (2, third))
    assert len(second) == len(another) == 5 and not second & another
    assert {path.name for path in another} >= {"stage3_eval.png", "stage3_eval.parquet"}
    tables = SamplesSummary(samples=figures, held_out=figures, spoilt=figures).tables((1, third))
    assert [(table.title, table.key) for table in tables] == [
        ("Stage III on held-out pictures", "stage3-measures"),
        ("Stage III on held-out pictures, low-res degraded as in training", "stage3-spoilt-measures"),
        ("Stage III on Stage II's samples", "stage3-sample-measures"),
    ]


def paths(files: UpscalingFiles) -> tuple[Path, ...]:
    return (files.table, files.sheet, files.details, *files.spoilt)


def test_the_window_with_most_detail_is_found() -> None:
    smooth = np.linspace(60, 160, 256)[None, :, None].repeat(192, 0).repeat(3, 2)
    picture = smooth.copy()
    picture[101:165, 50:114] += np.random.default_rng(0).normal(0, 20, (64, 64, 3))
    top, left = busiest(picture, smooth, 64, 4)
    assert (top, left) in {(100, 48), (100, 52)}
    assert busiest(smooth, smooth, 64, 4) == (0, 0), "there is none"
    assert busiest(picture[:64, :64], smooth[:64, :64], 64, 4) == (0, 0), "all of a small picture"


def test_a_picture_that_is_less_high_than_the_window_is_zoomed_as_high_as_it_is(tmp_path: Path) -> None:
    wide = np.random.default_rng(0).integers(0, 256, (32, 256, 3), dtype=np.uint8)
    small = to_bytes(low_res(to_model_range(torch.from_numpy(wide)[None])))[0].numpy()
    whole, details = tmp_path / "eval.png", tmp_path / "eval_details.png"
    save_sheets([("low-res", [small]), ("tuned", [wide]), ("truth", [wide])], "Stage II", whole, details)
    with Image.open(details) as sheet:
        assert sheet.width > 100


def test_what_is_made_of_samples_is_measured_without_a_truth() -> None:
    """A tinted enlargement and one with detail of its own, against Pillow and plain formulas."""
    truths = [np.ascontiguousarray(data.astronaut()[at : at + 256, 100:356]) for at in (0, 200)]
    pixels = to_model_range(torch.from_numpy(np.stack(truths)))
    small = low_res(pixels)
    tinted = (enlarged(small, "bicubic") + torch.tensor([24 / 127.5, 0, 0])[:, None, None]).clamp(-1, 1)
    made = {("base", 50): list(tinted), ("tuned", 50): list(pixels)}
    rows, found = measure_samples(1, ["one", "two"], list(small), made, (50,))
    assert [(row["image_id"], row["way"], row["noise_level"]) for row in rows[4:]] == [
        ("one", "base", 50), ("two", "base", 50), ("one", "tuned", 50), ("two", "tuned", 50),
    ]  # fmt: skip
    means = means_of(found)
    assert found.noise_level == 50 and list(means) == ["bilinear", "bicubic", "base", "tuned"]
    assert means["tuned"]["consistency"] > 50 > means["bicubic"]["consistency"] > means["base"]["consistency"]
    assert means["base"]["consistency"] == pytest.approx(10 * np.log10(255**2 / (24**2 / 3)), abs=1)
    assert means["base"]["colour_shift"] == pytest.approx(8, abs=1.5) and means["tuned"]["colour_shift"] < 0.5
    shares = [means[way]["detail_share"] for way in ("bilinear", "bicubic", "tuned")]
    assert shares[0] < shares[1] < shares[2] < 1

    down = [Image.fromarray(truth).resize((64, 64), Image.Resampling.BICUBIC) for truth in truths]
    blurred = [np.asarray(part.resize((256, 256), Image.Resampling.BICUBIC), np.float64) for part in down]
    detail = sum(((truth - low) ** 2).mean() for truth, low in zip(truths, blurred, strict=True))
    # Pillow's enlarging kernel is a little softer (a = -0.5) than torch's (-0.75).
    assert shares[2] == pytest.approx(detail / sum(truth.var((0, 1)).mean() for truth in truths), rel=0.05)

    gain = [means["tuned"]["consistency"] - means[way]["consistency"] for way in ("bilinear", "bicubic", "base")]
    assert [more["consistency"][0] for more in found.gain.values()] == pytest.approx(gain, abs=1e-3)
