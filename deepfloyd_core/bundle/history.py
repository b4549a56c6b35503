"""The history of a workspace: each version with its state, its main figures and the reason of its state."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deepfloyd_core.bundle.identity import BundleSummary
from deepfloyd_core.config.stages import STAGES
from deepfloyd_core.errors import ArtifactError
from deepfloyd_core.measures.figures import signed, signed_ends
from deepfloyd_core.store.collected import collected
from deepfloyd_core.store.events import Event, State, fold, read_events
from deepfloyd_core.store.versions import Version, bundle_of, versions


@dataclass(frozen=True)
class HistoryRow:
    """A version."""

    version: int
    state: State
    when: str  # of its first event, UTC; empty: it has none
    run_file: str
    losses: tuple[str, ...]  # held-out loss of each stage: base -> tuned, and the change
    gains: tuple[str, ...]  # of the upscaler over its base
    reason: str  # of its state
    start: str = ""  # what its training started from; empty: from the base model, because nobody asked for more

    @property
    def facts(self) -> list[str]:
        """The figures, the reason and the start, each as a line."""
        losses = [f"held-out loss of Stage {loss} (less is better)" if "->" in loss else loss for loss in self.losses]
        gains = [f"Stage II's PSNR over the base's {gain} (more is better)" for gain in self.gains]
        return [line for line in (*losses, *gains, self.reason, self.start) if line]


def history(workspace: Path) -> list[HistoryRow]:
    """A row for each version whose record is intact, the oldest first."""
    events = [event for event in read_events(workspace) if isinstance(event, Event)]
    now = fold(read_events(workspace))
    rows = []
    for version in versions(workspace):
        own = [event for event in events if event.version == version.number]
        when, reason = (own[0].when, own[-1].reason) if own else ("", "its run ended before it was judged")
        losses, gains = _figures(workspace, version)
        state = now.state_of(version.number)
        rows.append(
            HistoryRow(version.number, state, when, Path(version.run_file).name, losses, gains, reason, version.start)
        )
    return rows


def _figures(workspace: Path, version: Version) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The figures of a version's bundle, or the fault why there are none."""
    try:
        if record := collected(workspace, f"lora_bundle/{version.bundle}"):
            summary = BundleSummary.of_record(record.manifest.summary, version.bundle)
        else:
            summary = bundle_of(workspace, version, is_used=False).summary(BundleSummary)
    except (ArtifactError, OSError):
        return ("its bundle is not complete",), ()
    changes = [(stage, change) for stage, training in summary.trainings.items() for change in training.changes]
    losses = [f"{STAGES[stage].roman}: {one.words}, {one.change}" for stage, one in changes if one.since == "base"]
    tables = [table for table in summary.tables if table.key.endswith("-measures") and table.against == "truth"][:1]
    gains = [_gain(table.figures.gain["base"][table.main.name], table.main.unit) for table in tables
             if "base" in table.figures.gain]  # fmt: skip
    return tuple(losses), tuple(gains)


def _gain(values: Sequence[float], unit: str) -> str:
    """A gain from `mean_and_interval`, short."""
    mean, *ends = values
    return f"{signed(mean, 2)} {unit}" + (f" ({signed_ends(ends, 2)}, 95 %)" if ends else "")
