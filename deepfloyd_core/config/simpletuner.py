"""Converts the keys and values of SimpleTuner's run files to ours, with a note for each that has no effect.

`simpletuner_options` has the answer to each option. SimpleTuner passes every value of its files to a command line:
there "1e-4", "true" and "50" are a number, a boolean and a number, and an empty value means not set. A file of its form
(flat, not TOML) is read in the same way.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from deepfloyd_core.config.base import Spec, scalar_kinds, shown
from deepfloyd_core.config.keys import belongings
from deepfloyd_core.config.simpletuner_options import (
    ALIASES,
    DATA_DEFAULTS,
    IGNORED,
    REFUSED,
    STAGE3_KEYS,
    SWITCHES,
    WORKS,
    Refusal,
)
from deepfloyd_core.config.stage import StageConfig
from deepfloyd_core.config.stage3 import Stage3Config
from deepfloyd_core.config.stage_sampling import NoiseScheduler
from deepfloyd_core.errors import ConfigError, DeepFloydError, attempt

_UNSET = (None, "")
_TRUE, _FALSE = ("true", "yes", "y", "on", "1"), ("false", "no", "n", "off", "0")
_OFF = (None, False, "", "false", "none", "no", "off", "disabled", "null")
# Keys of ours that SimpleTuner leaves unset at 0.
_UNSET_AT_0 = (
    "max_train_steps", "num_train_epochs", "snr_gamma", "checkpoint_step_interval", "checkpoints_total_limit", "lora_alpha",
    "num_threads", "embed_batch_size", "aspect_bucket_rounding", "tokenizer_max_length", "soft_min_snr_sigma_data",
)  # fmt: skip
# Their values of our keys, where these are the same.
_SAME: dict[str, dict[str, str]] = {
    "attention_mechanism": {"diffusers": "sdpa"},
    "optimizer": {
        "torch-adamw": "adamw", "bnb-adamw": "adamw", "bnb-adamw-paged": "adamw", "bnb-adamw8bit": "adamw_8bit",
        "bnb-adamw8bit-paged": "adamw_8bit", "adamw8bit": "adamw_8bit", "torch-adafactor": "adafactor",
    },
    "mixed_precision": {"fp32": "no"},
    "text_encoder_quantization": {"no_change": "none", "int8-quanto": "int8"},
    "caption_strategy": {"instance_prompt": "instanceprompt"},
}  # fmt: skip
# Keys whose other values say how fast a step is, and no more: what stands for them here.
_SPEED = {
    "attention_mechanism": (("sdpa", "xformers", "math"), "sdpa"),
    "dynamo_backend": (("no", "inductor", "aot_eager"), "no"),
}
_STAGE3_MODE = "deepfloyd_validation_stage3_mode"
_OPTIMIZER_SETTINGS = {"weight_decay": "adam_weight_decay", "eps": "adam_epsilon"}
# Keys without effect while another is off, beside those that say so themselves.
_IDLE_WITHOUT = (
    ("input_perturbation_steps", "input_perturbation"),
    ("scheduled_sampling_max_step_offset", "scheduled_sampling_probability"),
    ("scheduled_sampling_probability", "scheduled_sampling_max_step_offset"),
)


def plain(key: str) -> str:
    """A key without leading dashes, in lower case."""
    return key.lstrip("-").replace("-", "_").lower()


def spelled(values: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Keys in our spelling: without leading dashes, in lower case, aliases by ours. Raises ConfigError for two of one."""
    names: dict[str, str] = {}
    for key in values:
        name = ALIASES.get(plain(key), plain(key))
        if name in names and values[key] in _UNSET:
            continue
        if name in names and values[names[name]] not in (*_UNSET, values[key]):
            raise ConfigError(f"{path}: {names[name]} and {key} are one key, {name}. Keep one of them.")
        names[name] = key
    return {name: values[key] for name, key in names.items()}


def answer_of(option: str) -> str | None:
    """The answer to an option of SimpleTuner's: works, alias, ignored or refused; None: it has no answer."""
    if option in WORKS or option in DATA_DEFAULTS:
        return "works"
    if option in ALIASES or option in SWITCHES:
        return "alias"
    return "ignored" if option in IGNORED else "refused" if option in REFUSED else None


def is_off(value: Any, off: tuple[object, ...] = ()) -> bool:
    """Whether a value switches an option off: none, false, 0, empty, or one of `off`; also as text."""
    if isinstance(value, str):
        value = value.strip().lower()
        if value in _OFF or value in off:
            return True
        value = _number(value)
    return value in _OFF or value in ([], {}, 0) or (value is not True and value in off)  # True is no 1


def asked_of_switch(switch: str, value: Any) -> bool:
    """Whether a switch is at the value at which it stands for a key of ours."""
    at = SWITCHES[switch][0]
    return bool(value == at or _as_kind(value, bool) == at)


def switch_applies(switch: str, values: Mapping[str, Any]) -> bool:
    """Whether a switch stands for a key of ours among values. An optimizer that is named goes before those of switches."""
    name = SWITCHES[switch][1]
    return (
        switch in values
        and asked_of_switch(switch, values[switch])
        and (name != "optimizer" or values.get(name) in _UNSET)
    )


def coerced(values: Mapping[str, Any], kinds: Mapping[str, type | None]) -> dict[str, Any]:
    """SimpleTuner's values converted to the types of our keys. A value that cannot be converted stays, for the models
    to refuse.
    """
    return {key: _as_kind(value, kinds.get(key)) for key, value in values.items()}


def answered(
    values: dict[str, Any], path: Path, faults: list[DeepFloydError], theirs: bool, top: bool = True
) -> tuple[dict[str, Any], list[str]]:
    """Values without ignored and refused keys, switches as our keys, and the notes. Refused keys are added to `faults`.

    theirs: the file has SimpleTuner's form. top: the values are not those of a stage's table.

    Raises ConfigError for another family of models.
    """
    _check_family(values, path)
    ignored: dict[str, list[str]] = {}
    rest, notes = dict[str, Any](), list[str]()
    for key, value in values.items():
        if key in REFUSED:
            refusal = REFUSED[key]
            if _asks(value, refusal, values):
                faults.append(
                    ConfigError(f"{path}: {key} is {shown(key, value)}, but {refusal.reason}. Remove the key.")
                )
            else:
                ignored.setdefault("off, or always done here", []).append(key)
        elif key in IGNORED or key.startswith(("_", "/", "#")):
            ignored.setdefault(IGNORED.get(key, "read as comments"), []).append(key)
        elif key not in SWITCHES:
            rest[key] = value
    for key in (key for key in SWITCHES if key in values):
        _, name, meaning = SWITCHES[key]
        if switch_applies(key, values):
            rest[name] = meaning
            notes.append(f"{path}: {key} is read as {name} = {str(meaning).lower()}")
        elif asked_of_switch(key, values[key]) and values[name] != meaning:
            ignored.setdefault(f"{name} is {shown(name, values[name])}", []).append(key)
    if method := _clipping(values):
        ignored[IGNORED["grad_clip_method"]].remove("grad_clip_method")
        notes.append(f"{path}: {method}")
    if top and (stage3 := _stage3(values)) is not None:
        rest["stage3"] = {**stage3, **rest.get("stage3", {})}
        ignored[IGNORED[_STAGE3_MODE]] = [key for key in ignored[IGNORED[_STAGE3_MODE]] if key not in STAGE3_KEYS]
        notes.append(
            f"{path}: {_STAGE3_MODE} is read as [stage3]; `generate --stages 1-3` draws it, validations do not"
        )
    if top and "output_dir" in values and not is_off(values["output_dir"]) and "workspace" not in values:
        rest["workspace"] = values["output_dir"]
        notes.append(f"{path}: workspace is not set, so it is output_dir, {values['output_dir']}")
        ignored[IGNORED["output_dir"]].remove("output_dir")
    if theirs:
        rest = _of_their_form(rest, path, notes, faults)
    return rest, [*notes, *grouped(ignored, str(path))]


def _stage3(values: Mapping[str, Any]) -> dict[str, Any] | None:
    """The table of Stage III that a file's options ask for; None: it asks for no Stage III."""
    if str(values.get(_STAGE3_MODE)).strip().lower() != "sd-x4-upscaler":
        return None
    kinds = scalar_kinds(Stage3Config)
    found = {ours: values[theirs] for theirs, ours in STAGE3_KEYS.items() if ours and values.get(theirs) not in _UNSET}
    return coerced(found, kinds)


def _clipping(values: Mapping[str, Any]) -> str:
    """A note for a gradient limit that SimpleTuner sets differently; empty if there is none."""
    method, limit = values.get("grad_clip_method"), values.get("max_grad_norm")
    if is_off(method, ("norm",)) or is_off(limit):
        return ""
    return (
        f"grad_clip_method is {shown('grad_clip_method', method)}, but max_grad_norm = {limit} here always limits the "
        "norm of all gradients together, not each number: choose a value that suits a norm"
    )


def without_idle(stage: dict[str, Any], defaults: Mapping[str, Any], path: Path, notes: list[str]) -> dict[str, Any]:
    """A stage's keys without those that another key leaves without effect; many of SimpleTuner's files have such keys."""
    idle = {key: other for key, other in _IDLE_WITHOUT if not is_off(stage.get(key)) and is_off(stage.get(other))}
    if is_off(stage.get("timestep_bias_multiplier", 1), (1,)) and not is_off(stage.get("timestep_bias_strategy")):
        idle["timestep_bias_strategy"] = "timestep_bias_multiplier"
    for key, other, wanted in belongings(StageConfig):
        if key in stage and key not in ("controlnet", "use_bitfit") and stage.get(other, defaults[other]) not in wanted:
            idle.setdefault(key, other)
    notes += [
        f"{path}: {key} is ignored; it has no effect while {other} is {shown(other, stage.get(other, defaults[other]))}"
        for key, other in idle.items()
    ]
    return {key: value for key, value in stage.items() if key not in idle}


def grouped(ignored: Mapping[str, list[str]], where: str) -> list[str]:
    """A note for each reason (the key) with all the names that it holds for."""
    return [
        f"{where}{': ' if where else ''}{', '.join(sorted(names))} {'is' if len(names) == 1 else 'are'} ignored; {reason}"
        for reason, names in ignored.items()
        if names
    ]


def data_defaults(values: dict[str, Any]) -> dict[str, Any]:
    """Take out of a run file the keys that are defaults for the data file's picture sets."""
    found = {key: values.pop(key) for key in DATA_DEFAULTS if key in values}
    return {key: value for key, value in found.items() if not is_off(value)}


def _check_family(values: Mapping[str, Any], path: Path) -> None:
    family = values.get("model_family")
    if family is not None and str(family).strip().lower() != "deepfloyd":
        raise ConfigError(
            f"{path}: model_family is {shown('model_family', family)}; this pipeline trains deepfloyd only."
        )


def _asks(value: Any, refusal: Refusal, values: Mapping[str, Any]) -> bool:
    """Whether a refused option would have an effect."""
    if is_off(value, refusal.off):
        return False
    if not refusal.within:
        return True
    key, *wanted = refusal.within
    return values.get(key) in wanted if wanted else not is_off(values.get(key))


def _of_their_form(
    values: dict[str, Any], path: Path, notes: list[str], faults: list[DeepFloydError]
) -> dict[str, Any]:
    values = {key: value for key, value in values.items() if value is not None and value != ""}
    for key in _UNSET_AT_0:
        if key in values and is_off(values[key]):
            del values[key]
    seed = _number(str(values.get("seed", 0)))
    if isinstance(seed, int) and seed < 0:
        notes.append(
            f"{path}: seed is {values.pop('seed')}, a random one; runs here are reproducible, so the default is used"
        )
    guidance = _number(str(values.get("validation_guidance", 1)))
    if isinstance(guidance, int | float) and guidance < 1:
        values["validation_guidance"] = 1.0
        notes.append(f"{path}: validation_guidance is {guidance}, read as 1, which is off here")
    scheduler, known = values.get("validation_noise_scheduler", "ddpm"), get_args(NoiseScheduler)
    if scheduler not in known:
        del values["validation_noise_scheduler"]
        notes.append(
            f"{path}: validation_noise_scheduler is {scheduler}, which has no dynamic thresholding, so the default is used; "
            f"known: {', '.join(known)}"
        )
    if isinstance(values.get("lr_scheduler"), str):
        values["lr_scheduler"] = values["lr_scheduler"].replace("-", "_")
    values |= attempt(faults, _optimizer_settings, values.pop("optimizer_config", ""), path) or {}
    if not is_off(values.get("controlnet")) and "controlnet_conditioning" not in values:
        values["controlnet_conditioning"] = "paired"  # what SimpleTuner's ControlNets follow is in the data file
        notes.append(
            f"{path}: controlnet is set, so controlnet_conditioning is paired, with the pictures of conditioning_data"
        )
    for key, same in _SAME.items():
        if isinstance(values.get(key), str):
            values[key] = same.get(values[key], values[key])
    for key, (known, instead) in _SPEED.items():
        if isinstance(values.get(key), str) and values[key] not in known:
            told = shown(key, values[key])
            notes.append(f"{path}: {key} is {told}, replaced by {instead} here; it only changes the speed")
            values[key] = instead
    return values


def _optimizer_settings(text: Any, path: Path) -> dict[str, float]:
    """`weight_decay=0.01,eps=1e-8` as our keys. Raises ConfigError for a setting that is not here."""
    found = {}
    for part in str(text).split(",") if text else []:
        name, _, value = part.partition("=")
        key, number = _OPTIMIZER_SETTINGS.get(name.strip()), _number(value.strip())
        if key is None or isinstance(number, str):
            known = ", ".join(_OPTIMIZER_SETTINGS)
            raise ConfigError(f"{path}: optimizer_config has {part.strip()!r}; known: {known}. Remove it.")
        found[key] = float(number)
    return found


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _as_kind(value: Any, kind: type | None) -> Any:
    """A value of their files converted to a type of ours; unchanged if it cannot be converted."""
    if isinstance(value, dict) and kind is not None and issubclass(kind, Spec):
        return coerced(value, scalar_kinds(kind))
    if kind is bool and not isinstance(value, bool) and isinstance(value, str | int):
        text = str(value).strip().lower()
        return True if text in _TRUE else False if text in _FALSE else value
    if kind in (int, float) and isinstance(value, str):
        value = _number(value.strip())
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value) if abs(value) < 2**1023 else value  # a larger one has no float
    if kind is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if kind is tuple and isinstance(value, str):
        return re.findall(r"[\w.-]+", value)
    return value
