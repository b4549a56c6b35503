"""The closing report of each stage: counts, reasons, and the files that a person would look at next.

These are log lines, so they appear on the terminal and in the flow run alike; also when an artifact is reused.
"""

import logging
from collections.abc import Mapping

from deepfloyd_core.bundle.in_words import counts_in_words
from deepfloyd_core.config.stages import STAGES, UPSCALERS, Stage
from deepfloyd_core.index.ledger import DUPLICATE, INDEX_FILE, in_words
from deepfloyd_core.index.summary import IndexSummary
from deepfloyd_core.measures.files import UpscalingFiles
from deepfloyd_core.store.artifacts import Artifact
from deepfloyd_core.store.changes import label
from deepfloyd_core.store.counts import many
from deepfloyd_core.store.manifest import Summary
from deepfloyd_core.text.bounds import CHARACTERS, WORD
from deepfloyd_core.text.embeds import EmbedsSummary

log = logging.getLogger(__name__)
_SHEETS = (
    "rejected.png",
    "twins.png",
    "sheet.jpg",
    "tokens.png",
    "loss.png",
    "validation.png",
    "sheet.png",
    *(UpscalingFiles(stage).sheet.name for stage in UPSCALERS),
)


def tell(artifact: Artifact, summary: Summary) -> None:
    """Log the artifact's lines."""
    for line in ending(artifact, summary):
        log.info("%s", line)


def ending(artifact: Artifact, summary: Summary) -> list[str]:
    """A line with the counts and the files to look at, and what was lost; no line for artifacts that mean nothing to a
    person.
    """
    counts = counts_in_words(artifact.kind, summary)
    if counts is None:
        return []
    files = [artifact.path / name for name in _SHEETS if (artifact.path / name).exists()]
    if isinstance(summary, IndexSummary):
        files.append(artifact.path / INDEX_FILE)
    seen = f"; see {', '.join(map(str, files))}" if files else ""
    return [f"{label(artifact.kind)}: {counts}{seen}", *_examples(summary), *_lost(summary)]


def twins_line(index: IndexSummary) -> str:
    """For an index with duplicates: how many there are, and what happens to them."""
    first = "" if DUPLICATE in index.reasons else "; with duplicates = first a data set trains on one of each"
    return (
        f"{many(index.twins, 'picture is a duplicate', 'pictures are duplicates')} of "
        f"{many(index.twin_groups, 'other')}: each group is trained on or held out as a whole{first}. See twins.png"
    )


def unfit_line(stage: Stage, counts: Mapping[str, int]) -> str:
    """For an index with accepted pictures that a stage cannot use: how many, and why."""
    pictures = many(sum(counts.values()), "accepted picture")
    return f"{STAGES[stage].title} cannot use {pictures}: " + ", ".join(
        f"{n:,} {why}" for why, n in sorted(counts.items())
    )


def _examples(summary: Summary) -> list[str]:
    """For each reason that has a detail, one rejected file."""
    if not isinstance(summary, IndexSummary):
        return []
    return [f"{why}: {source}: {in_words(why, detail)}" for why, (source, detail) in summary.examples.items()]


def _lost(summary: Summary) -> list[str]:
    """Which parts of the captions do not reach T5."""
    lines: list[str] = []
    if not isinstance(summary, EmbedsSummary):
        return lines
    if summary.truncated:
        lines.append(
            f"{many(summary.truncated, 'text')} longer than {summary.length} tokens lost "
            f"{many(summary.tokens_lost, 'token')} at the end"
        )
    if summary.shortened:
        lines.append(
            f"{many(summary.shortened, 'caption')} longer than {CHARACTERS:,} characters, or with a word of more than "
            f"{WORD}, cut there before cleaning"
        )
    if summary.emptied:
        shown = ", ".join(repr(text) for text in summary.emptied_captions)
        lines.append(
            f"{many(summary.emptied, 'caption')} without a word after IF's cleaning, which drops URLs, tags, file "
            f"names and Chinese characters, trained as the empty text: {shown}"
        )
    return lines
