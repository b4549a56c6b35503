"""Chooses the tables of the stages: flavour by memory, steps by count. Pure.

The reasons cite what this repository measured (docs/, benchmarks/results.md), and say where a figure is only a goal.
Learning rate, rank and warm-up are those of flows/configs/stage1_24gb.toml: nothing in a folder tells better ones.
"""

import math
from dataclasses import dataclass

from deepfloyd_core.config.flavours import PUBLISHED
from deepfloyd_core.config.stages import STAGES, Stage
from deepfloyd_core.project.choices import Choice, StageChoices
from deepfloyd_core.project.choose_data import BATCH
from deepfloyd_core.project.machine import MachineLook
from deepfloyd_core.store.counts import duration, many

STEPS_A_PICTURE, FEWEST_STEPS, USUAL_STEPS, MOST_STEPS = 100, 400, 2000, 20_000
PASSES = 4  # over every picture, at least
STAGE2_STEPS, STAGE2_PICTURES = 500, 35
STAGE2_SHARE = 0.5  # of the pictures must be large enough
SMALL_GIB, TIGHT_GIB = 6.0, 40.0  # below: one sample at a time; recomputed activations
PATCH_PX, SMALL_PATCH_PX = 128, 64
RANK, RATE, WARMUP = 32, 4e-5, 100
CHECKPOINT_MINUTES = 10.0
_CPU_STEP_S = {False: 19.0, True: 7.2}  # of 4 pictures on one core, in bf16 or not: benchmarks/results.md


@dataclass(frozen=True)
class Fit:
    """How many pictures can be used. `stage1`, `stage2`: shares of the opened ones that are large enough."""

    count: int
    stage1: float
    stage2: float
    is_sample: bool


@dataclass(frozen=True)
class Row:
    """The flavours of GPUs from a memory on. 24 GB cards have 23.5 GiB, 16 GB cards 15.7."""

    least_gib: float
    flavours: dict[Stage, str]
    why: str


_GOALS = "goals of docs/gpu.md for the peak of training a LoRA"
GPUS = (
    Row(22, {1: "i-xlarge-4.3b", 2: "ii-large-1.2b"}, f"IF-I-XL stays below 16 GiB ({_GOALS})"),
    Row(
        14,
        {1: "i-large-900m", 2: "ii-medium-450m"},
        f"IF-I-XL may take 16 GiB, IF-I-M 6 GiB ({_GOALS}); this is between them",
    ),
    Row(0, {1: "i-medium-400m", 2: "ii-medium-450m"}, f"IF-I-M stays below 6 GiB, the larger ones do not ({_GOALS})"),
)


def memory_words(machine: MachineLook) -> str:
    """The memory that decides."""
    of = f"the GPU ({machine.name})" if machine.device == "cuda" else "this machine"
    return f"{of} with {machine.memory_gib:.0f} GiB"


def stage1_choices(machine: MachineLook, fit: Fit) -> StageChoices:
    """Stage I, text to 64 px."""
    steps, why = stage1_steps(fit.count)
    if machine.device == "cpu":
        hours = duration(steps * _CPU_STEP_S[machine.bf16])
        kind = "bf16" if machine.bf16 else "fp32"
        why += (
            f" Without a GPU a step takes {_CPU_STEP_S[machine.bf16]:g} s on one core of a server in {kind} "
            f"at 64x64 px (benchmarks/results.md): {hours} in all; a stopped run goes on where it was."
        )
    warmup = min(WARMUP, steps // 10)
    return StageChoices(
        STAGES[1].table,
        STAGES[1].title,
        (
            _flavour(machine, 1),
            *_shared(),
            Choice("lr_warmup_steps", warmup, f"A tenth of the steps, at most {WARMUP}."),
            Choice("max_train_steps", steps, why, "steps of Stage I"),
            *_batch(machine),
            *_recomputed(machine),
        ),
    )


def stage2_choices(machine: MachineLook, fit: Fit) -> StageChoices:
    """Stage II, 64 to 256 px; left out where it cannot be trained."""
    steps = max(STAGE2_STEPS, stage1_steps(fit.count)[0] // 2)
    why = f"{STAGE2_STEPS}, or half of Stage I's: 480 steps were enough for 35 photographs (docs/training.md)."
    if fit.count < STAGE2_PICTURES:
        why += f" {many(fit.count, 'picture')} will teach it little, but without this table `generate` ends at 64 px."
    patch = SMALL_PATCH_PX if machine.memory_gib < 8 else PATCH_PX
    share = "a sixteenth" if patch == SMALL_PATCH_PX else "a fourth"
    return StageChoices(
        STAGES[2].table,
        STAGES[2].title,
        (
            _flavour(machine, 2),
            *_shared(),
            Choice("lr_warmup_steps", STAGE2_STEPS // 10, "A tenth of the fewest steps."),
            Choice("max_train_steps", steps, why, "steps of Stage II"),
            *_batch(machine),
            Choice(
                "stage2_patch", patch, f"Trained on windows of {patch} px: {share} of the memory and time of 256 px."
            ),
            *_recomputed(machine),
        ),
        _left_out(machine, fit),
    )


def stage1_steps(count: int) -> tuple[int, str]:
    """Optimizer steps for so many pictures, and why."""
    few = STEPS_A_PICTURE * count
    passes = math.ceil(PASSES * count / BATCH)
    guide = "DreamBooth's order: diffusers' guide takes 400 for five pictures of a dog"
    if few <= USUAL_STEPS:
        steps = max(FEWEST_STEPS, few)
        return steps, f"{STEPS_A_PICTURE} for each of {many(count, 'picture')}, at least {FEWEST_STEPS} ({guide})."
    if passes <= USUAL_STEPS:
        shown = f"{USUAL_STEPS * BATCH / count:.0f} times"
        return USUAL_STEPS, f"As flows/configs/stage1_24gb.toml: each of {many(count, 'picture')} is shown {shown}."
    steps = min(MOST_STEPS, passes)
    shown = f"each of {many(count, 'picture')} is shown {steps * BATCH / count:.2g} times"
    return steps, f"{PASSES} passes in batches of {BATCH}, at most {MOST_STEPS:,} steps: {shown}."


def _left_out(machine: MachineLook, fit: Fit) -> str:
    """Why there is no Stage II; empty: there is."""
    if fit.stage2 < STAGE2_SHARE * fit.stage1 or not fit.stage2:
        return (
            f"Only {fit.stage2:.0%} of the {'opened ' if fit.is_sample else ''}pictures are large enough for 256 px, and "
            "nothing is upsampled. So `generate` ends at 64 px; with larger pictures it could be trained."
        )
    if machine.device == "cpu":
        return (
            "There is no GPU, and Stage II would take far longer than Stage I: a window of 128 px has four times the pixels "
            "of a 64 px crop. So `generate` ends at 64 px."
        )
    return ""


def _flavour(machine: MachineLook, stage: Stage) -> Choice:
    if machine.device != "cuda":
        why = "no GPU was found" if machine.device == "cpu" else "an Apple GPU shares the main memory"
        name = GPUS[-1].flavours[stage]
        why = f"The smallest model: {why} ({machine.memory_gib:.0f} GiB of main memory)"
    else:
        row = next(row for row in GPUS if machine.memory_gib >= row.least_gib)
        name = row.flavours[stage]
        why = f"By memory, {memory_words(machine)}: {row.why}"
    return Choice(
        "model_flavour", name, f"{why}. Weights: https://huggingface.co/{PUBLISHED[name].repo}", STAGES[stage].title
    )


def _shared() -> tuple[Choice, ...]:
    return (
        Choice("lora_rank", RANK, "The rank at which memory and time were measured (benchmarks/results.md)."),
        Choice("learning_rate", RATE, "The default for a LoRA; it falls to a tenth along a cosine."),
    )


def _batch(machine: MachineLook) -> tuple[Choice, ...]:
    if machine.memory_gib >= SMALL_GIB:
        return (Choice("train_batch_size", BATCH, f"The default; {BATCH} pictures fit into this memory.", ""),)
    why = f"{memory_words(machine)}: one picture at a time, {BATCH} for a step."
    return (
        Choice("train_batch_size", 1, f"{why[:1].upper()}{why[1:]}", "batch"),
        Choice("gradient_accumulation_steps", BATCH, f"The same step as with a batch of {BATCH}."),
    )


def _recomputed(machine: MachineLook) -> tuple[Choice, ...]:
    chosen = [Choice("checkpointing_minutes", CHECKPOINT_MINUTES, "A stopped run loses ten minutes at most.")]
    if machine.memory_gib < TIGHT_GIB and machine.device == "cuda":
        why = "Activations are recomputed: a step takes 1.2 GiB in place of 2.8 (IF-I-M, docs/training.md), the same result."
        chosen.append(Choice("gradient_checkpointing", True, why))
    return tuple(chosen)
