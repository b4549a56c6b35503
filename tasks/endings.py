"""What each stage says when it is done: counts, reasons, and the files that a person would look at next.

Lines of the log, so they stand on the terminal and in the flow run alike; also where an artifact is used again.
"""

import logging
from collections.abc import Mapping
from typing import Any

from deepfloyd_core.config.flavours import Stage
from deepfloyd_core.index.ledger import DUPLICATE, INDEX_FILE, in_words
from deepfloyd_core.measures.held_out_loss import loss_changes
from deepfloyd_core.store.artifacts import Artifact
from deepfloyd_core.store.changes import label
from deepfloyd_core.store.counts import many

log = logging.getLogger(__name__)
_SHEETS = (
    "rejected.png",
    "twins.png",
    "sheet.jpg",
    "tokens.png",
    "loss.png",
    "validation.png",
    "sheet.png",
    "eval.png",
)


def tell(artifact: Artifact) -> None:
    """Log the artifact's lines."""
    for line in ending(artifact):
        log.info("%s", line)


def ending(artifact: Artifact) -> list[str]:
    """A line with the counts and the files to look at, and what was lost; none of artifacts that say nothing to a person."""
    kind, summary = artifact.kind, artifact.summary
    said = {
        "image_index": _index, "stage1_pixels": _crops, "stage2_pixels": _crops, "stage1_conditioning": _crops,
        "eval_set": _held_out, "text_embeds": _texts, "stage1_lora": _training, "stage2_lora": _training,
        "cascade_samples": _samples,
    }.get(kind)  # fmt: skip
    if said is None:
        return []
    files = [artifact.path / name for name in _SHEETS if (artifact.path / name).exists()]
    if kind == "image_index":
        files.append(artifact.path / INDEX_FILE)
    seen = f"; look at {', '.join(map(str, files))}" if files else ""
    return [f"{label(kind)}: {said(summary)}{seen}", *_examples(summary), *_lost(kind, summary)]


def twins_line(summary: dict[str, Any]) -> str:
    """Of an index with pictures that show the same: how many, and what becomes of them."""
    first = "" if DUPLICATE in summary["reasons"] else "; duplicates = first in a data set trains on one of each"
    return (
        f"{many(summary['twins'], 'picture shows', 'pictures show')} the same as {many(summary['twin_groups'], 'other')}: "
        f"each group is trained on or held out as a whole{first}. See twins.png"
    )


def unfit_line(stage: Stage, counts: Mapping[str, int]) -> str:
    """Of an index with accepted pictures that a stage cannot use: how many, and why."""
    pictures = many(sum(counts.values()), "accepted picture")
    return f"Stage {'I' * stage} cannot use {pictures}: " + ", ".join(
        f"{n:,} {why}" for why, n in sorted(counts.items())
    )


def _examples(summary: dict[str, Any]) -> list[str]:
    """Of each reason of which more is known, one rejected file."""
    return [
        f"{why}: {source}: {in_words(why, detail)}" for why, (source, detail) in summary.get("examples", {}).items()
    ]


def _samples(summary: dict[str, Any]) -> str:
    return "base and tuned, same seeds"


def _index(summary: dict[str, Any]) -> str:
    reasons = ", ".join(f"{count:,} {why}" for why, count in summary["reasons"].items())
    rejected = f", {summary['rejected']:,} rejected ({reasons})" if reasons else ", none rejected"
    return f"{many(summary['inputs'], 'input')}: {summary['accepted']:,} accepted{rejected}"


def _crops(summary: dict[str, Any]) -> str:
    sizes = summary["sizes"]
    of = ", ".join(sizes) if len(sizes) <= 4 else f"{len(sizes)} sizes from {sizes[0]} to {sizes[-1]}"
    shown = (
        f", shown {summary['shown_per_epoch']:,} times an epoch" if summary["shown_per_epoch"] > summary["rows"] else ""
    )
    return f"{many(summary['rows'], 'crop')} of {many(summary['pictures'], 'picture')}{shown}, {of}"


def _held_out(summary: dict[str, Any]) -> str:
    return f"{many(summary['pictures'], 'picture')} held out of training"


def _texts(summary: dict[str, Any]) -> str:
    captions = many(summary["captions"], "caption or prompt", "captions and prompts")
    return f"{captions}, encoded as {many(summary['texts'], 'text')}"


def _training(summary: dict[str, Any]) -> str:
    # Not the first and last step's losses: each is of another t, so they say nothing of what was learnt.
    said = f"{many(summary['steps'], 'step')} on {many(summary['pictures'], 'picture')}"
    changes = loss_changes(summary)
    return said + (f", loss on held-out pictures {changes[0].words}" if changes else "")


def _lost(kind: str, summary: dict[str, Any]) -> list[str]:
    """What the captions lose on their way to T5."""
    lines = []
    if kind == "text_embeds" and summary["truncated"]:
        lines.append(
            f"{many(summary['truncated'], 'text')} longer than {summary['length']} tokens lost "
            f"{many(summary['tokens_lost'], 'token')} at the end"
        )
    if kind == "text_embeds" and summary["emptied"]:
        shown = ", ".join(repr(text) for text in summary["emptied_captions"])
        lines.append(
            f"{many(summary['emptied'], 'caption')} without a word after IF's cleaning, which drops URLs, tags, file names "
            f"and Chinese signs, trained as the empty text: {shown}"
        )
    return lines
