"""Files by name that a run used only in part or not at all: rejected pictures, and captions that T5 cuts.

A reason that few files have is named beside one that thousands have.
"""

from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from deepfloyd_core.errors import ArtifactError
from deepfloyd_core.hashing import caption_id
from deepfloyd_core.index.ledger import in_words, ledger_batches
from deepfloyd_core.store.artifacts import Artifact
from deepfloyd_core.text.embeds import truncated_texts

_FILES_OF_A_CAPTION = 3


@dataclass(frozen=True)
class Rejected:
    """A file that was not accepted."""

    file: str
    reason: str


@dataclass(frozen=True)
class CutCaption:
    """A text whose end T5 does not see."""

    text: str
    tokens_lost: int
    files: tuple[str, ...]  # the first ones that have it as a caption; none for a prompt


def rejected_files(index: Artifact, reasons: Mapping[str, int], most: int) -> list[Rejected]:
    """Rejected files, of each reason the first ones; none if the ledger is lost. reasons: how many files have each."""
    share = max(1, most // max(1, len(reasons)))
    known = {reason: min(count, share) for reason, count in reasons.items()}
    found: defaultdict[str, list[Rejected]] = defaultdict(list)
    with suppress(OSError, ValueError, pa.ArrowException):
        for batch in ledger_batches(index, ["status", "source", "reason", "detail"], rejected=True):
            for row in batch.filter(pc.equal(batch["status"], "rejected")).to_pylist():
                if len(found[row["reason"]]) < share:
                    found[row["reason"]].append(_rejected(row["source"], row["reason"], row["detail"]))
            if all(len(found[reason]) == count for reason, count in known.items()):
                break
    return [one for named in found.values() for one in named]


def _rejected(source: str, reason: str, detail: str | None) -> Rejected:
    told = in_words(reason, detail) if detail else ""
    return Rejected(source, ": ".join(filter(None, [reason.replace("_", " "), told])))


def cut_captions(embeds: Artifact, index: Artifact, most: int) -> list[CutCaption]:
    """The texts that lose most tokens first, with files that have them; nothing of what is lost or damaged."""
    with suppress(OSError, ValueError, pa.ArrowException, ArtifactError):
        cut = truncated_texts(embeds, most)
        wanted = {key: place for place, one in enumerate(cut) for key in one.captions}
        files = _files(index, wanted, cut[0].length) if cut else {}
        return [CutCaption(one.text, one.lost, tuple(files.get(place, ()))) for place, one in enumerate(cut)]
    return []


def _files(index: Artifact, wanted: Mapping[str, int], length: int) -> dict[int, list[str]]:
    """The first files with each wanted caption. length: a caption of fewer characters than tokens was not cut."""
    found: defaultdict[int, list[str]] = defaultdict(list)
    for batch in ledger_batches(index, ["source", "captions"]):
        for row in batch.to_pylist():
            for caption in row["captions"]:
                place = wanted.get(caption_id(caption)) if len(caption) >= length // 2 else None
                if place is not None and len(found[place]) < _FILES_OF_A_CAPTION:
                    found[place].append(row["source"])
    return found
