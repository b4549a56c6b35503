"""How a training runs: precision, memory, speed and checkpoints."""

from importlib.util import find_spec
from shutil import which
from typing import TYPE_CHECKING, Literal

from deepfloyd_core.config.base import Spec
from deepfloyd_core.config.keys import LORA, NOTHING, key
from deepfloyd_core.config.stage_optimizer import OPTIMIZER_KINDS
from deepfloyd_core.config.stages import STAGES

if TYPE_CHECKING:
    from deepfloyd_core.config.stage import StageConfig

COMPILERS = ("g++", "clang++", "c++")  # the first two are what inductor looks for, on Linux and macOS

Precision = Literal["no", "bf16"]


class RunKeys(Spec):
    """Precision, memory, speed and checkpoints."""

    mixed_precision: Precision = key(
        "bf16",
        says="dtype that the UNet computes in, and of its frozen weights.",
        makes=(*LORA, "low_res", "samples", "generated"),
    )
    gradient_checkpointing: bool = key(
        False,
        says="Recompute activations in the backward pass, of attentions too: less memory, the same result.",
        makes=NOTHING,
    )
    micro_batch_size: int | None = key(
        None,
        ge=1,
        says="Most pictures of a batch in one pass through the UNet. A larger batch is cut into parts, with the same "
        "draws and steps: less memory, the same result up to the rounding of sums. Unset: whole batches.",
        makes=NOTHING,
    )
    sample_batch_size: int | None = key(
        None,
        ge=1,
        says="Most pictures sampled at once, below 16 of Stage I and 2 of Stage II: less memory, the same pictures up to "
        "the rounding of sums. Unset: so many; `generate` on a GPU takes what fits.",
        makes=NOTHING,
    )
    attention_mechanism: Literal["sdpa", "xformers", "math"] = key(
        "sdpa",
        says="Attention while training: torch's fused one, xFormers' (NVIDIA GPUs), or plain products.",
        makes=LORA,
    )
    dynamo_backend: Literal["no", "inductor", "aot_eager"] = key(
        "no",
        says="torch.compile of the UNet in training steps, recompiled for each size of batch: `inductor` writes "
        "kernels and needs a C++ compiler, on a GPU triton; `aot_eager` only traces, for tests and debugging.",
        makes=LORA,
    )
    dataloader_num_workers: int = key(
        1,
        ge=0,
        le=16,
        says="Threads that prefetch the next batches, one each, during a step; changes no result.",
        makes=NOTHING,
    )
    checkpoint_step_interval: int = key(
        500, ge=1, says="Optimizer steps between checkpoints; changes no result.", makes=NOTHING
    )
    checkpointing_minutes: float | None = key(
        None,
        gt=0,
        says="Minutes after the last checkpoint at which another is written; changes no result.",
        makes=NOTHING,
    )
    checkpoints_total_limit: int = key(
        2, ge=1, says="Checkpoints kept while training; changes no result.", makes=NOTHING
    )


def sample_batch_fault(config: "StageConfig") -> str:
    """Why a size of sampled batches has no effect; empty when it has, or is not set."""
    size, kind = config.sample_batch_size, STAGES[config.flavour.stage]
    if size is None or size <= kind.sample_batch:
        return ""
    return (
        f"sample_batch_size is {size}, and {kind.title} samples {kind.sample_batch} pictures at once at most. Remove it"
    )


def micro_batch_fault(config: "StageConfig") -> str:
    """Why batches cannot be cut; empty when they can, or are not to be."""
    size = config.micro_batch_size
    if size is None:
        return ""
    if size > config.train_batch_size:
        return (
            f"micro_batch_size is {size}, and no batch is larger: train_batch_size is {config.train_batch_size}. Remove it, "
            "or set a smaller one"
        )
    if size < config.train_batch_size and config.lora_dropout:
        return (
            f"micro_batch_size is {size}, and lora_dropout is {config.lora_dropout}, which is drawn for whole batches: "
            "other numbers would be dropped. Remove one of them; gradient_checkpointing takes less memory too"
        )
    return ""


def ranks_fault(config: "StageConfig", ranks: int, are_exact: bool = False) -> str:
    """Why several processes cannot share a stage's steps; empty when they can."""
    passes, size = config.gradient_accumulation_steps, config.train_batch_size
    cuts = passes % ranks > 0
    if cuts and size % ranks:
        return (
            f"num_processes is {ranks}, which divides neither gradient_accumulation_steps ({passes}) nor train_batch_size "
            f"({size}), and each process takes an equal part of a step. Use a number that divides one of them"
        )
    if cuts and config.lora_dropout:
        return (
            f"num_processes is {ranks}, and lora_dropout is {config.lora_dropout}, which is drawn for whole batches: "
            f"they cannot be shared out. Set gradient_accumulation_steps to a multiple of {ranks}, or remove one of them"
        )
    if config.model_type == "full" and ranks > 1 and (fault := _shards_fault(config, are_exact)):
        return f"num_processes is {ranks}, which spreads the weights of a UNet that is trained whole, and {fault}"
    if are_exact and ranks > 1 and (config.micro_batch_size or size) < size:
        return (
            f"exact_ranks is true, and micro_batch_size is {config.micro_batch_size}: the parts of a batch are summed "
            "before those of the processes, in another order than that of one process. Remove one of them"
        )
    return ""


def _shards_fault(config: "StageConfig", are_exact: bool) -> str:
    """What cannot be done with parts of tensors."""
    if not config.optimizer_kind.by_number:
        fit = ", ".join(name for name, kind in OPTIMIZER_KINDS.items() if kind.by_number)
        return f"optimizer is {config.optimizer!r}, which looks at whole tensors. Use one of {fit}, or one process"
    if are_exact:
        return "exact_ranks is true, which needs whole gradients. Remove one of them"
    if config.dynamo_backend != "no":
        return f"dynamo_backend is {config.dynamo_backend!r}, whose one graph gathers no weights. Set it to no"
    return ""


def compile_fault(config: "StageConfig") -> str:
    """What torch.compile cannot compile as one graph; each graph break would add a graph for every layer."""
    prefix = f"dynamo_backend is {config.dynamo_backend!r}"
    if config.dynamo_backend == "no":
        return ""
    if config.use_dora:
        return f"{prefix}, and torch cannot trace peft's DoRA. Set it to no, or remove use_dora"
    if config.attention_mechanism == "xformers":
        return f"{prefix}, and torch cannot trace xformers. Set it to no, or attention_mechanism = sdpa"
    return ""


def device_fault(config: "StageConfig", device: str) -> str:
    """Why a stage cannot be trained on a device (torch's name of its type, `rocm` or `auto`); empty when it can."""
    if (
        config.optimizer == "adamw_8bit" and device == "mps"
    ):  # bitsandbytes 0.50 has kernels for cuda (rocm), xpu and cpu
        return "optimizer is 'adamw_8bit', and bitsandbytes has no 8-bit states on mps. Use adamw or adamw_bf16"
    if config.attention_mechanism == "xformers":
        if device not in ("cuda", "auto"):
            return f"attention_mechanism is 'xformers', which needs an NVIDIA GPU, and the device is {device}. Use sdpa"
        if find_spec("xformers") is None:
            return (
                "attention_mechanism is 'xformers', and xformers cannot be imported. pip install xformers, or use sdpa"
            )
    return _inductor_fault(device) if config.dynamo_backend == "inductor" else ""


def _inductor_fault(device: str) -> str:
    """What inductor needs and a device lacks, as far as it can be known without torch; the job also compiles a test line."""
    prefix = "dynamo_backend is 'inductor'"
    if device == "mps":
        return f"{prefix}, whose kernels for mps are a prototype in torch. Set it to no"
    if not any(which(name) for name in COMPILERS):
        install = "Debian: apt-get install g++"
        return f"{prefix}, and none of {', '.join(COMPILERS)} is in PATH. Install one ({install}), or set it to no"
    if device in ("cuda", "rocm") and find_spec("triton") is None:
        return f"{prefix}, which writes triton's kernels for a GPU, and triton cannot be imported. Set it to no"
    return ""
