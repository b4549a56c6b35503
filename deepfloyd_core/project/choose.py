"""From what was seen of a folder and a machine to every value of a run file and a data file, each with its reason. Pure."""

import math
from collections import Counter

from deepfloyd_core.config.run import RunConfig
from deepfloyd_core.config.stages import STAGES
from deepfloyd_core.crops.eval_choice import FEWEST, MOST, SHARE, spare
from deepfloyd_core.errors import DataError
from deepfloyd_core.project.choices import Choice, Choices
from deepfloyd_core.project.choose_data import EDGE_PX, data_choices, fitting, sample_size
from deepfloyd_core.project.choose_stages import Fit, memory_words, stage1_choices, stage2_choices
from deepfloyd_core.project.look import FolderLook, in_words
from deepfloyd_core.project.machine import MachineLook
from deepfloyd_core.store.counts import many

T5_GIB = 12.0  # of memory; below, T5-XXL's 9.5 GiB would leave too little
MOST_PROMPTS = 3
_LONGEST_PROMPT = 300  # characters
_USUAL_REJECTED, _ROOM = (
    0.15,
    0.15,
)  # share of files: what the default of `max_rejected_share` allows for; beyond what is seen


def choose(look: FolderLook, machine: MachineLook, name: str, place: str) -> Choices:
    """Every choice of a project. name: of its files; place: the folder, as the data file is to name it.

    Raises DataError if no picture is large enough.
    """
    data = data_choices(look, name, place)
    opened = len(look.seen)
    of_stage = {stage: fitting(data, look.seen, stage) for stage in STAGES}
    if not of_stage[1]:
        largest = max(look.seen, key=lambda one: one.short_px)
        raise DataError(
            f"No picture in {look.folder} is large enough: Stage I is trained at {EDGE_PX} px, and nothing is upsampled. "
            f"The largest is {largest.width}x{largest.height} px ({largest.source}). Give a folder with larger ones."
        )
    captioned = 1.0 if look.captions.strategy == "instanceprompt" else look.captions.share
    count = max(1, round(look.pictures * of_stage[1] / opened * captioned))
    fit = Fit(count, of_stage[1] / opened, of_stage[2] / opened, look.is_sample)
    return Choices(
        name,
        f"{many(look.pictures, 'picture')} ({in_words(look)})",
        _run_choices(look, machine, data, name, count),
        (stage1_choices(machine, fit), stage2_choices(machine, fit)),
        data,
    )


def _run_choices(
    look: FolderLook, machine: MachineLook, data: tuple[Choice, ...], name: str, count: int
) -> tuple[Choice, ...]:
    return (
        Choice(
            "workspace", f"workspace/{name}", "Everything that runs make is in this folder, from the current directory."
        ),
        Choice("data_backend_config", f"{name}.json", "The data file, written together with this one."),
        _rejected(look, count),
        _held_out(count),
        _precision(machine),
        *_text(machine),
        *_samples(look, machine, data),
    )


def _rejected(look: FolderLook, count: int) -> Choice:
    usual = float(RunConfig.model_fields["max_rejected_share"].default)
    share = 1 - count / look.files
    seen = f"Of {many(look.files, 'file')} {count:,} can be used, as far as was seen."
    if share <= _USUAL_REJECTED:
        return Choice("max_rejected_share", usual, f"{seen} The run stops if a larger share is rejected: the default.")
    allowed = min(1.0, math.ceil((share + _ROOM) * 20) / 20)
    why = (
        f"{seen} The run stops if a larger share is rejected; {usual:g}, the default, would stop it for what is known."
    )
    return Choice("max_rejected_share", max(usual, allowed), why, "rejected files")


def _held_out(count: int) -> Choice:
    held = spare(count)
    rule = f"one in {SHARE}, at most {MOST}, at least one from {FEWEST} on; copies count as one"
    if held:
        why = f"Of {many(count, 'picture')} {held} {'is' if held == 1 else 'are'} held out to measure on ({rule})."
    else:
        why = f"Of {many(count, 'picture')} none is held out ({rule}), so nothing is measured: judge by the samples."
    return Choice("num_eval_images", None, f"{why} When the folder grows, the number follows.", "held out")


def _precision(machine: MachineLook) -> Choice:
    if machine.bf16:
        what = "GPU" if machine.device == "cuda" else "processor"
        return Choice("mixed_precision", "bf16", f"This {what} computes in bf16: half the memory of fp32.", "precision")
    what = {"cuda": "GPU", "mps": "GPU", "cpu": "processor"}[machine.device]
    why = f"This {what} has no fast arithmetic in bf16."
    if machine.device == "cpu":
        why = "This processor took longer for a convolution in bf16 than in fp32."
    return Choice("mixed_precision", "no", why, "precision")


def _text(machine: MachineLook) -> tuple[Choice, ...]:
    if machine.memory_gib >= T5_GIB:
        return ()
    why = f"T5-XXL takes 9.5 GiB, and {memory_words(machine)} has not enough beside it: one layer at a time (docs/text.md)."
    return (Choice("text_encoder_streaming", True, why, "text encoder"),)


def _samples(look: FolderLook, machine: MachineLook, data: tuple[Choice, ...]) -> tuple[Choice, ...]:
    size = sample_size(data, look.seen)
    prompts = _prompts(look, 1 if machine.device == "cpu" else MOST_PROMPTS)
    if prompts:
        more = (
            "The most frequent caption" if len(prompts) == 1 else "The most frequent caption, and others of the sample"
        )
        slow = "; one, because each takes minutes without a GPU" if machine.device == "cpu" else ""
        prompt = Choice("validation_prompt", prompts, f"{more}: samples are drawn of it{slow}.", "samples of")
    else:
        prompt = Choice(
            "validation_prompt", None, "Samples are drawn of the commonest caption, which is the prompt of all."
        )
    square = size == str(EDGE_PX)
    why = "Squares, as the crops are." if square else "Width x height of most crops; Stage II makes four times as much."
    return (prompt, Choice("validation_resolution", size, why))


def _prompts(look: FolderLook, most: int) -> tuple[str, ...]:
    """The most frequent captions of the sample, without zero bytes, which no run file may hold."""
    short = (text for texts in look.captions.texts for text in texts if len(text) <= _LONGEST_PROMPT)
    counts = Counter(text.replace("\0", "").strip() for text in short)
    return tuple(text for text, _ in counts.most_common(most) if text)
