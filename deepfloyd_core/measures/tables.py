"""An upscaler's measures as tables: the same for the terminal, the UI and the model card."""

from collections.abc import Sequence
from dataclasses import dataclass

from deepfloyd_core.config.stages import STAGES, StageKind
from deepfloyd_core.measures.figures import UpscalingFigures, signed, signed_ends
from deepfloyd_core.measures.measure import Against, Measure
from deepfloyd_core.measures.pixel import FEWEST
from deepfloyd_core.measures.registry import measures_against

UPSCALED_BY = ("bilinear", "bicubic", "base", "tuned")  # in the order in which tables show them


@dataclass(frozen=True)
class MeasureTable:
    """The measures of an upscaler on one kind of low-res pictures."""

    title: str
    key: str  # of its page in the UI
    against: Against
    figures: UpscalingFigures

    @property
    def measures(self) -> tuple[Measure, ...]:
        """Those that have figures, in the order of their columns."""
        means = next(iter(self.figures.upscaled.values()))
        return tuple(measure for measure in measures_against(self.against) if measure.name in means)

    @property
    def main(self) -> Measure:
        """The measure whose gains tables show: the first that has any."""
        return next(measure for measure in measures_against(self.against) if measure.gains)


def measure_tables(
    kind: StageKind,
    held_out: UpscalingFigures | None,
    spoilt: UpscalingFigures | None,
    samples: UpscalingFigures | None,
) -> list[MeasureTable]:
    """One table of an upscaler for each existing kind of figures: held-out pictures, degraded ones, samples of the stage
    before it.
    """
    if kind.upscales is None:
        return []
    on, source = f"{kind.title} on", STAGES[kind.upscales].title
    tables: tuple[tuple[str, str, Against, UpscalingFigures | None], ...] = (
        (f"{on} held-out pictures", "measures", "truth", held_out),
        (f"{on} held-out pictures, low-res degraded as in training", "spoilt-measures", "truth", spoilt),
        (f"{on} {source}'s samples", "sample-measures", "sample", samples),
    )
    return [
        MeasureTable(title, f"{kind.table}-{key}", against, figures)
        for title, key, against, figures in tables
        if figures
    ]


def gained(values: Sequence[float], unit: str) -> str:
    """A gain from `mean_and_interval`, in words."""
    middle, *interval = values
    ends = f"{signed_ends(interval, 2)}, 95 %" if interval else f"fewer than {FEWEST} pictures: no interval"
    return f"{signed(middle, 2)} {unit} ({ends})"
