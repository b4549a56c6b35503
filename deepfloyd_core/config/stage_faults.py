"""What is wrong with one stage's settings, or worth a note: each key with what it contradicts and what to do."""

from typing import TYPE_CHECKING

from deepfloyd_core.config.base import closest
from deepfloyd_core.config.extras import missing_extra
from deepfloyd_core.config.flavours import FLAVOURS, NOT_ON_THE_WAY_DOWN

if TYPE_CHECKING:
    from deepfloyd_core.config.stage import StageConfig

# The package that an optimizer comes from where that is not torch, and the extra that installs it.
_LIBRARIES = {
    "adamw_8bit": ("bitsandbytes", "bitsandbytes"),
    "prodigy": ("prodigyopt", "optimizers"),
    "adamw_schedulefree": ("schedulefree", "optimizers"),
}
_ADAPTERS = (
    "lora_rank", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_init_type", "use_dora",
)  # fmt: skip
# A key, and the values of another under which alone it has an effect.
BELONGS: tuple[tuple[str, str, tuple[object, ...]], ...] = (
    *((key, "model_type", ("lora",)) for key in (*_ADAPTERS, "use_bitfit")),
    *((key, "use_bitfit", (False,)) for key in _ADAPTERS),
    ("controlnet", "model_type", ("lora",)),
    ("controlnet", "use_bitfit", (False,)),
    ("controlnet_conditioning", "controlnet", (True,)),
    ("lr_num_cycles", "schedule", ("cosine_with_restarts",)),
    ("lr_power", "schedule", ("polynomial",)),
    ("huber_c", "loss_type", ("huber", "smooth_l1")),
    ("huber_schedule", "loss_type", ("huber", "smooth_l1")),
    ("soft_min_snr_sigma_data", "use_soft_min_snr", (True,)),
    ("noise_offset", "offset_noise", (True,)),
    ("noise_offset_probability", "offset_noise", (True,)),
    ("timestep_bias_multiplier", "timestep_bias_strategy", ("earlier", "later", "range")),
    ("timestep_bias_portion", "timestep_bias_strategy", ("earlier", "later")),
    ("timestep_bias_begin", "timestep_bias_strategy", ("range",)),
    ("timestep_bias_end", "timestep_bias_strategy", ("range",)),
)
# Keys that Stage I has no use for; `validation_noise_level` alone may stand at the top level for both.
_STAGE2_KEYS = (
    "noise_level_begin", "noise_level_end", "low_res_blur", "low_res_noise", "low_res_jpeg_quality",
    "low_res_degraded_share", "low_res_stage1_share", "low_res_stage1_strength", "stage2_patch",
    "validation_noise_levels", "validation_back_projection",
)  # fmt: skip


def stage_fault(config: "StageConfig") -> str:
    """The first contradiction among a stage's settings, to follow the name of the place; empty where there is none."""
    found = (
        find(config)
        for find in (
            _flavour_fault, _targets_fault, _rate_fault, _optimizer_fault, _objective_fault, _precision_fault, _idle_fault,
            _stage2_fault, _control_fault, _compile_fault,
        )
    )  # fmt: skip
    return next((fault for fault in found if fault), "")


def stage_notes(config: "StageConfig") -> list[str]:
    """What a user should know of these settings, each starting with its key."""
    found = []
    if (
        config.model_type == "full"
        and not config.model_fields_set & {"learning_rate"}
        and config.optimizer != "prodigy"
    ):
        found.append(
            f"learning_rate is not set; {config.learning_rate:g} is meant for a LoRA. Every weight of a UNet wants less, "
            "for example 1e-6"
        )
    if config.optimizer == "prodigy" and config.learning_rate != 1.0:
        found.append(
            f"learning_rate is {config.learning_rate:g}; prodigy finds the step size itself and multiplies it by this. "
            "It is meant to be 1.0"
        )
    if config.lr_warmup_steps and config.schedule == "constant":
        found.append("lr_warmup_steps is ignored; lr_scheduler is constant. constant_with_warmup has a warm-up")
    if config.lr_end is not None and config.schedule.startswith("constant"):
        found.append(f"lr_end is ignored; lr_scheduler is {config.schedule}")
    if "ema_decay" in config.model_fields_set and not config.use_ema:
        found.append("ema_decay is ignored without use_ema")
    begin, end = config.noise_level_begin, config.noise_level_end
    outside = [level for level in config.measured_noise_levels if not begin <= level < end]
    if outside and config.flavour.stage == 2:
        key = "validation_noise_level" + ("" if config.validation_noise_level in outside else "s")
        found.append(f"{key} is {outside[0]}; training draws {begin} to {end - 1} alone")
    if config.optimizer == "adafactor":
        unused = sorted(config.model_fields_set & {"adam_beta1", "adam_beta2", "adam_epsilon"})
        found += [f"{key} is ignored; adafactor has no such setting" for key in unused]
    return found


def _flavour_fault(config: "StageConfig") -> str:
    if config.model_flavour in FLAVOURS:
        return ""
    near = closest(config.model_flavour, list(FLAVOURS)).replace("keys", "flavours")
    return f"model_flavour is {config.model_flavour!r}, which is not known. {near.rstrip('.')}"


def _targets_fault(config: "StageConfig") -> str:
    if "all-linear" not in config.lora_target_modules:
        return ""
    return (
        "lora_target_modules has 'all-linear', which names no layer here. Name those that get an adapter, for example "
        "to_q, to_k, to_v, to_out.0, add_k_proj and add_v_proj, or remove the key"
    )


def _rate_fault(config: "StageConfig") -> str:
    if config.final_learning_rate > config.learning_rate and not config.schedule.startswith("constant"):
        return f"lr_end is {config.lr_end}, above learning_rate {config.learning_rate}; it must not be"
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
    said = f"optimizer is {config.optimizer!r}"
    package, extra = _LIBRARIES.get(config.optimizer, ("", ""))
    if package and (missing := missing_extra([package], extra)):
        return f"{said}, and {missing}"
    if config.optimizer == "adamw_bf16" and config.mixed_precision != "bf16":
        return f"{said}, which keeps the weights in bf16, and mixed_precision is 'no'. Set it to bf16, or use adamw"
    if config.optimizer != "adamw_schedulefree":
        return ""
    if not config.schedule.startswith("constant"):
        return (
            f"{said}, which takes the place of a schedule, and lr_scheduler is {config.schedule!r}. "
            "Use constant or constant_with_warmup"
        )
    if config.use_ema:
        return f"{said}, which averages what is trained itself. Remove use_ema"
    if config.adam_beta1 == 0:
        return f"{said}, which divides by adam_beta1, and that is 0. Use for example 0.9"
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
            "scheduled_sampling_max_step_offset needs weights of the loss: an error of the picture counts by its SNR in "
            "epsilon, 24,000 at the clean end. Set snr_gamma, for example to 5, or use_soft_min_snr"
        )
    if config.train_variance and config.scheduled_sampling_probability == 1:
        return (
            "train_variance learns from samples whose x_t is made of the picture itself, and scheduled_sampling_probability "
            "is 1, which leaves none. Set it, for example to 0.5"
        )
    return ""


def _objective_fault(config: "StageConfig") -> str:
    if config.use_soft_min_snr and config.snr_gamma is not None:
        return "snr_gamma and use_soft_min_snr are two weights of the same loss. Remove one of them"
    if config.input_perturbation_steps and not config.input_perturbation:
        return "input_perturbation_steps is set, and input_perturbation is 0. Set it, for example to 0.1"
    if fault := _scheduled_sampling_fault(config):
        return fault
    if config.timestep_bias_strategy == "none":
        return ""
    said = f"timestep_bias_strategy is {config.timestep_bias_strategy!r}, and timestep_bias_"
    if config.timestep_bias_multiplier == 1:
        return f"{said}multiplier is 1, so that none is drawn more often than the others. Use for example 2.0"
    if config.timestep_bias_strategy != "range":
        return ""
    first, end = config.timestep_bias_begin, config.timestep_bias_end
    if first >= end:
        return f"{said}begin ({first}) is not below timestep_bias_end ({end}). Set a range within 0 to 1000"
    if (first, end) == (0, 1000):
        return f"{said}begin and timestep_bias_end take in every timestep. Set a smaller range"
    return ""


def _precision_fault(config: "StageConfig") -> str:
    if config.base_model_precision == "no_change" or config.model_type != "full":
        return ""
    return (
        f"base_model_precision is {config.base_model_precision!r}, and model_type is 'full', which trains every weight; in "
        "8 or 4 bits none can be trained. Remove it, or set model_type = lora"
    )


def _idle_fault(config: "StageConfig") -> str:
    """A key that was changed and would have no effect, with the one that would give it one."""
    for key, other, wanted in BELONGS:
        value, found = getattr(config, key), getattr(config, other)
        other = {"schedule": "lr_scheduler"}.get(other, other)
        if value != type(config).model_fields[key].default and found not in wanted:
            needed = " or ".join(str(option) for option in wanted)
            return f"{key} is {value}, without effect while {other} is {found}. Remove it, or set {other} = {needed}"
    return ""


def _control_fault(config: "StageConfig") -> str:
    if not config.controlnet:
        return ""
    if config.flavour.stage == 2:
        return f"controlnet is True, and {config.model_flavour} is a Stage II model. Put it into [stage1]"
    beyond = [name for name in config.lora_target_modules if name.split(".")[0] in NOT_ON_THE_WAY_DOWN]
    if beyond:
        return (
            f"lora_target_modules has {beyond[0]!r}; controlnet adapts a copy of the UNet's way down, which lacks "
            "it. Remove it"
        )
    if config.controlnet_conditioning == "canny" and (missing := missing_extra(["skimage"], "controlnet")):
        unset = "" if "controlnet_conditioning" in config.model_fields_set else " unless it is set"
        return f"controlnet is True, its controlnet_conditioning is 'canny'{unset}, and {missing}"
    return ""


def _compile_fault(config: "StageConfig") -> str:
    """What torch.compile cannot take in one piece; each break would be a graph more to make for every layer."""
    said = f"dynamo_backend is {config.dynamo_backend!r}"
    if config.dynamo_backend == "no":
        return ""
    if config.use_dora:
        return f"{said}, and torch cannot trace peft's DoRA. Set it to no, or remove use_dora"
    if config.attention_mechanism == "xformers":
        return f"{said}, and what xformers does cannot be traced. Set it to no, or attention_mechanism = sdpa"
    return ""


def _stage2_fault(config: "StageConfig") -> str:
    """A key of Stage II that Stage I was given, or that contradicts another."""
    if config.flavour.stage == 2:
        return _low_res_fault(config)
    for key in _STAGE2_KEYS:
        value = getattr(config, key)
        if value != type(config).model_fields[key].default:
            shown = list(value) if isinstance(value, tuple) else value
            return f"{key} is {shown}, and {config.model_flavour} is a Stage I model. Put it into [stage2]"
    return ""


def _low_res_fault(config: "StageConfig") -> str:
    if config.noise_level_begin >= config.noise_level_end:
        return (
            f"noise_level_begin ({config.noise_level_begin}) is not below noise_level_end ({config.noise_level_end}). "
            "Set a range within 0 to 1000"
        )
    if config.low_res_degraded_share != 1 and not config.degrades_low_res:
        return (
            f"low_res_degraded_share is {config.low_res_degraded_share}, without effect while there is no low_res_blur, "
            "low_res_noise or low_res_jpeg_quality. Remove it, or set one of them"
        )
    default = type(config).model_fields["low_res_stage1_strength"].default
    if config.low_res_stage1_strength != default and not config.low_res_stage1_share:
        return (
            f"low_res_stage1_strength is {config.low_res_stage1_strength}, without effect while low_res_stage1_share is "
            "0. Remove it, or set low_res_stage1_share, for example to 0.5"
        )
    return ""
