"""How a stage is optimised: learning rates, steps, batches, the optimizer and the average of the trained weights."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from deepfloyd_core.config.base import Spec
from deepfloyd_core.config.extras import missing_extra
from deepfloyd_core.config.keys import LORA, key

if TYPE_CHECKING:
    from deepfloyd_core.config.stage import StageConfig

Schedule = Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial", "sine"]


@dataclass(frozen=True)
class OptimizerKind:
    """What the configuration knows of an optimizer."""

    library: tuple[str, str] | None = None  # its package, and the extra that installs that; None: torch, or our own
    bf16_weights: bool = False  # it keeps the trained weights in bf16; others in fp32
    averages: bool = False  # it averages the weights itself, so no decaying rate and no use_ema
    by_number: bool = True  # it updates each number by that number's gradients alone, so tensors can be cut


# By the value of `optimizer`; what makes them is in `training.optimizers`.
OPTIMIZER_KINDS = {
    "adamw": OptimizerKind(),
    "adamw_bf16": OptimizerKind(bf16_weights=True),
    "adamw_8bit": OptimizerKind(("bitsandbytes", "bitsandbytes"), by_number=False),
    "adafactor": OptimizerKind(by_number=False),
    "prodigy": OptimizerKind(("prodigyopt", "optimizers"), by_number=False),
    "adamw_schedulefree": OptimizerKind(("schedulefree", "optimizers"), averages=True),
}


class OptimizerKeys(Spec):
    """Rates, steps, batches and the optimizer."""

    learning_rate: float = key(4e-5, gt=0, le=1, says="Peak learning rate.", makes=LORA)
    lr_end: float | None = key(
        None,
        ge=0,
        says="Learning rate at the last step, for the decaying schedules; unset: a tenth of `learning_rate`.",
        makes=LORA,
    )
    lr_scheduler: Schedule | None = key(
        None,
        says="Shape of the learning rate over the run; unset: cosine, or with `adamw_schedulefree` constant.",
        makes=LORA,
    )
    lr_num_cycles: int = key(
        1,
        ge=1,
        le=10_000,
        says="Times that `cosine_with_restarts` falls from the peak to the end.",
        makes=LORA,
        only_with={"lr_scheduler": ("cosine_with_restarts",)},
    )
    lr_power: float = key(
        2.0,
        gt=0,
        le=100,
        says="Power of `polynomial`; 1 is a straight line.",
        makes=LORA,
        only_with={"lr_scheduler": ("polynomial",)},
    )
    lr_warmup_steps: int = key(
        0, ge=0, says="Optimizer steps of linear warm-up, also of `cosine` and the others.", makes=LORA
    )
    max_train_steps: int | None = key(
        None, ge=1, says="Optimizer steps of the run; unset: 1000, or those of `num_train_epochs`.", makes=LORA
    )
    num_train_epochs: int | None = key(
        None,
        ge=1,
        says="Passes over the data, in place of `max_train_steps`: an epoch has as many batches as the data sets "
        "have together. The steps are counted once the crops are made.",
        makes=LORA,
    )
    train_batch_size: int = key(4, ge=1, le=4096, says="Pictures in one forward pass.", makes=LORA)
    gradient_accumulation_steps: int = key(1, ge=1, le=1024, says="Forward passes for one optimizer step.", makes=LORA)
    max_grad_norm: float = key(1.0, ge=0, says="Gradients are clipped to this L2 norm; 0: no clipping.", makes=LORA)
    optimizer: Literal["adamw", "adamw_bf16", "adamw_8bit", "adafactor", "prodigy", "adamw_schedulefree"] = key(
        "adamw",
        says="`adamw`: fp32 states. `adamw_bf16`: weights and states in bf16, rounded stochastically. `adamw_8bit`: "
        "8-bit states. `adafactor`: hardly any states. `prodigy`: finds its step size; set `learning_rate` = 1. "
        "`adamw_schedulefree`: averages instead of decaying; its `lr_scheduler` is constant.",
        makes=LORA,
    )
    adam_beta1: float = key(0.9, ge=0, lt=1, says="Decay of the first moment; Adafactor has none.", makes=LORA)
    adam_beta2: float = key(0.999, ge=0, lt=1, says="Decay of the second moment; Adafactor has its own.", makes=LORA)
    adam_epsilon: float = key(
        1e-8, gt=0, says="Keeps a division by the second moment finite; not in Adafactor.", makes=LORA
    )
    adam_weight_decay: float = key(1e-2, ge=0, says="Decoupled weight decay, of every optimizer.", makes=LORA)
    use_ema: bool = key(False, says="Save a moving average of the trained weights.", makes=LORA)
    ema_decay: float = key(
        0.995,
        ge=0,
        lt=1,
        says="Decay of that average per step; lower in the first steps, (1 + n) / (10 + n).",
        makes=LORA,
    )


def optimizer_faults(config: "StageConfig") -> Iterator[str]:
    """Why the optimizer's settings cannot be used together; an empty text for each rule that is not broken."""
    yield _rate_fault(config)
    yield _optimizer_fault(config)


def optimizer_notes(config: "StageConfig") -> Iterator[str]:
    """What a user should know of these settings, each starting with its key."""
    full, is_set = config.model_type == "full", config.model_fields_set
    if full and "learning_rate" not in is_set and config.optimizer != "prodigy":
        yield (
            f"learning_rate is not set; {config.learning_rate:g} is meant for a LoRA. Every weight of a UNet needs "
            "less, for example 1e-6"
        )
    if config.optimizer == "prodigy" and config.learning_rate != 1.0:
        yield (
            f"learning_rate is {config.learning_rate:g}; prodigy finds the step size itself and multiplies it by this. "
            "It is meant to be 1.0"
        )
    if config.lr_warmup_steps and config.schedule == "constant":
        yield "lr_warmup_steps is ignored; lr_scheduler is constant. constant_with_warmup has a warm-up"
    if config.lr_end is not None and config.schedule.startswith("constant"):
        yield f"lr_end is ignored; lr_scheduler is {config.schedule}"
    if "ema_decay" in is_set and not config.use_ema:
        yield "ema_decay is ignored without use_ema"
    if config.optimizer == "adafactor":
        for name in sorted(is_set & {"adam_beta1", "adam_beta2", "adam_epsilon"}):
            yield f"{name} is ignored; adafactor has no such setting"


def _rate_fault(config: "StageConfig") -> str:
    if config.final_learning_rate > config.learning_rate and not config.schedule.startswith("constant"):
        return f"lr_end is {config.lr_end}, which must not be above learning_rate {config.learning_rate}"
    if config.num_train_epochs is not None:
        if config.max_train_steps is None:
            return ""
        return (
            f"num_train_epochs is {config.num_train_epochs} and max_train_steps is {config.max_train_steps}: two lengths of "
            "one training. Remove one of them"
        )
    if config.lr_warmup_steps >= config.steps:
        unset = ", which is not set" if config.max_train_steps is None else ""
        return f"lr_warmup_steps is {config.lr_warmup_steps}; it must be below max_train_steps ({config.steps}{unset})"
    return ""


def _optimizer_fault(config: "StageConfig") -> str:
    prefix, kind = f"optimizer is {config.optimizer!r}", config.optimizer_kind
    if kind.library and (missing := missing_extra([kind.library[0]], kind.library[1])):
        return f"{prefix}, and {missing}"
    if kind.bf16_weights and config.mixed_precision != "bf16":
        return f"{prefix}, which keeps the weights in bf16, and mixed_precision is 'no'. Set it to bf16, or use adamw"
    if kind.averages and not config.schedule.startswith("constant"):
        return (
            f"{prefix}, which replaces a schedule, and lr_scheduler is {config.schedule!r}. Use constant or "
            "constant_with_warmup"
        )
    if kind.averages and config.use_ema:
        return f"{prefix}, which averages the weights itself. Remove use_ema"
    if config.optimizer == "adamw_schedulefree" and config.adam_beta1 == 0:
        return f"{prefix}, which divides by adam_beta1, and that is 0. Use for example 0.9"
    return ""
