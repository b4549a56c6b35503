"""Random numbers for millions of pictures: each is a pure function of (purpose, seed, picture, repeat).

So a crop is the same on every machine, in every order and for any number of workers. A sha256 for each would take 1.5
us in Python; NumPy makes 20 million of these numbers a second.
"""

from collections.abc import Callable, Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from deepfloyd_core.hashing import hash_seed

Draw = Callable[[str, slice], np.ndarray]  # (purpose, which pictures) -> float64 in [0, 1), one for each picture


def image_keys(image_ids: "pa.Array | pa.ChunkedArray | Iterable[str]") -> np.ndarray:
    """The first 64 bits of each picture's sha256 (hex text), the key for `hash_units`: uint64 (N,)."""
    column = image_ids if isinstance(image_ids, pa.Array | pa.ChunkedArray) else pa.array(image_ids, pa.string())
    heads = pc.cast(pc.utf8_slice_codeunits(column, 0, 16), pa.binary())
    signs = np.frombuffer(b"".join(heads.to_pylist()), np.uint8).reshape(-1, 8, 2)
    halves = np.where(signs < ord("a"), signs - ord("0"), signs - (ord("a") - 10))
    return (halves[..., 0] << 4 | halves[..., 1]).astype(np.uint8).copy().view(">u8").reshape(-1).astype(np.uint64)


def hash_units(purpose: str, seed: int, keys: np.ndarray, repeats: np.ndarray) -> np.ndarray:
    """float64 (N,) in [0, 1). keys: uint64 (N,); repeats: integers (N,). Mixed with splitmix64's finaliser
    (Steele, Lea and Flood 2014)."""
    passes = mixed(repeats.astype(np.uint64) ^ np.uint64(hash_seed(purpose, seed)))
    return np.asarray((mixed(keys ^ passes) >> np.uint64(11)) * 2.0**-53)


def seeded(seed: int, keys: np.ndarray, repeats: np.ndarray) -> Draw:
    """The draws of one data set's pictures. keys: uint64 (N,); repeats: integers (N,)."""
    return lambda purpose, part: hash_units(purpose, seed, keys[part], repeats[part])


def mixed(x: np.ndarray) -> np.ndarray:
    """splitmix64's step and finaliser: uint64 -> uint64, one to one, every bit depending on every bit."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(x ^ (x >> np.uint64(31)))
