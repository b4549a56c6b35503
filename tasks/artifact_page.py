"""The page of an artifact in the UI: how long it took, its facts and pictures, and where it is. What it holds is said in
the page's description, which the list of a run's artifacts shows too.
"""

from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from deepfloyd_core.bundle.facts import facts
from deepfloyd_core.bundle.in_words import counts_in_words
from deepfloyd_core.config.stages import UPSCALERS
from deepfloyd_core.errors import ArtifactError
from deepfloyd_core.measures.files import UpscalingFiles
from deepfloyd_core.store.artifacts import Artifact
from deepfloyd_core.store.changes import label
from deepfloyd_core.store.counts import duration
from deepfloyd_core.store.manifest import Summary
from tasks.endings import tell
from tasks.growing_page import GrowingPage
from tasks.markdown import Titled, code, pictures, plain
from tasks.outbox import create_markdown_artifact
from tasks.page_keys import workspace_key

TITLES = {
    "loss.png": "Loss of each step, and on held-out pictures", "validation.png": "Samples while it trained, same seeds",
    "sheet.png": "Samples of base and tuned model, same seeds", "tokens.png": "Tokens of the texts",
    **{UpscalingFiles(stage).sheet.name: "Held-out pictures, upscaled" for stage in UPSCALERS},
}  # fmt: skip


def artifact_key(artifact: Artifact, page: str = "") -> str:
    """The key of an artifact's page, or of another page about it."""
    return workspace_key(page or artifact.kind.replace("_", "-"), artifact.path.parents[1])


def show_artifact(
    artifact: Artifact, summary: Summary, *shown: str | Titled, above: Sequence[str] = (), below: Sequence[str] = (),
    page: GrowingPage | None = None,
) -> None:  # fmt: skip
    """Show the page of an artifact, and log its end.

    shown: pictures, or names of those in its directory; above, below: markdown before and after them; page: the one to
    change, if there is one.
    """
    titled = [(TITLES.get(one, one), artifact.path / one) if isinstance(one, str) else one for one in shown]
    there = [(title, one) for title, one in titled if not isinstance(one, Path) or one.exists()]
    markdown, holds = (
        artifact_page(artifact, summary, [*above, *pictures(there), *below]),
        counts_in_words(artifact.kind, summary),
    )
    description = plain(": ".join(filter(None, [label(artifact.kind), holds])))
    if page:
        page.put(markdown, description)
    else:
        create_markdown_artifact(markdown, key=artifact_key(artifact), description=description)
    tell(artifact, summary)


def artifact_page(artifact: Artifact, summary: Summary, body: Sequence[str]) -> str:
    """The page, with `body` below the facts."""
    took = took_words(artifact)
    lines = [*([took, ""] if took else []), *_facts(summary)]
    where = f"Artifact {code(artifact.fingerprint)} in {code(artifact.path.absolute())}"
    return "\n".join([*lines, *body, where])


def _facts(summary: Summary) -> list[str]:
    """A list: on a phone a table would be cut off."""
    lines = [f"- {plain(name)}: **{plain(value)}**" for name, value in facts(summary)]
    return [*lines, ""] if lines else []


def took_words(artifact: Artifact) -> str:
    """How long it took; empty if its record is lost."""
    with suppress(ArtifactError):
        took = duration(artifact.manifest.provenance.seconds)
        return f"Nothing to do: it was made before, in {took}." if artifact.reused else f"Made in {took}."
    return ""


def training_page(curve_and_samples: Sequence[Path]) -> str:
    """The page of a training that is under way."""
    shown = [(TITLES.get(file.name, file.name), file) for file in curve_and_samples]
    now = datetime.now(UTC).strftime("%H:%M:%S UTC")
    return "\n".join([f"As it was at {now}. This page changes while it trains: reload it.", "", *pictures(shown)])
