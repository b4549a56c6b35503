"""What the GPU day measures: every case with its figures, their goals, and what it should take on an H200.

Imports nothing heavy: the plan can be printed, and the table of what is not measured yet, without torch.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

PRODUCT, OURS = "goal of the product", "goal of this benchmark"
ROUNDING, SAME = "rounding alone", "the same bytes"


@dataclass(frozen=True)
class Goal:
    """What a figure should be at most (`<=`) or at least (`>=`)."""

    sign: str
    value: float
    source: str
    everywhere: bool = False  # also on a CPU and of the tiny cascade: correctness is, speed and memory are not

    def met(self, figure: float) -> bool:
        """A figure that is no number meets no goal."""
        return figure <= self.value if self.sign == "<=" else figure >= self.value

    def __str__(self) -> str:
        return f"{self.sign} {self.value:g}"


@dataclass(frozen=True)
class Figure:
    """One number that a case yields."""

    what: str
    unit: str = ""
    goal: Goal | None = None


@dataclass(frozen=True)
class Asked:
    """What a case is told."""

    device: str  # cuda or cpu
    tiny: bool  # the tiny cascade in place of the real architectures
    folder: Path  # for pictures and artifacts; shared by all cases of a run
    any_kernels: bool = (
        False  # train also by kernels that do not give the same bits every time, as the product does not
    )


# What a case yields: which figure, its value, a note.
Yields = Iterator[tuple[str, float, str]]


@dataclass(frozen=True)
class Case:
    """Something to measure, in a process that it may share with the cases before and after it."""

    group: str
    name: str
    call: str  # module:function, given an Asked and `options`; yields Yields
    figures: tuple[Figure, ...]
    seconds: float  # that it should take on an H200, the import of libraries left out
    limit_s: float  # after which it is killed
    process: str  # cases in a row that name the same one share it
    options: Mapping[str, Any] = field(default_factory=dict)


def tolerance(value: float, why: str = ROUNDING) -> Goal:
    """The most that two results may differ by."""
    return Goal("<=", value, why, everywhere=True)


def most_gib(value: float, source: str = PRODUCT) -> Figure:
    """Peak memory with its goal."""
    return Figure("peak memory", "GiB", Goal("<=", value, source))


RATE, IDLE = Figure("samples/s"), Figure("card idle", "%")
# fp32 without TF32, where the orders of summation differ; bf16 has 8 bits.
FP32, BF16 = 1e-3, 5e-2


def step(name: str, near: float = FP32, seconds: float = 2.5, **options: Any) -> Case:
    """A training on the device whose first step is compared with the CPU's."""
    # Of weights in bf16 in spacings of bf16, of others in lengths of the update.
    update = tolerance(1.01 if options.get("optimizer") == "adamw_bf16" else 1e-2, "AdamW in fp64")
    figures = (
        Figure("loss, off by", "", tolerance(near)), Figure("gradients, off by", "", tolerance(near)),
        Figure("first update, off by", "", update), Figure("reloaded, off by", "", tolerance(1e-5)),
    )  # fmt: skip
    return Case("a", name, "gpu_cases_correct:first_step", figures, seconds, 60, "a", options)


def byte_for_byte(name: str, seconds: float = 5, **options: Any) -> Case:
    """Trainings on the device that must write the same bytes."""
    figures = tuple(
        Figure(f"{how}: files that differ", "", tolerance(0, SAME)) for how in ("unbroken, twice", "killed and resumed")
    )
    return Case("a", f"resume: {name}", "gpu_cases_correct:resumed", figures, seconds, 90, "a", options)


LORA = {"lora_rank": 32}
FULL = {"model_type": "full", "optimizer": "adamw_bf16", "gradient_checkpointing": True}
CORRECT = (
    step("LoRA", lora_rank=8),
    step("LoRA in bf16", BF16, lora_rank=8, mixed_precision="bf16"),
    step("LoRA, checkpointing, dropout 0", lora_rank=8, gradient_checkpointing=True),
    step("DoRA", use_dora=True, lora_rank=8),
    step("full U-Net", model_type="full"),
    step("BitFit", use_bitfit=True),
    step("ControlNet", controlnet=True, controlnet_conditioning="grayscale", lora_rank=8),
    step("int8 base", lora_rank=8, base_model_precision="int8"),
    step("nf4 base", lora_rank=8, base_model_precision="nf4"),
    step("adamw_bf16", BF16, lora_rank=8, mixed_precision="bf16", optimizer="adamw_bf16"),
    step("Stage II, windows, learned variance", stage=2, lora_rank=8, stage2_patch=64, train_variance=True),
    Case("a", "channels_last", "gpu_cases_correct:channels_last",
         (Figure("output, off by", "", tolerance(FP32)),), 1, 60, "a"),
    Case("a", "Stage II input", "gpu_cases_correct:stage2_input",
         (Figure("against the stock pipeline, off by", "", tolerance(1e-5)),), 2, 60, "a"),
    Case("a", "text", "gpu_cases_correct:text",
         (Figure("T5's rows, off by", "", tolerance(BF16)), Figure("text of Stage I, off by", "", tolerance(FP32))),
         3, 60, "a"),
    Case("a", "sampling", "gpu_cases_correct:sampling",
         tuple(Figure(f"Stage {stage}, {what}", "", goal) for stage in ("I", "II")
               for what, goal in (("twice, off by", tolerance(0, SAME)), ("against the CPU, off by", tolerance(0.02)))),
         6, 60, "a"),
    byte_for_byte("LoRA, EMA, dropout", lora_rank=8, lora_dropout=0.1, use_ema=True),
    byte_for_byte("LoRA in bf16", lora_rank=8, mixed_precision="bf16"),
    byte_for_byte("full, adamw_bf16", 8, model_type="full", mixed_precision="bf16", optimizer="adamw_bf16"),
)  # fmt: skip
TRAINING = (
    Case("b", "LoRA r32, IF-I-M", "gpu_cases_train:lora",
         (most_gib(6), RATE, IDLE, Figure("samples/s by any kernels"), Figure("plain loop: peak memory", "GiB"),
          Figure("plain loop: samples/s"), Figure("times the plain loop", "", Goal(">=", 2, PRODUCT))), 26, 75, "b",
         {"flavour": "i-medium-400m", **LORA}),
    Case("b", "the same, checkpointing", "gpu_cases_train:training", (most_gib(6), RATE, IDLE), 10, 60, "b",
         {"flavour": "i-medium-400m", **LORA, "gradient_checkpointing": True}),
    Case("b", "full U-Net, IF-I-M", "gpu_cases_train:training", (most_gib(12), RATE, IDLE), 14, 60, "b",
         {"flavour": "i-medium-400m", **FULL}),
    Case("b", "LoRA r32, Stage II, 256 px", "gpu_cases_train:training", (most_gib(12), RATE, IDLE), 20, 75, "b2",
         {"flavour": "ii-medium-450m", **LORA, "gradient_checkpointing": True}),
    Case("b", "the same, windows of 128 px", "gpu_cases_train:training", (most_gib(12), RATE, IDLE), 14, 60, "b2",
         {"flavour": "ii-medium-450m", **LORA, "gradient_checkpointing": True, "stage2_patch": 128}),
)  # fmt: skip
TEXT = (
    Case("c", "T5-XXL, resident", "gpu_cases_text:resident",
         (Figure("matrix product in bf16", "TFLOP/s"),
          Figure("77 tokens: captions/s", "", Goal(">=", 500, PRODUCT)),
          Figure("77 tokens: of that peak", "%", Goal(">=", 60, PRODUCT)),
          Figure("natural lengths: captions/s"), Figure("peak memory", "GiB")), 20, 75, "c"),
    Case("c", "T5-XXL, the job with its files", "gpu_cases_text:job", (Figure("77 tokens: captions/s"),), 12, 60, "c"),
    Case("c", "T5-XXL, streamed", "gpu_cases_text:streamed",
         (Figure("77 tokens: captions/s"), Figure("peak memory", "GiB")), 18, 75, "c"),
)  # fmt: skip
SAMPLING = tuple(
    Case("e", f"Stage {'I' * stage}, 50 steps{', offload' if offload else ''}", "gpu_cases_sample:sampled",
         (Figure("pictures/s"), Figure("peak memory", "GiB")), 10 if stage == 1 else 14, 60, "e",
         {"stage": stage, "offload": offload})
    for offload in (False, True) for stage in (1, 2)
)  # fmt: skip
DATA = (
    Case("f", "JPEG decode", "gpu_cases_sample:decoded",
         (Figure("on the card: pictures/s"), Figure("our CPU path, one thread: pictures/s")), 6, 60, "e"),
)  # fmt: skip
DEAREST = (
    Case("b", "LoRA r32, IF-I-XL", "gpu_cases_train:training", (most_gib(16), RATE, IDLE), 20, 75, "bx",
         {"flavour": "i-xlarge-4.3b", **LORA, "gradient_checkpointing": True}),
    Case("b", "LoRA r32, IF-I-XL, nf4", "gpu_cases_train:training", (most_gib(10, OURS), RATE, IDLE), 30, 90, "bx",
         {"flavour": "i-xlarge-4.3b", **LORA, "gradient_checkpointing": True, "base_model_precision": "nf4"}),
    Case("d", "compile, IF-I-M", "gpu_cases_train:compiled",
         (Figure("loss, off by", "", tolerance(BF16)), Figure("first step", "s"), Figure("samples/s"),
          Figure("times the step that is not compiled", "", Goal(">=", 1.3, OURS))), 120, 200, "d",
         {"flavour": "i-medium-400m", **LORA}),
)  # fmt: skip
CASES: tuple[Case, ...] = (*CORRECT, *TRAINING, *TEXT, *SAMPLING, *DATA, *DEAREST)

IMPORTS_S, PROCESS_S = 20.0, 3.0  # once; and what a fork of that process needs to reach the card


def forecast_s(cases: tuple[Case, ...]) -> float:
    """What some cases should take on an H200."""
    processes = sum(one.process != before.process for before, one in pairwise(cases)) + 1
    return IMPORTS_S + PROCESS_S * processes + math.fsum(case.seconds for case in cases)
