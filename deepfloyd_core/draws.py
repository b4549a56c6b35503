"""Random numbers for pictures by the million: each a pure function of (purpose, seed, picture, repeat).

So a crop is the same on every machine, in every order and for any number of workers. `types.hash_unit` costs 1.5 us a number
in Python; here NumPy makes 20 million a second.
"""

from collections.abc import Callable, Iterable

import numpy as np

from deepfloyd_core.types import hash_seed

Draw = Callable[[str, slice], np.ndarray]  # (purpose, which pictures) -> float64 in [0, 1), one for each picture


def image_keys(image_ids: Iterable[str]) -> np.ndarray:
    """The first 64 bits of each picture's sha256, by which `hash_units` knows it: uint64 (N,)."""
    return np.array([int(image_id[:16], 16) for image_id in image_ids], dtype=np.uint64)


def hash_units(purpose: str, seed: int, keys: np.ndarray, repeats: np.ndarray) -> np.ndarray:
    """float64 (N,) in [0, 1). keys: uint64 (N,); repeats: integers (N,). Mixed with splitmix64's finaliser
    (Steele, Lea and Flood 2014)."""
    passes = _mixed(repeats.astype(np.uint64) ^ np.uint64(hash_seed(purpose, seed)))
    return np.asarray((_mixed(keys ^ passes) >> np.uint64(11)) * 2.0**-53)


def seeded(seed: int, keys: np.ndarray, repeats: np.ndarray) -> Draw:
    """The draws of one data set's pictures. keys: uint64 (N,); repeats: integers (N,)."""
    return lambda purpose, part: hash_units(purpose, seed, keys[part], repeats[part])


def _mixed(x: np.ndarray) -> np.ndarray:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(x ^ (x >> np.uint64(31)))
