"""Picture measures in plain NumPy: no learned parts, so a figure means the same on every machine.

Pictures are uint8 (H, W, 3). A measure of an upscaled picture takes it, the ground truth, and the low-res picture.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

RESAMPLES, FEWEST = 10_000, 10  # of a bootstrap; pictures that it needs
_WINDOW, _SIGMA = 11, 1.5  # of SSIM, Wang et al. 2004


def psnr(picture: np.ndarray, truth: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 pictures of one shape; 100.0 when they are equal."""
    error = float(np.mean((picture.astype(np.float64) - truth.astype(np.float64)) ** 2))
    return 100.0 if error == 0 else 10 * math.log10(255.0**2 / error)


def ssim(picture: np.ndarray, truth: np.ndarray) -> float:
    """Structural similarity (Wang et al. 2004, eq. 13), mean over the three colours and all complete windows; 1 when equal.

    Agrees with scikit-image's structural_similarity with gaussian_weights and population covariance. At least 11 px a
    side.
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


def colour_spread(picture: np.ndarray, truth: np.ndarray) -> float:
    """How far the spread of the colours is off, in levels of 255: the mean over red, green and blue of the distance of the
    standard deviations. Washed-out or exaggerated colours have the right mean and another spread.
    """
    return float(np.abs(picture.std((0, 1), np.float64) - truth.std((0, 1), np.float64)).mean())


def detail_energy(picture: np.ndarray, low_pass: np.ndarray) -> float:
    """Mean square of the detail that the low-res size cannot hold, in levels of 255; 0 for an interpolated picture.

    low_pass: the picture downscaled to the low-res size and upscaled again. Compare sums over pictures, not ratios of
    single pictures: a smooth ground truth has almost none.
    """
    return float(np.mean((picture.astype(np.float64) - low_pass) ** 2))


def busiest(picture: np.ndarray, low_pass: np.ndarray, edge: int, step: int) -> tuple[int, int]:
    """Top and left, multiples of `step`, of the square window with most detail; the first window if there is no detail.

    `edge`: at most the picture's own.
    """
    energy = ((picture.astype(np.float64) - low_pass) ** 2).sum(2)
    sums = np.pad(energy, ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    inside = sums[edge:, edge:] - sums[:-edge, edge:] - sums[edge:, :-edge] + sums[:-edge, :-edge]
    top, left = np.unravel_index(inside[::step, ::step].argmax(), inside[::step, ::step].shape)
    return int(top) * step, int(left) * step


def mean_and_interval(values: Sequence[float], seed: int = 0) -> tuple[float, ...]:
    """Mean, and its 95 % percentile bootstrap interval (Efron 1979) over the values, one for each picture.

    Only the mean when there are fewer than FEWEST values: with 4, such an interval would contain the true mean in 80 %
    of cases.
    """
    sample = np.asarray(values, np.float64)
    if len(sample) < FEWEST:
        return (float(sample.mean()),)
    draws = np.random.default_rng(seed).integers(0, len(sample), (RESAMPLES, len(sample)))
    low, high = np.percentile(sample[draws].mean(1), [2.5, 97.5])
    return float(sample.mean()), float(low), float(high)


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
