"""Plain picture measures in NumPy: no learned parts, so a figure means the same on every machine.

Pictures are uint8 (H, W, 3). Each measure of an upscaled picture takes it, the truth, and the low-res picture it came from.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

MEASURES = {  # of an upscaled picture, as summaries name them: what they are, their unit, and which way is better
    "psnr": "PSNR to the truth, dB, more is better",
    "ssim": "SSIM to the truth, at most 1, more is better",
    "consistency": "PSNR of its downscale to the low-res picture, dB, more is better",
    "detail": "detail as a multiple of the truth's, 1 is best: less is blurred, more is noise",
    "colour_shift": "mean colour off the truth's, levels of 255, less is better",
    "clip": "likeness to the truth, to CLIP, at most 1, more is better",  # both with an `eval_clip_model` alone
    "clip_distance": "distance of the set to the truths', to CLIP, less is better",
    "lpips": "distance to the truth, LPIPS, less is better",  # with an `eval_lpips_model` alone
}
SAMPLE_MEASURES = {  # the same of one that was made of Stage I's sample, which has no truth
    "consistency": "PSNR of its downscale to the sample, dB, more is better",
    "detail_share": "detail as a share of its own energy, 0 to 1, neither way is better: little is blurred, much is noise",
    "colour_shift": "mean colour off the sample's, levels of 255, less is better",
}
UPSCALED_BY = ("bilinear", "bicubic", "base", "tuned")  # in the order in which tables show them
RESAMPLES, FEWEST = 10_000, 10  # of a bootstrap; pictures that it needs
_WINDOW, _SIGMA = 11, 1.5  # of SSIM, Wang et al. 2004


def psnr(picture: np.ndarray, truth: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 pictures of one shape; 100.0 when they are equal."""
    error = float(np.mean((picture.astype(np.float64) - truth.astype(np.float64)) ** 2))
    return 100.0 if error == 0 else 10 * math.log10(255.0**2 / error)


def ssim(picture: np.ndarray, truth: np.ndarray) -> float:
    """Structural similarity (Wang et al. 2004, eq. 13), mean over the three colours and all whole windows; 1 when equal.

    Agrees with scikit-image's structural_similarity with gaussian_weights and population covariance. At least 11 px a side.
    """
    x, y = picture.astype(np.float64), truth.astype(np.float64)
    mean_x, mean_y = _blurred(x), _blurred(y)
    var_x, var_y = _blurred(x * x) - mean_x**2, _blurred(y * y) - mean_y**2
    both = _blurred(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    upper = (2 * mean_x * mean_y + c1) * (2 * both + c2)
    return float((upper / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean())


def colour_shift(picture: np.ndarray, truth: np.ndarray) -> float:
    """How far the mean colour is off, in levels of 255: the mean over red, green and blue of the distance."""
    return float(np.abs(picture.mean((0, 1), np.float64) - truth.mean((0, 1), np.float64)).mean())


def detail_energy(picture: np.ndarray, low_pass: np.ndarray) -> float:
    """Mean square of what the low-res size cannot hold, in levels of 255; 0 for an enlargement.

    low_pass: the picture brought down to the low-res size and enlarged again. Sums over pictures are to be compared, not
    ratios of single ones: a smooth truth has next to none.
    """
    return float(np.mean((picture.astype(np.float64) - low_pass) ** 2))


def busiest(picture: np.ndarray, low_pass: np.ndarray, edge: int, step: int) -> tuple[int, int]:
    """Top and left, multiples of `step`, of the square window with most detail; the first one where there is none.

    `edge`: at most the picture's own.
    """
    energy = ((picture.astype(np.float64) - low_pass) ** 2).sum(2)
    sums = np.pad(energy, ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    inside = sums[edge:, edge:] - sums[:-edge, edge:] - sums[edge:, :-edge] + sums[:-edge, :-edge]
    top, left = np.unravel_index(inside[::step, ::step].argmax(), inside[::step, ::step].shape)
    return int(top) * step, int(left) * step


def mean_and_interval(values: Sequence[float], seed: int = 0) -> tuple[float, ...]:
    """Mean, and a 95 % percentile bootstrap interval of it (Efron 1979) over the values, which are one for each picture.

    The mean alone when there are fewer than FEWEST: of 4 such an interval would hold the true mean in 80 % of cases.
    """
    found = np.asarray(values, np.float64)
    if len(found) < FEWEST:
        return (float(found.mean()),)
    draws = np.random.default_rng(seed).integers(0, len(found), (RESAMPLES, len(found)))
    low, high = np.percentile(found[draws].mean(1), [2.5, 97.5])
    return float(found.mean()), float(low), float(high)


def gained(values: Sequence[float]) -> str:
    """What `mean_and_interval` gave of a gain in PSNR, in words."""
    middle, *interval = values
    ends = "{:+.2f} to {:+.2f}, 95 %".format(*interval) if interval else f"fewer than {FEWEST} pictures: no interval"
    return f"{middle:+.2f} dB ({ends})"


def by_noise_level(summary: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """What `measure_upscalers` returned, for each level its `upscaled` and `gain`; empty where there is nothing."""
    if "upscaled" not in summary:
        return {}
    others = summary.get("other_levels", {}).items()
    return {summary["noise_level"]: summary, **{int(level): found for level, found in others}}


def measure_rows(summary: dict[str, Any], measures: dict[str, str], gain: str) -> list[dict[str, Any]]:
    """A table of what `measure_upscalers` returned: a row for each noise level and way, its heads the measures in words;
    and what the tuned model gains on the way in one of them.
    """
    rows = []
    for level, found in by_noise_level(summary).items():
        means, gains = found["upscaled"], found["gain"]
        for way in (way for way in UPSCALED_BY if way in means):
            more = gained(gains[way][gain]) if way in gains else ""
            measured = {words: means[way][name] for name, words in measures.items() if name in means[way]}
            head = f"tuned gains on it: {measures[gain].split(', ')[0]}"
            rows.append({"noise level": level, "upscaled by": way, **measured, head: more})
    return rows


def mean(values: list[float]) -> float:
    """Arithmetic mean, rounded to 4 decimals: what a summary shows."""
    return round(sum(values) / len(values), 4)


def _blurred(picture: np.ndarray) -> np.ndarray:
    """float64 (H, W, 3) -> (H - 10, W - 10, 3): a Gaussian over whole windows only."""
    offsets = np.arange(_WINDOW) - _WINDOW // 2
    kernel = np.exp(-0.5 * (offsets / _SIGMA) ** 2)
    kernel /= kernel.sum()
    for axis in (0, 1):
        picture = sliding_window_view(picture, _WINDOW, axis) @ kernel
    return picture
