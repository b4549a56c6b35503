"""Groups the pictures of a ledger that are duplicates (twins), without comparing every pair.

Two pictures are twins when their bytes are equal, their pixels are equal, or their looks agree (`looks`); a group is a
connected component of such pairs. Each 64-bit hash is split into six parts of 10 or 11 bits. Hashes that differ in at
most 4 bits agree in at least two parts. So the pictures are sorted by each of the 15 pairs of parts, and then by
lightness, which puts twins close together; each picture is compared with at most the next MAX_NEAR. So time grows with
n log n, and memory is 60 bytes a picture; figures are in `benchmarks/results.md`.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import PurePosixPath

import numpy as np

from deepfloyd_core.index.looks import MAX_BITS, MAX_MEAN, hashes_of, lightness_of, same_thumbnail
from deepfloyd_core.pictures.draws import mixed

MAX_NEAR = 64  # in a family of thousands that nearly agree, groups still grow from neighbour to neighbour
_PARTS = ((0, 11), (11, 11), (22, 11), (33, 11), (44, 10), (54, 10))  # of the hash: first bit, bits
_AT_ONCE = 1 << 16
_ROW = np.uint64(0xFFFFFFFF)
_DIGITS = re.compile("[0-9]+")


@dataclass(frozen=True)
class Member:
    """The facts that decide which picture of a group is the first."""

    row: int
    group: int
    stages: int  # that it can feed
    dataset_id: str
    source: str
    image_id: str

    @property
    def order(self) -> tuple[int, str, int, str, str]:
        """Sort key: the first picture feeds most stages, in the run or not; then names decide. A copy's name is mostly
        its original's with an addition, or lies deeper.
        """
        path = PurePosixPath(self.source)
        name = self.source[: len(self.source) - len(path.suffix)]
        return -self.stages, self.dataset_id, len(path.parts), _DIGITS.sub(_as_number, name), self.source


def group_alike(keys: np.ndarray, looks: np.ndarray, places: np.ndarray) -> np.ndarray:
    """For each of N pictures the number of the first picture of its group; its own if it has no twin: int64 (N,).

    keys: uint64 (N,), of each picture's bytes; looks: uint8 (rows, LOOK_BYTES), may be mapped from a file; places:
    int64 (N,), ascending, the row of each picture's look.
    """
    groups = _Groups(len(keys))
    hashes, light, exact = (np.empty(len(keys), np.uint64) for _ in range(3))
    for start in range(0, len(keys), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        block = np.ascontiguousarray(looks[places[part]])
        hashes[part], light[part], exact[part] = hashes_of(block), lightness_of(block), _digests(block)
    for same in (keys, exact):
        order = np.argsort(same, kind="stable")
        equal = np.flatnonzero(same[order][1:] == same[order][:-1])
        groups.join(order[equal], order[equal + 1])
    _, firsts = np.unique(exact, return_index=True)
    firsts = np.sort(firsts[hashes[firsts] != 0])
    hashes, light = hashes[firsts], light[firsts]
    for parts in combinations(_PARTS, 2):
        for one, other in near_pairs(hashes, light, parts):
            rows = firsts[one], firsts[other]
            apart = groups.first(rows[0]) != groups.first(rows[1])
            rows = rows[0][apart], rows[1][apart]
            alike = same_thumbnail(looks[places[rows[0]]], looks[places[rows[1]]])
            groups.join(rows[0][alike], rows[1][alike])
    return groups.first(np.arange(len(keys)))


def near_pairs(
    hashes: np.ndarray, light: np.ndarray, parts: tuple[tuple[int, int], ...]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of places that agree in two parts of their hashes, nearly in the rest, and in lightness; some at a time."""
    key = np.zeros(len(hashes), np.uint64)
    for first, bits in parts:
        key = key << np.uint64(bits) | hashes >> np.uint64(first) & np.uint64((1 << bits) - 1)
    spots = np.sort((key << np.uint64(9) | light) << np.uint64(32) | np.arange(len(key), dtype=np.uint64))
    ends = np.searchsorted(spots, ((spots >> np.uint64(32)) + np.uint64(MAX_MEAN + 1)) << np.uint64(32))
    near = np.minimum(ends - np.arange(len(spots)) - 1, MAX_NEAR).astype(np.int8)
    rows = (spots & _ROW).astype(np.int64)
    active = np.flatnonzero(near)
    for step in range(1, MAX_NEAR + 1):
        for start in range(0, len(active), _AT_ONCE):
            some = active[start : start + _AT_ONCE]
            one, other = rows[some], rows[some + step]
            like = np.bitwise_count(hashes[one] ^ hashes[other]) <= MAX_BITS
            yield one[like], other[like]
        active = active[near[active] > step]


def _as_number(digits: re.Match[str]) -> str:
    """Digits with their count in front, so that texts are in the order of the numbers in them: row 9 before row 10."""
    plain = digits[0].lstrip("0")
    return f"{len(plain):05d}{plain}"


def _digests(looks: np.ndarray) -> np.ndarray:
    """uint64 (N,): equal for equal looks."""
    found = np.zeros(len(looks), np.uint64)
    for word in looks.view("<u8").reshape(len(looks), -1).T:
        found = mixed(found ^ word)
    return found


class _Groups:
    """Disjoint sets of places, which are merged; each set is named by its first place."""

    def __init__(self, count: int) -> None:
        self._above = np.arange(count)  # a place before it in its set, or itself

    def first(self, places: np.ndarray) -> np.ndarray:
        """The first places of the sets of some places."""
        found = self._above[places]
        while not np.array_equal(found, above := self._above[found]):
            found = above
        self._above[places] = found
        return np.asarray(found)

    def join(self, one: np.ndarray, other: np.ndarray) -> None:
        """Merge the two sets of each pair."""
        while len(one):
            ends = self.first(one), self.first(other)
            np.minimum.at(self._above, np.maximum(*ends), np.minimum(*ends))
            apart = self.first(one) != self.first(other)
            one, other = one[apart], other[apart]
