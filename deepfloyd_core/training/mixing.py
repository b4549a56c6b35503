"""Which data set a batch is drawn from, when there are several: shares and windows of steps, as pure arithmetic.

Shares are exact, not only on average: of the first n batches each data set gives its share of n to within one or two.
So a rare set is never forgotten, and the number of batches from each set is known for any n without counting.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from deepfloyd_core.config.data_sets import ImageDataset
from deepfloyd_core.config.run import Run
from deepfloyd_core.config.stages import Stage
from deepfloyd_core.errors import ConfigError

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
        for start, end, units in self._stretches:
            if start >= number:
                break
            now = _halved(units, (number if end is None else min(end, number)) - start)
            given = [old + new for old, new in zip(given, now, strict=True)]
        return given

    @cached_property  # asked for with every batch
    def _stretches(self) -> list[tuple[int, int | None, list[int]]]:
        """Batches between which the same data sets are active: first, end, and the share of each in whole units."""
        steps = _edges(self.shares)
        starts = [step * self.passes_per_step for step in steps]
        units = [_units([share.weight if share.active(step) else 0.0 for share in self.shares]) for step in steps]
        return list(zip(starts, [*starts[1:], None], units, strict=True))


def first_gap(shares: tuple[Share, ...], steps: int) -> int | None:
    """The first of a run's steps in which no data set is active; None: there is none."""
    for step in _edges(shares):
        if step < steps and not any(share.active(step) for share in shares):
            return step
    return None


def with_new_share(shares: Sequence[Share], is_new: Sequence[bool], new_share: float) -> list[Share]:
    """Shares whose new ones are together `new_share` of all, while all are active; unchanged if all or none are new."""
    totals = {which: sum(share.weight for share, new in zip(shares, is_new, strict=True) if new == which)
              for which in (False, True)}  # fmt: skip
    if not all(totals.values()):
        return list(shares)
    parts = {True: new_share, False: 1 - new_share}
    return [replace(share, weight=share.weight / totals[new] * parts[new])
            for share, new in zip(shares, is_new, strict=True)]  # fmt: skip


def share_of(dataset: ImageDataset) -> Share:
    """The share and window of steps of a data set, from its settings."""
    return Share(dataset.probability, dataset.start_step, dataset.end_step)


def _edges(shares: tuple[Share, ...]) -> list[int]:
    """The steps at which the active data sets change."""
    ends = {share.end_step for share in shares if share.end_step is not None}
    return sorted({0} | {share.start_step for share in shares} | ends)


def _units(weights: list[float]) -> list[int]:
    """Weights as whole numbers, so that a share is the same to the last bit for any total and on any machine."""
    largest = max(weights)
    return [max(1, round(weight / largest * _UNIT)) if weight else 0 for weight in weights]


def _halved(units: list[int], total: int) -> list[int]:
    """How many of the first `total` picks each data set gets. With one more pick exactly one of them grows, by one.

    The sets are divided into two halves by weight, again and again; each time the picks are divided between the halves,
    rounded to the nearest integer.
    """
    every = sum(units)
    if not every:
        return [0] * len(units)
    if len(units) == 1:
        return [total]
    cut = min(range(1, len(units)), key=lambda place: abs(2 * sum(units[:place]) - every))
    first = (2 * total * sum(units[:cut]) + every) // (2 * every)
    return _halved(units[:cut], first) + _halved(units[cut:], total - first)


def check_steps(datasets: tuple[ImageDataset, ...], stage: Stage, steps: int) -> list[str]:
    """Raise ConfigError for an optimizer step of a stage in which no data set is drawn from.

    Returns a note for each data set that the stage never uses.
    """
    used = [dataset for dataset in datasets if dataset.factor(stage) is not None]
    gap = first_gap(tuple(share_of(dataset) for dataset in used), steps)
    if gap is not None:
        whys = (
            f"{ds.id} starts later (start_step = {ds.start_step})"
            if ds.start_step > gap
            else f"{ds.id} has ended (end_step = {ds.end_step})"
            for ds in used
        )
        raise ConfigError(
            f"No data set is active in step {gap + 1} of stage {stage}: {', '.join(whys)}. Change one of these."
        )
    return [
        f"{dataset.id}: start_step is {dataset.start_step}, and stage {stage} has {steps} steps: it is never used"
        for dataset in used
        if dataset.start_step >= steps
    ]


def shares(run: Run, stage: Stage) -> dict[str, Share]:
    """How the data sets that feed a stage take turns."""
    fed = [dataset for dataset in run.datasets if dataset.factor(stage) is not None]
    return {dataset.id: share_of(dataset) for dataset in fed}
