"""From the ways a run file can be written to the one that the models read.

SimpleTuner's config.json is flat and may have dashes before its keys; some of its keys mean nothing here. Keys of training
at the top level go to both stages.
"""

import re
import tomllib
from pathlib import Path
from typing import Any

from deepfloyd_core.errors import ConfigError
from deepfloyd_core.flavours import FLAVOURS, PUBLISHED, Stage

# SimpleTuner keys that change nothing here: accepted, and reported as ignored.
IGNORED = frozenset({
    "model_family", "output_dir", "tracker_project_name", "tracker_run_name", "resume_from_checkpoint",
    "disable_benchmark", "compress_disk_cache", "hub_model_id", "push_to_hub",
    "push_checkpoints_to_hub",
    "minimum_image_size", "resolution", "resolution_type", "num_train_epochs", "lora_type",
    "validation_disable_unconditional", "validation_torch_compile", "disable_tf32", "allow_tf32", "ignore_final_epochs",
    "dataloader_prefetch", "caption_strategy", "instance_prompt", "write_batch_size", "cache_dir", "skip_file_discovery",
    "quantize_via", "scheduled_sampling_sampler",
})  # fmt: skip
# SimpleTuner keys that make no sense for a pixel-space cascade: refused.
REFUSED = {
    "vae": "IF works on pixels; there is no VAE to configure",
    "flow": "IF predicts epsilon; it is not a flow-matching model",
    "video": "IF makes pictures, not video",
    "audio": "IF makes pictures, not audio",
    "controlnet_model_name_or_path": "a ControlNet-LoRA starts from the base model, or with init_lora from an earlier one",
    "controlnet_custom_config": "a ControlNet-LoRA has the base model's layers",
}
TRACKERS = ("tensorboard", "wandb")
# Older values of model_type, which name the stage as well.
_OLD_MODEL_TYPES: dict[str, tuple[Stage, str]] = {
    "deepfloyd-lora": (1, "lora"),
    "deepfloyd-stage2-lora": (2, "lora"),
    "deepfloyd-full": (1, "full"),
    "deepfloyd-stage2": (2, "full"),
}
# Values of base_model_precision that mean the same here. `int8-torchao` and `nf4-bnb` leave convolutions as they are, which
# are most of IF; others have other numbers.
_PRECISIONS = {"int8-quanto": "int8"}


def our_spelling(
    values: dict[str, Any], path: Path, overrides: tuple[str, ...], stage_keys: frozenset[str]
) -> tuple[dict[str, Any], list[str]]:
    """A run file's values with overrides (KEY=VALUE) applied, in tables as the models have them, and notes for the user.

    `stage_keys`: those that belong to a stage. Raises ConfigError for a key that makes no sense here.
    """
    values = _spelled(values, path)
    for override in overrides:
        _apply_override(values, override)
    return _sort_out(values, path, stage_keys)


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {override!r} is not of the form key=value, for example --set stage1.lora_rank=8.")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word, such as a path
    *tables, name = key.split(".")
    for table in tables:
        values = values.setdefault(table, {})
        if not isinstance(values, dict):
            raise ConfigError(f"--set {override!r}: {table} is a value, not a table.")
    values[name] = value


def _spelled(values: dict[str, Any], path: Path) -> dict[str, Any]:
    """Top-level keys in our spelling: without SimpleTuner's leading dashes, in lower case."""
    names: dict[str, str] = {}
    for key in values:
        name = key.lstrip("-").replace("-", "_").lower()
        if name in names:
            raise ConfigError(f"{path}: {names[name]} and {key} are one key, {name}. Keep one of them.")
        names[name] = key
    return {name: values[key] for name, key in names.items()}


def _sort_out(values: dict[str, Any], path: Path, stage_keys: frozenset[str]) -> tuple[dict[str, Any], list[str]]:
    """Note ignored keys, refuse those that make no sense here, spread shared keys over the stages."""
    tables = [value for value in values.values() if isinstance(value, dict)]
    for where, key, value in [(table, *item) for table in (values, *tables) for item in table.items()]:
        word = next((word for word in REFUSED if key == word or key.startswith(f"{word}_")), None)
        if word and value not in (None, False):
            raise ConfigError(f"{path}: {key} is set, but {REFUSED[word]}. Remove the key.")
        if key == "base_model_precision" and isinstance(value, str):
            where[key] = _precision(value, path)
    if values.get("model_family") not in (None, "deepfloyd"):
        raise ConfigError(f"{path}: model_family is {values['model_family']!r}; this pipeline trains deepfloyd only.")
    ignored = sorted(key for key in values if key in IGNORED)
    shown, others = _trackers(values.get("report_to"), path)
    ignored += others
    notes = [f"{path}: {key} is ignored; it has no effect in this pipeline" for key in ignored if key != "model_family"]
    dropped = {key for key in values if any(key == word or key.startswith(f"{word}_") for word in REFUSED)}
    dropped |= {key for key in ("controlnet",) if values.get(key, 0) is None}
    rest = {key: value for key, value in values.items() if key not in ignored and key not in dropped}
    if "report_to" in values:
        rest["report_to"] = shown
    return _spread(rest, path, stage_keys), notes


def _trackers(value: Any, path: Path) -> tuple[str, list[str]]:
    """SimpleTuner's `report_to`, one tracker, several with commas between or a list, as ours has it; and what is ignored.

    `all` is among the latter: which those are depends on what is installed. Raises ConfigError when it names none.
    """
    if isinstance(value, list):
        value = ",".join(map(str, value))
    if not isinstance(value, str | None):
        raise ConfigError(f"{path}: report_to is {value!r}; it names where to show a training: {', '.join(TRACKERS)}.")
    asked = {name.strip().lower() for name in str(value or "none").split(",")} - {"", "none"}
    known = [name for name in TRACKERS if name in asked]
    return ",".join(known) or "none", [f"report_to = {name}" for name in sorted(asked - set(known))]


def _precision(value: str, path: Path) -> str:
    """Our name of a base_model_precision. Raises ConfigError for one of SimpleTuner's that means something else."""
    if value in _PRECISIONS or "-" not in value:
        return _PRECISIONS.get(value, value)
    bits = re.search(r"\d+", value)
    nearest = "no_change" if bits is None or int(bits[0]) > 8 else "int8" if int(bits[0]) > 4 else "nf4"
    raise ConfigError(
        f"{path}: base_model_precision is {value!r}; here it is int8 (or int8-quanto) or nf4, of linear layers and "
        f"convolutions. Set the nearest, {nearest}."
    )


def _spread(values: dict[str, Any], path: Path, stage_keys: frozenset[str]) -> dict[str, Any]:
    shared = {key: values.pop(key) for key in list(values) if key in stage_keys}
    stage: Stage | None = None
    if str(shared.get("model_type")).lower() in _OLD_MODEL_TYPES:
        stage, shared["model_type"] = _OLD_MODEL_TYPES[str(shared["model_type"]).lower()]
    elif str(shared.get("model_flavour")) in FLAVOURS:
        stage = FLAVOURS[str(shared["model_flavour"])].stage
    tables: list[str] = [name for name in ("stage1", "stage2") if name in values]
    for name in tables:
        if not isinstance(values[name], dict):
            raise ConfigError(f"{path}: {name} is {values[name]!r}; it must be a table.")
    if not tables and shared:
        if stage is None:
            raise ConfigError(
                f"{path}: which stage to train is not said: model_flavour is {shared.get('model_flavour')!r}. "
                f"Set it to one of {', '.join(PUBLISHED)}, or add [stage1] and [stage2] tables."
            )
        tables = [f"stage{stage}"]
    for name in tables:
        values[name] = {**shared, **values.get(name, {})}
    return values
