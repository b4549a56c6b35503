"""Which data set a batch is drawn from, when there are several: shares and windows of steps, as pure arithmetic.

Shares are kept exactly, not on average: of the first n batches each data set gave its share of n to within one or two, so
a rare set is never forgotten, and how many batches each has given is known for any n without counting through them.
"""

from dataclasses import dataclass

from deepfloyd_core.datafile import ImageDataset

_UNIT = 1 << 32  # how finely the largest share is counted


@dataclass(frozen=True)
class Share:
    """How much a data set is drawn from, and in which optimizer steps: from `start_step`, not including `end_step`."""

    weight: float
    start_step: int = 0  # the first step of a run is 0
    end_step: int | None = None

    def active(self, step: int) -> bool:
        """Whether it is drawn from in a step."""
        return self.start_step <= step and (self.end_step is None or step < self.end_step)


@dataclass(frozen=True)
class Mix:
    """Several data sets that take turns, a batch each time."""

    shares: tuple[Share, ...]
    passes_per_step: int = 1  # batches in one optimizer step

    def pick(self, number: int) -> tuple[int, int]:
        """Which data set gives batch `number` (0, 1, ...) of the run, and how many batches it gave before.

        Raises ValueError when none is active then; `first_gap` finds that beforehand.
        """
        before, after = self.given(number), self.given(number + 1)
        for place, count in enumerate(after):
            if count > before[place]:
                return place, before[place]
        raise ValueError("no data set is active in this step")

    def given(self, number: int) -> list[int]:
        """How many of the first `number` batches of the run each data set gave."""
        given = [0] * len(self.shares)
        edges = [edge * self.passes_per_step for edge in _edges(self.shares)]
        for start, end in zip(edges, [*edges[1:], number], strict=True):
            if start >= number:
                break
            weights = [share.weight if share.active(start // self.passes_per_step) else 0.0 for share in self.shares]
            given = [old + new for old, new in zip(given, _split(weights, min(end, number) - start), strict=True)]
        return given


def first_gap(shares: tuple[Share, ...], steps: int) -> int | None:
    """The first of a run's steps in which no data set is active; None: there is none."""
    for step in _edges(shares):
        if step < steps and not any(share.active(step) for share in shares):
            return step
    return None


def share_of(dataset: ImageDataset) -> Share:
    """A data set's settings."""
    return Share(dataset.probability, dataset.start_step, dataset.end_step)


def _edges(shares: tuple[Share, ...]) -> list[int]:
    """The steps at which the active data sets change."""
    ends = {share.end_step for share in shares if share.end_step is not None}
    return sorted({0} | {share.start_step for share in shares} | ends)


def _split(weights: list[float], total: int) -> list[int]:
    """How many of the first `total` picks each gets. With one more pick exactly one of them grows, by one.

    The sets are halved by weight again and again, and each time the picks are shared out to the nearest whole one.
    """
    largest = max(weights)
    if not largest:
        return [0] * len(weights)
    # Whole numbers, so that a share is the same to the last bit for any total and on any machine.
    units = [max(1, round(weight / largest * _UNIT)) if weight else 0 for weight in weights]
    return _halved(units, total)


def _halved(units: list[int], total: int) -> list[int]:
    if len(units) == 1:
        return [total]
    every = sum(units)
    if not every:
        return [0] * len(units)
    cut = min(range(1, len(units)), key=lambda place: abs(2 * sum(units[:place]) - every))
    first = (2 * total * sum(units[:cut]) + every) // (2 * every)
    return _halved(units[:cut], first) + _halved(units[cut:], total - first)
