"""What an artifact's page tells of it beside its sentence: names and values in the order in which a person reads them."""

from collections.abc import Iterator

from deepfloyd_core.bundle.version_figures import three
from deepfloyd_core.crops.summary import CropsSummary
from deepfloyd_core.measures.figures import signed
from deepfloyd_core.sampling.jobs import LowResSummary, SamplesSummary
from deepfloyd_core.store.counts import many, size
from deepfloyd_core.store.manifest import Summary
from deepfloyd_core.text.embeds import EmbedsSummary
from deepfloyd_core.text.projection import ProjectionSummary
from deepfloyd_core.training.jobs import TrainingSummary

Fact = tuple[str, str]  # its name, its value with the unit


def facts(summary: Summary) -> list[Fact]:
    """The facts of an artifact; none of one that its sentence tells all of."""
    match summary:
        case CropsSummary():
            return list(_crops(summary))
        case EmbedsSummary():
            return list(_embeds(summary))
        case ProjectionSummary():
            return [
                ("captions and prompts", f"{summary.captions:,}, {summary.taken_over:,} of them taken over"),
                ("the UNet's text modules", f"{summary.parameters:,} numbers"),
                ("on disk", size(summary.bytes)),
            ]
        case TrainingSummary():
            return list(_training(summary))
        case LowResSummary():
            return [
                ("low-res pictures", f"{summary.rows:,}"),
                ("sizes", _px(summary.sizes)),
                ("sampled by this run", f"{summary.sampled_by_this_process:,}"),
            ]
        case SamplesSummary():
            return list(_samples(summary))
    return []


def _px(sizes: tuple[str, ...]) -> str:
    return f"{', '.join(sizes[:6])}{f' and {len(sizes) - 6} more' if len(sizes) > 6 else ''} px"


def _crops(crops: CropsSummary) -> Iterator[Fact]:
    yield "crops", f"{crops.rows:,} of {many(crops.pictures, 'picture')}"
    yield "sizes", _px(crops.sizes)
    if crops.shown_per_epoch > crops.rows:
        yield "shown in an epoch", many(crops.shown_per_epoch, "crop")
    yield "decoded for them", many(crops.decoded, "picture")
    yield "files", f"{crops.shards:,}, {crops.shards_taken_over:,} of them taken over from an earlier version"


def _embeds(embeds: EmbedsSummary) -> Iterator[Fact]:
    yield "captions and prompts", f"{embeds.captions:,}"
    yield "texts after IF's cleaning", f"{embeds.texts:,}"
    yield "encoded for this version", f"{embeds.encoded:,}; {embeds.taken_over:,} taken over from an earlier one"
    yield (
        f"cut at {embeds.length} tokens",
        f"{many(embeds.truncated, 'text')}, {many(embeds.tokens_lost, 'token')} lost",
    )
    if embeds.shortened:
        yield "cut before cleaning", many(embeds.shortened, "caption")
    if embeds.emptied:
        yield "without a word after cleaning", many(embeds.emptied, "caption")
    if embeds.special_tokens_removed:
        yield "special tokens removed", f"{embeds.special_tokens_removed:,}"
    yield "on disk", f"{size(embeds.bytes)}, {embeds.length} x {embeds.width:,} numbers a text"


def _training(training: TrainingSummary) -> Iterator[Fact]:
    for change in training.changes:
        yield f"held-out loss, {change.since} -> tuned", f"{change.words}, {change.change} (less is better)"
    if training.eval_overfit_gap is not None:
        yield (
            "extra fall on pictures that it was trained on",
            f"{signed(training.eval_overfit_gap, 4)} (far above 0: it memorises them)",
        )
    last = training.steps_of_this_process
    went_on = f", the last {last:,} after an interruption" if last < training.steps else ""
    yield "steps", f"{training.steps:,}{went_on}"
    yield "trained on", f"{many(training.pictures, 'picture')}, {many(training.rows, 'crop')}"
    if training.samples_per_s is not None:
        yield "speed", f"{three(training.samples_per_s)} crops a second"
    yield "trained numbers", f"{training.trainable_parameters:,}"
    yield "frozen numbers", f"{training.frozen_parameters:,}, {size(training.frozen_bytes)}"
    same = (
        "the same to the bit" if not training.reload_difference else f"differs by {three(training.reload_difference)}"
    )
    yield "its output, loaded by the stock pipeline", same


def _samples(samples: SamplesSummary) -> Iterator[Fact]:
    shares = samples.concept_share_base, samples.concept_share_tuned
    if shares[0] is not None and shares[1] is not None:
        yield "samples that show their prompt", f"{shares[0]:.0%} of the base's, {shares[1]:.0%} of the tuned model's"
    probes = samples.probe_loss_base, samples.probe_loss_tuned
    if probes[0] is not None and probes[1] is not None:
        words = (
            f"{three(probes[0])} of the base, {three(probes[1])} of the tuned model (far above the base's: it forgets)"
        )
        yield "loss on the base's own pictures", words
    errors = samples.control_error_base, samples.control_error_tuned
    if errors[0] is not None and errors[1] is not None:
        words = f"base {three(errors[0])}, tuned {three(errors[1])} (0 to 1, less is better)"
        yield "difference from the conditioning", words
