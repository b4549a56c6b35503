"""Prints on the terminal a version's figures, and the faults that `verify` reports."""

from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from deepfloyd_core.bundle.identity import BundleSummary
from deepfloyd_core.bundle.verify import Verified
from deepfloyd_core.config.stages import STAGES, UPSCALERS, Stage
from deepfloyd_core.measures.files import UpscalingFiles
from deepfloyd_core.measures.held_out_loss import LossChange
from deepfloyd_core.measures.tables import UPSCALED_BY, MeasureTable, gained
from deepfloyd_core.store.counts import many
from deepfloyd_core.store.registry import Outcome, news_of
from deepfloyd_core.store.versions import bundle_of
from tasks.terminal import STYLES, labelled


def print_verified(out: Console, verified: Verified) -> None:
    """Print the result of `verify`: a line for each fault and note, and what to do."""
    faults = {"missing": verified.missing, "damaged": verified.damaged, "version": verified.records}
    for label, lines in faults.items():
        for line in lines:
            out.print(labelled(label, "bold red", line))
    for line in verified.notes:
        out.print(labelled("note", "yellow", line))
    checked = f"{many(verified.artifacts, 'artifact')} and {many(verified.versions, 'version')} checked"
    out.print(f"{checked}, {many(verified.faults, 'fault')}")
    if verified.missing or verified.damaged:
        out.print(
            "`deepfloyd run`, with the settings and pictures of the version that needs them, rebuilds missing "
            "artifacts. Move the directories of damaged ones out of the workspace first."
        )


def print_news(out: Console, workspace: Path, outcome: Outcome) -> None:
    """Print what a run came to, in one line."""
    out.print(Text(news_of(workspace, outcome), STYLES[outcome.state]))
    if outcome.state == "blocked":
        out.print(f"`deepfloyd promote {workspace} {outcome.version.number}` makes it serve all the same")


def print_outcome(out: Console, workspace: Path, outcome: Outcome) -> None:
    """Print what a run came to, and the figures and the place of its version."""
    bundle = bundle_of(workspace, outcome.version)
    out.print()
    print_figures(out, bundle.summary(BundleSummary))
    print_news(out, workspace, outcome)
    out.print(f"bundle                 {bundle.path}")
    sheets = {bundle.path / "sheet.png": "contact sheet"}
    for files in (UpscalingFiles(stage, bundle.path) for stage in UPSCALERS):
        sheets |= {
            files.sheet: "held-out pictures",
            files.details: "zoomed details",
            files.spoilt[0]: "low-res degraded",
        }
    for file, label in sheets.items():
        if file.exists():
            out.print(f"{label:<22} {file}")


def print_figures(out: Console, figures: BundleSummary) -> None:
    """Print the figures of a bundle."""
    for stage, training in figures.trainings.items():
        print_losses(out, stage, training.changes)
    for key, value in figures.samples.record.items():
        if not isinstance(value, dict):
            out.print(f"{key.replace('_', ' '):<22} {value}")
    for table in figures.tables:
        print_measures(out, table)


def print_losses(out: Console, stage: Stage, changes: list[LossChange]) -> None:
    """A line for each: the held-out loss before and after, and how much it changed."""
    for one in changes:
        name = f"stage {STAGES[stage].roman} {'held-out loss' if one.since == 'base' else 'from its parent'}"
        out.print(f"{name:<22} {one.words}, {one.change}")


def print_measures(out: Console, measured: MeasureTable) -> None:
    """A line for each method and noise level, and what the tuned model gains on each other method in one measure."""
    levels, measures, main = measured.figures.by_level, measured.measures, measured.main
    table = Table("", "noise level", box=SIMPLE_HEAD, padding=(0, 1))
    for measure in measures:
        table.add_column(measure.label, justify="right")
    gains = []
    for level, figures in levels.items():
        for method in (method for method in UPSCALED_BY if method in figures.upscaled):
            means = (figures.upscaled[method][measure.name] for measure in measures)
            cells = ("" if value is None else f"{value:.3g}" if value < 10 else f"{value:.2f}" for value in means)
            plain = method not in ("base", "tuned")
            if not plain or figures is measured.figures:  # figures of interpolation are the same at every level
                table.add_row(method, "" if plain else str(level), *cells)
            if method in figures.gain:
                label = f"tuned over {method}" + (f", {level}" if len(levels) > 1 else "")
                gain = f"{main.label} {gained(figures.gain[method][main.name], main.unit)}"
                gains.append(f"{label:<{22 if len(levels) == 1 else 26}} {gain}")
    out.print(f"\n{measured.title}, upscaled by")
    out.print(table)
    for measure in measures:
        out.print(f"{measure.label:<22} {measure.meaning}")
    for line in gains:
        out.print(line)
