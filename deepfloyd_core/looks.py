"""What a picture looks like, in 392 bytes: enough to tell whether two files show the same picture.

The hash is ImageHash's pHash, the signs of the 8x8 lowest frequencies of the gray picture. It stays when a picture is
compressed, resized or turned by its EXIF tag, but knows no colour, and of flat drawings too little: thumbnails of
lightness and colours decide. Of a picture almost without contrast both are noise: there a hash of the pixels is all.
Costs 0.2 ms of a JPEG, 1 to 2 ms of another 5-megapixel picture; how often it errs is in `benchmarks/results.md`.
"""

import imagehash
import numpy as np
import scipy.fftpack  # noqa: F401  ImageHash imports it in its first call, 0.2 s in every child

from deepfloyd_core.ledger import LOOK_BYTES
from deepfloyd_core.pictures import Glance

HASH_BYTES, LIGHT_PX, COLOUR_PX = 8, 16, 8
# Copies (JPEG of quality 60 to 95, WebP, half to twice the size) of photographs, pages and drawings differ by at most
# 6 bits, 6 levels of lightness and 5 of colour; 4 levels where the contrast is that of bricks.
MAX_BITS, MAX_COLOUR, MAX_MEAN = 8, 5, 2
MIN_CONTRAST = 3.0  # levels of lightness, standard deviation
_LIGHT = slice(HASH_BYTES, HASH_BYTES + LIGHT_PX**2)
_COLOUR = slice(HASH_BYTES + LIGHT_PX**2, LOOK_BYTES)


def look_of(glance: Glance) -> bytes:
    """The look of a picture: pHash, lightness (16 x 16) and colours (8 x 8, twice); without contrast zeros and a sha256."""
    light, *colours = glance.small.convert("YCbCr").split()
    edge = glance.small.width
    thumbnail = light.reduce(edge // LIGHT_PX).tobytes()
    if np.frombuffer(thumbnail, np.uint8).std() >= MIN_CONTRAST:
        bits = np.packbits(imagehash.phash(light).hash).tobytes()
        if any(bits):
            return b"".join([bits, thumbnail, *(colour.reduce(edge // COLOUR_PX).tobytes() for colour in colours)])
    return (bytes(HASH_BYTES) + glance.digest()).ljust(LOOK_BYTES, b"\0")


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
