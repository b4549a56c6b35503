"""The main figures of all versions of a workspace, as a drawing: is the model becoming better?

An SVG of its own, so that reports need no plotting library: a panel for each figure, a point for each version, and the base
as a dashed line. Figures of versions are means over the held-out pictures of each, which grow with the data.
"""

import base64
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from deepfloyd_core.bundle.identity import BundleSummary
from deepfloyd_core.bundle.version_figures import measurements_of, three
from deepfloyd_core.config.stages import STAGES, UPSCALERS
from deepfloyd_core.store.events import State, standing
from deepfloyd_core.store.versions import versions

_WIDTH, _PANEL, _GAP = 760, 130, 46  # px
_LEFT, _RIGHT = 64, 16
_COLOURS: Mapping[State, str] = {"champion": "#14743a", "blocked": "#c0392b", "candidate": "#b87a00"}
_OTHERS = "#1f4e99"
_LEGEND = [
    ("serves", _COLOURS["champion"]), ("is blocked", _COLOURS["blocked"]),
    ("waits for a decision", _COLOURS["candidate"]), ("served before", _OTHERS),
]  # fmt: skip
_LEAST_RANGE = 0.02  # of a panel, as a share of its figures: less would look like more than it is
_MOST_VERSIONS = 100  # the last ones: the drawing has at most 60 kB
_MOST_LABELS = 12  # of versions below a panel


@dataclass(frozen=True)
class Point:
    """The figure of a version."""

    version: int
    value: float
    base: float | None
    state: State


@dataclass(frozen=True)
class Series:
    """A figure over the versions that have it."""

    name: str
    points: tuple[Point, ...]


def version_series(workspace: Path) -> list[Series]:
    """The figures that two of the last versions have at least. Reads a record for each version (1 ms)."""
    now, found = standing(workspace), dict[str, list[Point]]()
    for version in versions(workspace)[-_MOST_VERSIONS:]:
        if one := measurements_of(workspace, version):
            for name, value, base in _values(one.summary):
                found.setdefault(name, []).append(Point(version.number, value, base, now.state_of(version.number)))
    order = sorted(found, key=lambda name: ("loss" in name, name))
    return [Series(name, tuple(found[name])) for name in order if len(found[name]) > 1]


def chart_uri(series: Sequence[Series]) -> str:
    """The drawing as `data:` URI; empty without any series."""
    if not series:
        return ""
    return f"data:image/svg+xml;base64,{base64.b64encode(svg(series).encode()).decode()}"


def svg(series: Sequence[Series]) -> str:
    """The drawing: panels below each other, and what the colours mean."""
    height = len(series) * (_PANEL + _GAP) + 30
    parts = [line for number, one in enumerate(series) for line in _panel(one, 24 + number * (_PANEL + _GAP))]
    for number, (word, colour) in enumerate(_LEGEND):
        x = _LEFT + 150 * number
        parts.append(f'<circle cx="{x}" cy="{height - 14}" r="4" fill="{colour}"/>{_text(x + 8, height - 10, word)}')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" viewBox="0 0 {_WIDTH} {height}" '
        f'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="#fff"/>{"".join(parts)}</svg>'
    )


def _values(summary: BundleSummary) -> Iterator[tuple[str, float, float | None]]:
    """The name of each figure, its value and the base's."""
    if (held_out := summary.samples.held_out) and summary.tables:
        value, base = (held_out.upscaled.get(way, {}).get("psnr") for way in ("tuned", "base"))
        if value is not None:
            yield f"{STAGES[UPSCALERS[0]].title}: PSNR to the truth, dB (more is better)", value, base
    if (share := summary.samples.concept_share_tuned) is not None:
        yield "Samples that show their prompt, share (more is better)", share, summary.samples.concept_share_base
    for stage, training in summary.trainings.items():
        if training.eval_loss is not None:
            yield f"{STAGES[stage].title}: held-out loss (less is better)", training.eval_loss, training.eval_loss_base


def _panel(series: Series, top: int) -> Iterator[str]:
    points = series.points
    values = [each for point in points for each in (point.value, point.base) if each is not None]
    low, high = min(values), max(values)
    room = _LEAST_RANGE * max(abs(low), abs(high), 1e-9) - (high - low)
    low, high = low - max(room, 0) / 2, high + max(room, 0) / 2
    first, last = points[0].version, points[-1].version

    def x(version: int) -> float:
        return _LEFT + 10 + (_WIDTH - _LEFT - _RIGHT - 20) * (version - first) / (last - first)

    def y(value: float) -> float:
        return top + _PANEL - 8 - (_PANEL - 16) * (value - low) / (high - low)

    yield _text(_LEFT, top - 8, series.name, weight="bold")
    yield f'<rect x="{_LEFT}" y="{top}" width="{_WIDTH - _LEFT - _RIGHT}" height="{_PANEL}" fill="none" stroke="#ccd2da"/>'
    yield from (_text(_LEFT - 6, y(value) + 4, three(value), anchor="end") for value in (low, high))
    base = [f"{x(point.version):.1f},{y(point.base):.1f}" for point in points if point.base is not None]
    yield f'<polyline points="{" ".join(base)}" fill="none" stroke="#8a94a3" stroke-dasharray="4 4"/>'
    if base:
        yield _text(_WIDTH - _RIGHT - 4, y(points[-1].base or low) - 4, "base", anchor="end", fill="#6b7480")
    line = " ".join(f"{x(point.version):.1f},{y(point.value):.1f}" for point in points)
    yield f'<polyline points="{line}" fill="none" stroke="#b8c4d6"/>'
    every = max(1, -(-len(points) // _MOST_LABELS))
    for number, point in enumerate(points):
        colour, radius = _COLOURS.get(point.state, _OTHERS), 5 if point.state == "champion" else 3
        yield f'<circle cx="{x(point.version):.1f}" cy="{y(point.value):.1f}" r="{radius}" fill="{colour}"/>'
        if number % every == 0:
            yield _text(x(point.version), top + _PANEL + 14, str(point.version), anchor="middle", fill="#6b7480")


def _text(x: float, y: float, text: str, anchor: str = "start", weight: str = "normal", fill: str = "#1b1f26") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}" fill="{fill}"'
    return f"<text {place}>{escape(text)}</text>"
