"""The training objective of a stage: its loss, and how samples, noise and timesteps are drawn."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from deepfloyd_core.config.base import Spec
from deepfloyd_core.config.keys import LORA, key

if TYPE_CHECKING:
    from deepfloyd_core.config.stage import StageConfig

_HUBER: dict[str, tuple[object, ...]] = {"loss_type": ("huber", "smooth_l1")}
_OFFSET: dict[str, tuple[object, ...]] = {"offset_noise": (True,)}


class LossKeys(Spec):
    """The loss, and what is drawn for it."""

    loss_type: Literal["l2", "huber", "smooth_l1"] = key(
        "l2",
        says="Error in epsilon: squared, or pseudo-Huber (`smooth_l1`: the same, divided by its width).",
        makes=LORA,
    )
    huber_c: float = key(
        0.1,
        gt=0,
        le=1,
        says="Width of the pseudo-Huber loss: beyond it errors count linearly.",
        makes=LORA,
        only_with=_HUBER,
    )
    huber_schedule: Literal["constant", "snr", "exponential"] = key(
        "snr",
        says="That width over the timesteps: constant, or falling from 1 at the clean end to `huber_c`.",
        makes=LORA,
        only_with=_HUBER,
    )
    snr_gamma: float | None = key(None, gt=0, says="Min-SNR gamma (Hang et al. 2023); unset: no weights.", makes=LORA)
    use_soft_min_snr: bool = key(
        False, says="Weigh samples by a min-SNR without its kink (Crowson et al. 2024).", makes=LORA
    )
    soft_min_snr_sigma_data: float = key(
        0.5,
        gt=0,
        le=1000,
        says="The data's standard deviation in that weight; its gamma is sigma_data^-2.",
        makes=LORA,
        only_with={"use_soft_min_snr": (True,)},
    )
    train_variance: bool = key(
        False,
        says="Train the variance half as well (L_hybrid, Nichol and Dhariwal 2021), and sample with it.",
        makes=LORA,
    )
    offset_noise: bool = key(False, says="Shift a sample's noise by one drawn number for each colour.", makes=LORA)
    noise_offset: float = key(0.1, gt=0, le=1, says="Standard deviation of that shift.", makes=LORA, only_with=_OFFSET)
    noise_offset_probability: float = key(
        0.25, gt=0, le=1, says="Share of the samples that are shifted.", makes=LORA, only_with=_OFFSET
    )
    input_perturbation: float = key(
        0.0,
        ge=0,
        le=1,
        says="Extra noise in the UNet's input but not in the target (Ning et al. 2023).",
        makes=LORA,
    )
    input_perturbation_steps: int = key(
        0, ge=0, says="Optimizer steps over which `input_perturbation` falls to 0; 0: it is constant.", makes=LORA
    )
    scheduled_sampling_max_step_offset: int = key(
        0,
        ge=0,
        le=999,
        says="Train on the model's own errors: x_t is made from the UNet's estimate of the picture, at a timestep "
        "up to this many steps noisier. Needs `scheduled_sampling_probability`.",
        makes=LORA,
    )
    scheduled_sampling_probability: float = key(
        0.0,
        ge=0,
        le=1,
        says="Share of the samples with scheduled sampling; 1: all. The others have the standard x_t.",
        makes=LORA,
    )
    timestep_bias_strategy: Literal["none", "earlier", "later", "range"] = key(
        "none",
        says="Timesteps drawn more or less often: the first ones (little noise), the last ones, or a range.",
        makes=LORA,
    )
    timestep_bias_multiplier: float = key(
        1.0,
        gt=0,
        le=1000,
        says="How many times as often these timesteps are drawn as the others.",
        makes=LORA,
        only_with={"timestep_bias_strategy": ("earlier", "later", "range")},
    )
    timestep_bias_portion: float = key(
        0.25,
        ge=0.001,
        lt=1,
        says="Share of the timesteps that are `earlier` or `later`.",
        makes=LORA,
        only_with={"timestep_bias_strategy": ("earlier", "later")},
    )
    timestep_bias_begin: int = key(
        0, ge=0, le=999, says="First timestep of `range`.", makes=LORA, only_with={"timestep_bias_strategy": ("range",)}
    )
    timestep_bias_end: int = key(
        1000,
        ge=1,
        le=1000,
        says="Timestep after the last one of `range`.",
        makes=LORA,
        only_with={"timestep_bias_strategy": ("range",)},
    )
    caption_dropout_probability: float = key(
        0.1, ge=0, le=1, says="Share of captions replaced by the empty one.", makes=LORA
    )
    random_flip: bool = key(False, says="Mirror half of the samples left to right.", makes=LORA)


def loss_faults(config: "StageConfig") -> Iterator[str]:
    """Why settings of the loss and its draws cannot be used together; an empty text for each rule that is not broken."""
    if config.use_soft_min_snr and config.snr_gamma is not None:
        yield "snr_gamma and use_soft_min_snr are two weights of the same loss. Remove one of them"
    if config.input_perturbation_steps and not config.input_perturbation:
        yield "input_perturbation_steps is set, and input_perturbation is 0. Set it, for example to 0.1"
    yield _scheduled_sampling_fault(config)
    yield _timesteps_fault(config)


def _timesteps_fault(config: "StageConfig") -> str:
    if config.timestep_bias_strategy == "none":
        return ""
    prefix = f"timestep_bias_strategy is {config.timestep_bias_strategy!r}, and timestep_bias_"
    if config.timestep_bias_multiplier == 1:
        return f"{prefix}multiplier is 1, so that none is drawn more often than the others. Use for example 2.0"
    if config.timestep_bias_strategy != "range":
        return ""
    first, end = config.timestep_bias_begin, config.timestep_bias_end
    if first >= end:
        return f"{prefix}begin ({first}) is not below timestep_bias_end ({end}). Set a range within 0 to 1000"
    if (first, end) == (0, 1000):
        return f"{prefix}begin and timestep_bias_end cover every timestep. Set a smaller range"
    return ""


def _scheduled_sampling_fault(config: "StageConfig") -> str:
    keys = {"scheduled_sampling_max_step_offset": "700", "scheduled_sampling_probability": "1"}
    unset = [key for key in keys if not getattr(config, key)]
    if len(unset) == 1:
        (other,) = set(keys) - set(unset)
        return f"{other} is without effect while {unset[0]} is 0. Set that, for example to {keys[unset[0]]}"
    if unset:
        return ""
    if config.snr_gamma is None and not config.use_soft_min_snr:
        return (
            "scheduled_sampling_max_step_offset needs weights of the loss: in epsilon an error of the picture is "
            "multiplied by its SNR, 24,000 at the clean end. Set snr_gamma, for example to 5, or use_soft_min_snr"
        )
    if config.train_variance and config.scheduled_sampling_probability == 1:
        return (
            "train_variance learns only from samples without scheduled sampling, and scheduled_sampling_probability "
            "is 1, which leaves none. Set it, for example to 0.5"
        )
    return ""
