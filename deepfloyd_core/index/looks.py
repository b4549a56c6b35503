"""A picture's look: 392 bytes that tell whether two files show the same picture.

The look has a perceptual hash and two thumbnails. The hash is ImageHash's pHash, bit for bit: the signs of the 8x8
lowest frequencies of the gray picture. It stays the same when a picture is compressed, resized or turned by its EXIF
tag. But it ignores colour, and it cannot tell flat drawings apart: for these the thumbnails of lightness and colours
decide. For a picture almost without contrast hash and thumbnails are both noise: its look is a hash of the pixels
alone. Cost and error rates are in `benchmarks/results.md`.
"""

from collections.abc import Sequence
from operator import mul

import numpy as np

from deepfloyd_core.index.ledger import LOOK_BYTES
from deepfloyd_core.pictures.decode import GLANCE_PX, Glance

HASH_BYTES, LIGHT_PX, COLOUR_PX = 8, 16, 8
# Copies (JPEG of quality 60 to 95, WebP, half to twice the size) of photographs, pages and drawings differ by at most
# 6 bits, 6 levels of lightness and 5 of colour; 4 levels where the contrast is that of bricks.
MAX_BITS, MAX_COLOUR, MAX_MEAN = 8, 5, 2
MIN_CONTRAST = 3.0  # levels of lightness, standard deviation
_LIGHT = slice(HASH_BYTES, HASH_BYTES + LIGHT_PX**2)
_COLOUR = slice(HASH_BYTES + LIGHT_PX**2, LOOK_BYTES)
_AT_ONCE = 64  # sights, in 1.5 MB of float64
_MEANS = {edge: np.repeat(np.eye(edge), GLANCE_PX // edge, axis=1) for edge in (LIGHT_PX, COLOUR_PX)}
# DCT-II in whole numbers below 2^53: sums are exact in any order, so a look is the same on every machine. Bits differ from
# ImageHash's only where coefficients are equal to a thousandth of a level.
_WAVES = np.rint(2**20 * np.cos(np.pi / GLANCE_PX * np.outer(np.arange(8), np.arange(GLANCE_PX) + 0.5)))


def sight_of(glance: Glance) -> bytes:
    """The input of `looks_of`: YCbCr of the small copy; without contrast already the look, a sha256 of all pixels.

    Runs in the process that decodes. The rest takes 0.1 ms for one picture, and a tenth of that for many at once.
    """
    seen = glance.small.convert("YCbCr")
    light = seen.reduce(GLANCE_PX // LIGHT_PX).tobytes()[::3]
    count = len(light)  # not by NumPy, whose first call after a decode takes 0.05 ms
    if count * sum(map(mul, light, light)) - sum(light) ** 2 < (MIN_CONTRAST * count) ** 2:
        return (bytes(HASH_BYTES) + glance.digest()).ljust(LOOK_BYTES, b"\0")
    return seen.tobytes()


def looks_of(sights: Sequence[bytes]) -> list[bytes]:
    """The look of each sight: pHash, lightness (16 x 16) and colours (8 x 8, twice); without contrast zeros and a sha256."""
    looks = list(sights)
    seen = [place for place, sight in enumerate(sights) if len(sight) != LOOK_BYTES]
    for start in range(0, len(seen), _AT_ONCE):
        places = seen[start : start + _AT_ONCE]
        pixels = np.frombuffer(b"".join(sights[place] for place in places), np.uint8)
        planes = pixels.reshape(len(places), GLANCE_PX, GLANCE_PX, 3).astype(np.float64)
        light, blue, red = (planes[..., band] for band in range(3))
        parts = (_phashes(light), _means(light, LIGHT_PX), _means(blue, COLOUR_PX), _means(red, COLOUR_PX))
        for place, look in zip(places, np.concatenate(parts, axis=1), strict=True):
            looks[place] = look.tobytes()
    return looks


def hashes_of(looks: np.ndarray) -> np.ndarray:
    """The pHash of each look: uint64 (N,), 0 where there is none. looks: uint8 (N, LOOK_BYTES)."""
    return np.asarray(np.ascontiguousarray(looks[:, :HASH_BYTES]).view("<u8")[:, 0])


def lightness_of(looks: np.ndarray) -> np.ndarray:
    """The mean lightness of each look: uint64 (N,), 0 to 255."""
    return np.asarray(np.rint(looks[:, _LIGHT].mean(1)), np.uint64)


def same_thumbnail(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Whether the thumbnails of looks agree, pair by pair: bool (N,). The less contrast, the closer they must be."""
    light, more = one[:, _LIGHT].astype(np.int16), other[:, _LIGHT].astype(np.int16)
    contrast = np.minimum(light.std(1), more.std(1))
    colour = np.abs(one[:, _COLOUR].astype(np.int16) - other[:, _COLOUR]).max(1)
    return np.asarray((np.abs(light - more).max(1) <= np.minimum(6, 3 + contrast / 4)) & (colour <= MAX_COLOUR))


def _phashes(light: np.ndarray) -> np.ndarray:
    """Which of the lowest frequencies are above their median: uint8 (N, HASH_BYTES). light: (N, GLANCE_PX, GLANCE_PX).

    No row is all zeros: the first frequency, the sum of all pixels, is above the others unless the picture is black.
    """
    waves = (np.rint(_WAVES @ light / 2**5) @ _WAVES.T).reshape(len(light), -1)
    ordered = np.sort(waves, axis=1)
    middle = waves.shape[1] // 2
    return np.packbits(np.greater(2 * waves, ordered[:, middle - 1 : middle + 1].sum(1, keepdims=True)), axis=1)


def _means(plane: np.ndarray, edge: int) -> np.ndarray:
    """Means of blocks, halves rounded up: uint8 (N, edge * edge). plane: (N, GLANCE_PX, GLANCE_PX)."""
    sums = _MEANS[edge] @ plane @ _MEANS[edge].T
    return np.asarray(sums / (GLANCE_PX // edge) ** 2 + 0.5, np.uint8).reshape(len(plane), -1)
