"""Is one model worse than another on the same pictures? Paired differences, picture by picture. No torch.

From FEWEST pictures on: the bootstrap interval of all reports. With 2 to FEWEST - 1 pictures a bootstrap is too narrow;
there it is Student's t interval of the differences, which is as wide as so few pictures make it, and in addition a
margin: the mean may not be worse by more than that, because the t interval of two pictures excludes hardly anything.
With one picture the margin decides alone. The tests compare both with SciPy's.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np

from deepfloyd_core.measures.figures import signed, signed_ends
from deepfloyd_core.measures.pixel import FEWEST, mean_and_interval

K = TypeVar("K")
# The 97.5 % quantile of Student's t with 1, 2, 3 ... degrees of freedom.
_T = (12.70620474, 4.30265273, 3.182446305, 2.776445105, 2.570581836, 2.446911851, 2.364624252, 2.306004135)


@dataclass(frozen=True)
class Bounds:
    """How much worse counts, in the unit of the figure."""

    margin: float  # the most that the mean of fewer than FEWEST pictures may be worse
    negligible: float  # a mean that is worse by less is the rounding of another machine


@dataclass(frozen=True)
class PairedGain:
    """By how much one model is better than another on the same pictures."""

    pictures: int
    mean: float  # negative: it is worse; NaN: a figure is not finite
    interval: tuple[float, float] | None  # 95 %, of the mean; None: one picture
    bounds: Bounds

    def words(self, less: bool, digits: int) -> str:
        """The change of the figure, with its interval. less: less is better, so a gain is a fall."""
        sign = -1 if less else 1
        if self.interval is None:
            return f"{signed(sign * self.mean, digits)} ({'one picture' if self.pictures == 1 else 'not finite'})"
        low, high = sorted(sign * end for end in self.interval)
        of = f"{self.pictures} pictures"
        return f"{signed(sign * self.mean, digits)} ({signed_ends((low, high), digits)}, 95 %, {of})"

    @property
    def is_few(self) -> bool:
        """Whether there are too few pictures for a bootstrap."""
        return self.pictures < FEWEST

    @property
    def is_finite(self) -> bool:
        """Whether all that it is judged by is a number."""
        judged = (self.mean, *(self.interval or ()), self.bounds.margin, self.bounds.negligible)
        return all(map(math.isfinite, judged))

    @property
    def most_lost(self) -> float | None:
        """How much worse the mean may be with this interval; None: by any amount, as the interval does not exclude zero."""
        if self.interval is not None and self.interval[1] < 0:
            return self.bounds.negligible
        return max(self.bounds.margin, self.bounds.negligible) if self.is_few else None

    @property
    def is_worse(self) -> bool:
        """Whether it is worse beyond doubt; with few pictures also beyond the margin. Also if a figure or a bound is not
        finite.
        """
        if not self.is_finite:
            return True
        return self.most_lost is not None and self.mean < -self.most_lost


def paired_gain(
    before: Mapping[K, float], after: Mapping[K, float], better: Literal["less", "more"], bounds: Bounds
) -> PairedGain | None:
    """The gain of one model's figures on another's, over the pictures that both have. None: they have none in common."""
    sign = 1 if better == "more" else -1
    gains = [sign * (after[key] - before[key]) for key in sorted(before.keys() & after.keys(), key=str)]
    if not gains:
        return None
    if not all(map(math.isfinite, gains)):
        return PairedGain(len(gains), math.nan, None, bounds)
    if len(gains) >= FEWEST:
        mean, *ends = mean_and_interval(gains)
        return PairedGain(len(gains), mean, (ends[0], ends[1]), bounds)
    mean = float(np.mean(gains))
    if len(gains) == 1:
        return PairedGain(1, mean, None, bounds)
    half = _T[len(gains) - 2] * float(np.std(gains, ddof=1)) / math.sqrt(len(gains))
    return PairedGain(len(gains), mean, (mean - half, mean + half), bounds)
