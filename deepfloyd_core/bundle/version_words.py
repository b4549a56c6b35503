"""The sentences and numbers of a version's report: the same in the HTML file and in the UI."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from deepfloyd_core.bundle.version_figures import Change, MainFigure, decimals_of, three
from deepfloyd_core.bundle.version_report import PictureCounts, VersionReport
from deepfloyd_core.measures.figures import signed
from deepfloyd_core.store.counts import many
from deepfloyd_core.store.events import State
from deepfloyd_core.store.verdicts import Verdict

MOST_NAMED = 10  # files on a version's page
_STANDING: Mapping[State, str] = {
    "champion": "serves", "candidate": "waits for a decision", "blocked": "is blocked", "former": "served before",
    "unknown": "may or may not serve: a record of what happened is lost",
}  # fmt: skip


@dataclass(frozen=True)
class Tile:
    """A figure that is read at a glance."""

    head: str
    value: str
    notes: tuple["Note", ...]


@dataclass(frozen=True)
class Note:
    """A line below a figure."""

    words: str
    detail: str = ""
    verdict: str = ""  # better, worse ...; empty: none


def standing_words(report: VersionReport) -> str:
    """`serves`, `is blocked`."""
    return _STANDING[report.judgement.state]


def why(report: VersionReport) -> list[str]:
    """Why the version has its state: each reason of the gate's, or the one of who decided; and what its bundle lacks."""
    judgement = report.judgement
    failed = [one.reason for one in judgement.verdicts if not one.passed]
    reasons = failed if judgement.reason == "; ".join(failed) else [judgement.reason]
    return [line for line in (*reasons, report.fault) if line]


def who_serves(report: VersionReport) -> str:
    """Which version serves, where it is another one or none; else empty."""
    judgement = report.judgement
    if judgement.state in ("champion", "unknown"):
        return ""
    return "No version serves." if judgement.serves is None else f"Version {judgement.serves} serves."


def changes_of(report: VersionReport, figure: MainFigure) -> Iterator[tuple[str, Change]]:
    """The changes of a figure that are known, each with what it is since; the champion's first."""
    if figure.since_champion:
        yield f"version {report.judgement.against}", figure.since_champion
    if figure.since_base:
        yield "the base", figure.since_base


def direction(since: str, change: Change) -> str:
    """`better than the base`, `no clear difference from version 3`."""
    joins = {"better": "than", "worse": "than", "no clear difference": "from"}
    return f"{change.verdict} {joins.get(change.verdict, 'against')} {since}"


def tiles(report: VersionReport) -> list[Tile]:
    """The first measure, each stage's loss, and the pictures."""
    shown = [figure for number, figure in enumerate(report.figures) if number == 0 or figure.name.endswith("loss")]
    found = []
    for figure in shown:
        notes = [
            Note(direction(since, change), change.words(figure.decimals, figure.unit), change.verdict)
            for since, change in changes_of(report, figure)
        ]
        value = " ".join(filter(None, [three(figure.value), figure.unit]))
        found.append(Tile(f"{figure.name}, {figure.better}", value, tuple(notes)))
    return [*found, _pictures(report)]


def picture_lines(counts: PictureCounts, start: str = "") -> list[str]:
    """What became of the pictures. start: what was trained from, if there is more to tell than the base model."""
    lines = [f"trained {start}"] if start else []
    lines += [f"{stage}: trained on {many(count, 'picture')}" for stage, count in counts.trained_on.items()]
    lines += [] if counts.held_out is None else [f"{counts.held_out:,} held out of training"]
    return lines + (
        [] if counts.rejected is None else [f"{counts.rejected:,} of {many(counts.inputs or 0, 'file')} rejected"]
    )


def named_lines(counts: PictureCounts) -> list[str]:
    """Rejected files and cut captions by name, the first ones."""
    lines = [f"rejected: {one.file}: {one.reason}" for one in counts.rejected_files[:MOST_NAMED]]
    for one in counts.cut_captions[:MOST_NAMED]:
        of = f" of {', '.join(one.files)}" if one.files else ""
        lines.append(f"caption{of} loses {many(one.tokens_lost, 'token')} at its end: {one.text[:80]}")
    return lines


def _pictures(report: VersionReport) -> Tile:
    counts = report.pictures
    value = "–" if counts.accepted is None else f"{counts.accepted:,}"
    return Tile("Pictures accepted", value, tuple(map(Note, picture_lines(counts, report.start))))


def verdict_rows(report: VersionReport) -> list[dict[str, str | bool]]:
    """A row for each verdict of the gate, those that did not pass first."""
    return [
        {
            "rule": ", ".join(filter(None, [one.rule, one.about])), "passed": one.passed, "reason": one.reason,
            "figure": _signed(one, one.figure), "interval": " to ".join(_signed(one, end) for end in one.interval or ()),
            "limit": _signed(one, one.limit),
        }
        for one in sorted(report.judgement.verdicts, key=lambda one: one.passed)
    ]  # fmt: skip


def _signed(verdict: Verdict, value: float | None) -> str:
    """A share as percent, a change with its sign."""
    if value is None:
        return ""
    if verdict.rule == "rejected pictures":
        return f"{value:.1%}"
    if verdict.rule == "reloaded weights":
        return f"{value:.2g}"
    units = {"champion's upscaling": "dB", "colour drift": "levels of 255"}
    return signed(value, decimals_of(units.get(verdict.rule, "")))


def next_steps(report: VersionReport) -> list[tuple[str, str]]:
    """Commands that a person may want next, each with what it does."""
    where, number = report.workspace, report.number
    steps = []
    if report.judgement.state in ("candidate", "blocked", "former"):
        steps.append((f"deepfloyd promote {where} {number}", "makes this version serve"))
    if report.judgement.state == "champion" and report.judgement.is_replaceable:
        steps.append((f"deepfloyd rollback {where}", "blocks it, so that the version before serves again"))
    other = report.judgement.against or (report.since.before if report.since else None)
    if other is not None and other != number:
        steps.append((f"deepfloyd diff {where} {other} {number}", "compares both, with samples of the same seeds"))
    return [*steps, (f"deepfloyd history {where}", "lists all versions as they stand now")]
