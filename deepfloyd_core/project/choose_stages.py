"""Chooses the tables of the stages: flavour by memory, steps by count. Pure.

The reasons cite what this repository measured (docs/, benchmarks/results.md), and say where a figure is only a goal.
Learning rate, rank and warm-up are those of flows/configs/stage1_24gb.toml: nothing in a folder tells better ones.
"""

import math
from dataclasses import dataclass

from deepfloyd_core.config.flavours import PUBLISHED
from deepfloyd_core.config.stage import StageConfig
from deepfloyd_core.config.stages import STAGES, Stage
from deepfloyd_core.planning.calibrated import step_s
from deepfloyd_core.project.choices import Choice, StageChoices
from deepfloyd_core.project.choose_data import BATCH
from deepfloyd_core.project.machine import MachineLook
from deepfloyd_core.store.counts import duration, many
from deepfloyd_core.training.costs import cost_request, default_cache, known_costs

STEPS_A_PICTURE, FEWEST_STEPS, USUAL_STEPS, MOST_STEPS = 100, 400, 2000, 20_000
PASSES = 4  # over every picture, at least
STAGE2_STEPS, STAGE2_PICTURES = 500, 35
STAGE2_SHARE = 0.5  # of the pictures must be large enough
SMALL_GIB = 6.0  # below: one picture at a time
TIGHT_GIB = {"cuda": 40.0, "mps": 16.0, "cpu": 8.0}  # below: activations are recomputed
PATCH_PX, SMALL_PATCH_PX = 128, 64
RANK, RATE, WARMUP = 32, 4e-5, 100
CHECKPOINT_MINUTES = 10.0


@dataclass(frozen=True)
class Fit:
    """How many pictures can be used. `stage1`, `stage2`: shares of the opened ones that are large enough."""

    count: int
    stage1: float
    stage2: float
    is_sample: bool


@dataclass(frozen=True)
class Row:
    """The flavours of GPUs from a memory on, each with its reason. 24 GB cards have 23.5 GiB, 16 GB cards 15.7."""

    least_gib: float
    flavours: dict[Stage, tuple[str, str]]


_GOALS = "goals of docs/gpu.md for training a LoRA"
_XL = f"IF-I-XL is to stay below 16 GiB ({_GOALS})"
_L = f"IF-I-L lies between IF-I-M and IF-I-XL, which are to stay below 6 and 16 GiB ({_GOALS})"
_M = f"IF-I-M, the smallest, is to stay below 6 GiB ({_GOALS})"
_II_L = "IF-II-L has 2.5 GB of weights in bf16 (docs/generate.md), which leaves enough for its windows"
_II_M = f"IF-II-M is to stay below 12 GiB with whole pictures ({_GOALS}), and windows take less"
GPUS = (
    Row(22, {1: ("i-xlarge-4.3b", _XL), 2: ("ii-large-1.2b", _II_L)}),
    Row(14, {1: ("i-large-900m", _L), 2: ("ii-medium-450m", _II_M)}),
    Row(0, {1: ("i-medium-400m", _M), 2: ("ii-medium-450m", _II_M)}),
)


def memory_words(machine: MachineLook) -> str:
    """The memory that decides."""
    of = f"the GPU ({machine.name})" if machine.device == "cuda" else "this machine"
    return f"{of} with {machine.memory_gib:.0f} GiB"


def stage1_choices(machine: MachineLook, fit: Fit) -> StageChoices:
    """Stage I, text to 64 px."""
    steps, why = stage1_steps(fit.count)
    if machine.device == "cpu":
        why += _without_gpu(machine, steps)
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
            *_kept(machine, 1),
        ),
    )


def _without_gpu(machine: MachineLook, steps: int) -> str:
    """How long Stage I would train, as a plan says it."""
    batch = {choice.key: choice.value for choice in _batch(machine)}
    keys = {
        "model_flavour": GPUS[-1].flavours[1][0],
        "lora_rank": RANK,
        "mixed_precision": "bf16" if machine.bf16 else "no",
    }
    config = StageConfig.model_validate({**keys, **batch})
    request = cost_request(config, None, (STAGES[1].size_px,) * 2)
    costs = known_costs(request, default_cache()) if request else None
    if machine.cpu is None or costs is None:
        return " Without a GPU that takes long: `deepfloyd plan` tells how long."
    each_s = step_s(config, costs, machine.cpu)
    return (
        f" Without a GPU a step takes about {each_s:.2g} s, by a short calibration of this machine: "
        f"{duration(steps * each_s)} in all; a stopped run goes on where it was."
    )


def stage2_choices(machine: MachineLook, fit: Fit) -> StageChoices:
    """Stage II, 64 to 256 px; left out where it cannot be trained."""
    steps = max(STAGE2_STEPS, stage1_steps(fit.count)[0] // 2)
    why = (
        f"Half of Stage I's, at least {STAGE2_STEPS}: the tiny Stage II became better than untuned with 35 photographs in "
        "480 steps (docs/training.md)."
    )
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
            *_kept(machine, 2),
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
    cut = f", cut to {MOST_STEPS:,} steps" if steps < passes else ""
    return steps, f"{PASSES} passes over {many(count, 'picture')} in batches of {BATCH}{cut}."


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
    if machine.device == "cuda":
        # In fp32 the frozen weights, which are most of it, are twice as large.
        memory_gib = machine.memory_gib if machine.bf16 else machine.memory_gib / 2
        row = next(row for row in GPUS if memory_gib >= row.least_gib)
        name, goal = row.flavours[stage]
        fp32 = "" if machine.bf16 else ", half as much as with bf16"
        why = f"By memory, {memory_words(machine)}{fp32}: {goal}"
    else:
        name, _ = GPUS[-1].flavours[stage]
        found = "no GPU was found" if machine.device == "cpu" else "an Apple GPU shares the main memory"
        why = f"The smallest model: {found} ({machine.memory_gib:.0f} GiB of main memory)"
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
        return (Choice("train_batch_size", BATCH, f"The default; {BATCH} pictures fit into this memory."),)
    why = f"By memory, {memory_words(machine)}: one picture at a time takes 2.0 GiB, {BATCH} take 2.8 (IF-I-M in fp32, "
    return (
        Choice("train_batch_size", 1, f"{why}benchmarks/results.md)."),
        Choice("gradient_accumulation_steps", BATCH, f"The same step as with a batch of {BATCH}."),
    )


def _kept(machine: MachineLook, stage: Stage) -> tuple[Choice, ...]:
    """What is kept of a step, and of a training that is stopped."""
    chosen = [Choice("checkpointing_minutes", CHECKPOINT_MINUTES, "A stopped run loses ten minutes at most.")]
    if machine.memory_gib < TIGHT_GIB[machine.device]:
        measured = (
            "1.2 GiB in place of 2.8 (IF-I-M, 4 pictures" if stage == 1 else "1.8 GiB in place of 4.3 (IF-II-M, 256 px"
        )
        why = f"Activations are recomputed, with the same result: a step takes {measured}, benchmarks/results.md)."
        chosen.append(Choice("gradient_checkpointing", True, why))
    return tuple(chosen)
