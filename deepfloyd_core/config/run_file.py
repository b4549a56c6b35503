"""Converts a run file, in any form that a user may write, to the form that the models read: overridden, with stage tables.

Training keys at the top level go to both stages; a file without tables trains the one stage that it names.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepfloyd_core.config.base import Spec, read_config_file, scalar_kinds, shown
from deepfloyd_core.config.data_sets import ImageDataset
from deepfloyd_core.config.env_file import is_env_file, read_env_file
from deepfloyd_core.config.flavours import FLAVOURS, PUBLISHED
from deepfloyd_core.config.overrides import STAGE_TABLES, apply_overrides
from deepfloyd_core.config.simpletuner import (
    answered,
    coerced,
    data_defaults,
    grouped,
    plain,
    spelled,
    switch_applies,
    without_idle,
)
from deepfloyd_core.config.simpletuner_options import ALIASES, DATA_DEFAULTS, IGNORED, REFUSED, SWITCHES, WORKS
from deepfloyd_core.config.stages import STAGES, Stage
from deepfloyd_core.errors import ConfigError, DeepFloydError, attempt, raise_together

TRACKERS = ("tensorboard", "wandb")
# Older values of model_type, which name the stage as well.
_OLD_MODEL_TYPES: dict[str, tuple[Stage, str]] = {
    theirs: (stage, ours) for stage, kind in STAGES.items() for theirs, ours in kind.model_types.items()
}
# Values of base_model_precision that mean the same here. `int8-torchao` and `nf4-bnb` leave convolutions as they are, which
# are most of IF; others have other numbers.
_PRECISIONS = {"int8-quanto": "int8"}


@dataclass(frozen=True)
class ParsedRunFile:
    """A run file as the models read it."""

    values: dict[str, Any]
    data_defaults: dict[str, Any]  # what picture sets have where they do not say it themselves
    notes: list[str]
    aliases: dict[str, str]  # our name of a key, and the file's where that is another
    faults: tuple[DeepFloydError, ...]  # refused keys, values that have no form here
    staged: bool  # whether it is known which stages its keys are of; if not, that is a fault and no model can read them


def in_its_words(message: str, path: Path, aliases: Mapping[str, str]) -> str:
    """A message about a run file, with the file's own names of keys beside ours."""

    def told(line: str) -> str:
        start = f"{path}: " if line.startswith(f"{path}: ") else ""
        for ours, theirs in aliases.items():
            line = start + re.sub(rf"\b{ours}\b", f"{ours} (in the file {theirs})", line.removeprefix(start), count=1)
        return line

    return "\n".join(told(line) for line in message.splitlines())


def read_run_file(path: Path, overrides: tuple[str, ...], run: type[Spec], stage: type[Spec]) -> ParsedRunFile:
    """Read a run file (TOML, JSON, config.env) with overrides (KEY=VALUE, or KEY= to remove it).

    run, stage: the models of its top level and of a stage's table. Keys that make no sense here are faults of the result.
    Raises ConfigError for a file that cannot be read, is meant for other models, or has a key twice, and for overrides.
    """
    values, notes, aliases = _read(path, run, stage)
    theirs = path.suffix.lower() != ".toml" and not any(name in values for name in STAGE_TABLES)
    aliases |= {ALIASES[plain(key)]: key for key in values if plain(key) in ALIASES}
    written = {plain(key): aliases.get(plain(key), key) for key in values}
    values = _spelled(values, path)
    apply_overrides(values, overrides, path)
    aliases |= {SWITCHES[key][1]: written[key] for key in SWITCHES if key in written and switch_applies(key, values)}
    faults: list[DeepFloydError] = []
    try:
        values = _answer(values, path, theirs, notes, faults)
    except ConfigError as error:
        raise ConfigError(in_its_words(str(error), path, aliases)) from None
    faults = [ConfigError(in_its_words(str(fault), path, aliases)) for fault in faults]
    if theirs:
        values = coerced(values, scalar_kinds(run) | scalar_kinds(stage) | _data_kinds())
    defaults = data_defaults(values)
    _sort_out(values, path, notes, faults)
    staged = attempt(faults, _spread, values, path, frozenset(stage.model_fields))
    if staged is not None and theirs:
        unset = {key: field.default for key, field in stage.model_fields.items()}
        for name in STAGE_TABLES:
            staged |= {name: without_idle(staged[name], unset, path, notes)} if name in staged else {}
    known = values if staged is None else staged
    return ParsedRunFile(known, defaults, notes, aliases, tuple(faults), staged is not None)


def _spelled(values: dict[str, Any], path: Path) -> dict[str, Any]:
    """All keys in our spelling. Raises ConfigError."""
    faults: list[DeepFloydError] = []
    found = attempt(faults, spelled, values, path) or {}
    for name in STAGE_TABLES:
        if isinstance(found.get(name), dict):
            found[name] = attempt(faults, spelled, found[name], path)
    raise_together(faults)
    return found


def _data_kinds() -> dict[str, type | None]:
    return {key: kind for key, kind in scalar_kinds(ImageDataset).items() if key in DATA_DEFAULTS}


def _read(path: Path, run: type[Spec], stage: type[Spec]) -> tuple[dict[str, Any], list[str], dict[str, str]]:
    """The values of a run file as written, the notes about them, and the file's own names of keys."""
    if is_env_file(path):
        kept = {*WORKS, *ALIASES, *DATA_DEFAULTS, *IGNORED, *REFUSED, *SWITCHES, *run.model_fields, *stage.model_fields}
        options, helpers, names = read_env_file(path, frozenset(kept))
        return dict(options), grouped({"variables that set no option": helpers}, str(path)), names
    values = read_config_file(path)
    if isinstance(values, list):
        raise ConfigError(
            f"{path} holds a list, as data files do. Give the run file, whose data_backend_config names it."
        )
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must be a table of keys.")
    return values, [], {}


def _answer(
    values: dict[str, Any], path: Path, theirs: bool, notes: list[str], faults: list[DeepFloydError]
) -> dict[str, Any]:
    """The answers to a file's keys, those of its stages' tables too."""
    found, more = answered(values, path, faults, theirs)
    notes += more
    for name in STAGE_TABLES:
        if isinstance(found.get(name), dict):
            found[name], more = answered(found[name], path, faults, theirs=False, top=False)
            notes += more
    return found


def _sort_out(values: dict[str, Any], path: Path, notes: list[str], faults: list[DeepFloydError]) -> None:
    """Convert precision and trackers to our form; a value without an equivalent becomes a fault, and is removed."""
    for table in (values, *(values[name] for name in STAGE_TABLES if isinstance(values.get(name), dict))):
        if isinstance(table.get("base_model_precision"), str):
            precision = attempt(faults, _precision, table.pop("base_model_precision"), path)
            table |= {} if precision is None else {"base_model_precision": precision}
    values.pop("model_family", None)
    if "report_to" in values and (known := attempt(faults, _trackers, values.pop("report_to"), path)):
        values["report_to"], others = known
        notes += [f"{path}: {other} is ignored; it has no effect in this pipeline" for other in others]


def _trackers(value: Any, path: Path) -> tuple[str, list[str]]:
    """SimpleTuner's `report_to` (one tracker, several with commas between, or a list) in our form; and the ignored trackers.

    `all` is ignored, too: its meaning depends on the installed packages. Raises ConfigError when no tracker is named.
    """
    if isinstance(value, list):
        value = ",".join(map(str, value))
    if not isinstance(value, str | None):
        told = shown("report_to", value)
        raise ConfigError(f"{path}: report_to is {told}; it is a list of trackers: {', '.join(TRACKERS)}.")
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


def _of_weights(name: Any) -> str | None:
    """The flavour whose weights have a name on the hub."""
    return next((known.name for known in PUBLISHED.values() if known.repo.lower() == str(name).lower()), None)


def _spread(values: dict[str, Any], path: Path, stage_keys: frozenset[str]) -> dict[str, Any]:
    shared = {key: value for key, value in values.items() if key in stage_keys}
    values = {key: value for key, value in values.items() if key not in stage_keys}
    stage: Stage | None = None
    if str(shared.get("model_type")).lower() in _OLD_MODEL_TYPES:
        stage, shared["model_type"] = _OLD_MODEL_TYPES[str(shared["model_type"]).lower()]
    tables: list[str] = [name for name in STAGE_TABLES if name in values]
    named = _of_weights(shared.get("pretrained_model_name_or_path"))
    if not tables and named and "model_flavour" not in shared:
        shared["model_flavour"] = named
    if stage is None and str(shared.get("model_flavour")) in FLAVOURS:
        stage = FLAVOURS[str(shared["model_flavour"])].stage
    for name in tables:
        if not isinstance(values[name], dict):
            raise ConfigError(f"{path}: {name} is {shown(name, values[name])}; it must be a table.")
    if not tables and shared:
        if stage is None:
            given = shared.get("model_flavour")
            prefix = (
                "model_flavour is missing"
                if given is None
                else f"model_flavour is {given!r}, which is none of DeepFloyd's"
            )
            raise ConfigError(
                f"{path}: {prefix}: the stage to train is unknown. "
                f"Set it to one of {', '.join(PUBLISHED)}, or add "
                f"{' and '.join(f'[{name}]' for name in STAGE_TABLES)} tables."
            )
        if "model_flavour" not in shared:
            known = ", ".join(name for name, entry in PUBLISHED.items() if entry.stage == stage)
            raise ConfigError(
                f"{path}: model_flavour is missing: model_type names {STAGES[stage].title} alone. Set it to one of "
                f"{known}."
            )
        tables = [STAGES[stage].table]
    for name in tables:
        values[name] = {**shared, **values.get(name, {})}
    return values
