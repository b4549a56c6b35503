"""The figures of Stage II that are stored and shown: means of the measures, and the tuned model's gains. No torch."""

import math
from collections.abc import Iterable, Mapping

from deepfloyd_core.store.manifest import Summary

_MOST_DECIMALS = 6  # of a difference that fewer would round to zero


class LevelFigures(Summary):
    """The figures at one noise level, by method (base, tuned, bicubic ...), then by the measure's name."""

    upscaled: Mapping[str, Mapping[str, float | None]]  # means; None: too few pictures for the measure
    gain: Mapping[str, Mapping[str, tuple[float, ...]]]  # of tuned on the others: mean, and its 95 % interval


class UpscalingFigures(LevelFigures):
    """The figures of one kind of low-res pictures; its own fields are those of the main noise level."""

    noise_level: int  # 0 to 999
    other_levels: Mapping[int, LevelFigures] = {}

    @property
    def by_level(self) -> dict[int, LevelFigures]:
        """The figures of each noise level, the main one first."""
        return {self.noise_level: self, **self.other_levels}


def signed(value: float, decimals: int) -> str:
    """A difference for a person. One that these decimals would round to zero has more; zero has no sign."""
    if not math.isfinite(value):
        return f"{value:+f}"
    while not round(value, decimals):
        if decimals >= _MOST_DECIMALS:
            return "0"
        decimals += 1
    return f"{value:+.{decimals}f}"


def signed_ends(ends: Iterable[float], decimals: int) -> str:
    """An interval for a person, `+0.10 to +0.30`. ends: the lower, then the upper."""
    return " to ".join(signed(end, decimals) for end in ends)
