"""What artifacts hold, in words: the same in a run's log, in the UI and on the page of a version. No torch."""

from collections.abc import Mapping

from deepfloyd_core.bundle.identity import BundleSummary
from deepfloyd_core.config.stages import STAGES
from deepfloyd_core.crops.summary import CropsSummary
from deepfloyd_core.errors import ArtifactError
from deepfloyd_core.index.summary import IndexSummary
from deepfloyd_core.sampling.jobs import SamplesSummary
from deepfloyd_core.store.counts import many
from deepfloyd_core.store.manifest import Manifest, Summary
from deepfloyd_core.text.embeds import EmbedsSummary
from deepfloyd_core.training.jobs import TrainingSummary
from deepfloyd_core.training.start import StartSummary, start_kind

_SUMMARIES: Mapping[str, type[Summary]] = {
    "image_index": IndexSummary, "eval_set": CropsSummary, "stage1_pixels": CropsSummary, "stage2_pixels": CropsSummary,
    "text_embeds": EmbedsSummary, "stage1_lora": TrainingSummary, "stage2_lora": TrainingSummary,
    **{start_kind(stage): StartSummary for stage in STAGES}, "cascade_samples": SamplesSummary, "lora_bundle": BundleSummary,
}  # fmt: skip


def counts_in_words(kind: str, summary: Summary) -> str | None:
    """What an artifact holds; None for one whose counts mean nothing to a person."""
    match summary:
        case IndexSummary():
            return _index(summary)
        case CropsSummary() if kind == "eval_set":
            return f"{many(summary.pictures, 'picture')} held out of training"
        case CropsSummary() if kind != "eval_conditioning":
            return _crops(summary)
        case EmbedsSummary():
            captions = many(summary.captions, "caption or prompt", "captions and prompts")
            return f"{captions}, encoded as {many(summary.texts, 'text')}"
        case StartSummary():
            return f"the weights of version {summary.version}, which know {many(summary.pictures, 'picture')}"
        case TrainingSummary():
            return _training(summary)
        case SamplesSummary():
            return "base and tuned, same seeds"
    return None


def recorded_counts(record: Manifest) -> str:
    """What an artifact holds, by its record; empty where that says nothing to a person, or to this version of the
    program.
    """
    kind = _SUMMARIES.get(record.kind)
    if kind is None:
        return ""
    try:
        return counts_in_words(record.kind, kind.of_record(record.summary, record.kind)) or ""
    except ArtifactError:
        return ""


def _index(index: IndexSummary) -> str:
    reasons = ", ".join(f"{count:,} {why.replace('_', ' ')}" for why, count in index.reasons.items())
    rejected = f", {index.rejected:,} rejected ({reasons})" if reasons else ", none rejected"
    return f"{many(index.inputs, 'input')}: {index.accepted:,} accepted{rejected}"


def _crops(crops: CropsSummary) -> str:
    sizes = crops.sizes
    of = ", ".join(sizes) if len(sizes) <= 4 else f"{len(sizes)} sizes from {sizes[0]} to {sizes[-1]}"
    shown = f", shown {crops.shown_per_epoch:,} times an epoch" if crops.shown_per_epoch > crops.rows else ""
    return f"{many(crops.rows, 'crop')} of {many(crops.pictures, 'picture')}{shown}, {of}"


def _training(training: TrainingSummary) -> str:
    # Not the first and last step's losses: each is of another t, so they say nothing of what was learnt.
    said = f"{many(training.steps, 'step')} on {many(training.pictures, 'picture')}"
    changes = training.changes
    return said + (f", loss on held-out pictures {changes[0].words}" if changes else "")
