"""Plain picture measures in NumPy: no learned parts, so a figure means the same on every machine."""

import math

import numpy as np


def psnr(picture: np.ndarray, truth: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 pictures of one shape; 100.0 when they are equal."""
    error = float(np.mean((picture.astype(np.float64) - truth.astype(np.float64)) ** 2))
    return 100.0 if error == 0 else 10 * math.log10(255.0**2 / error)


def mean(values: list[float]) -> float:
    """Arithmetic mean, rounded to 4 decimals: what a summary shows."""
    return round(sum(values) / len(values), 4)
