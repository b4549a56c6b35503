"""An upscaler's measures in words: the same table in the UI and in the model card."""

from dataclasses import dataclass

from deepfloyd_core.bundle.version_figures import three
from deepfloyd_core.measures.tables import UPSCALED_BY, MeasureTable, gained


@dataclass(frozen=True)
class MeasureWords:
    """A table: its heads, its rows, and what is told below it."""

    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]  # what the tuned model gains in the main measure, then what the columns mean


def measure_words(measured: MeasureTable) -> MeasureWords:
    """A row for each method of upscaling at each noise level."""
    measures, main, levels = measured.measures, measured.main, measured.figures.by_level
    heads = ("upscaled by", *(f"{one.label}{', dB' if one.unit == 'dB' else ''}" for one in measures), "noise level")
    rows, gains = list[tuple[str, ...]](), list[str]()
    for level, figures in levels.items():
        at = f" at noise level {level}" if len(levels) > 1 else ""
        for method in (method for method in UPSCALED_BY if method in figures.upscaled):
            rows.append((method, *(three(figures.upscaled[method][one.name]) for one in measures), str(level)))
            if gain := figures.gain.get(method):
                gains.append(f"tuned over {method}{at}: {main.label} {gained(gain[main.name], main.unit)}")
    meanings = [f"{one.label}: {one.meaning}" for one in measures]
    return MeasureWords(heads, tuple(rows), (*gains[::-1], *meanings))
