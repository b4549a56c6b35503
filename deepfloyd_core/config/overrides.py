"""`--set KEY=VALUE`: overrides a key, wherever the run file sets it.

A key without a table also overrides the stages' tables that set it. `--set stage1.KEY` overrides it for
one stage, and wins over `--set KEY` in either order.
"""

import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepfloyd_core.config.base import closest, shortened
from deepfloyd_core.config.simpletuner import asked_of_switch, plain
from deepfloyd_core.config.simpletuner_options import ALIASES, SWITCHES
from deepfloyd_core.config.stages import STAGES
from deepfloyd_core.config.values import NEST_DEPTH, checked_values, toml_values
from deepfloyd_core.errors import ConfigError, DeepFloydError, attempt, raise_together

STAGE_TABLES = tuple(kind.table for kind in STAGES.values())


@dataclass(frozen=True)
class _Override:
    """One KEY=VALUE, with our name of the key."""

    text: str  # as it was typed
    tables: tuple[str, ...]
    name: str
    value: Any
    removes: bool

    @property
    def key(self) -> str:
        """As typed, without the value."""
        return self.text.partition("=")[0].strip()

    @property
    def at(self) -> str:
        """Our name of the key, with its table."""
        return ".".join([*self.tables, self.name])


def apply_overrides(values: dict[str, Any], texts: tuple[str, ...], path: Path) -> None:
    """Apply overrides (KEY=VALUE, or KEY= to remove a key) to the values of a run file, whose keys are in our spelling.

    Raises ConfigError for overrides of another form; if there are none, for two overrides of one key; and then for keys
    to remove that the file does not set. Their intended effect is unknown, so no other fault is reported with them.
    """
    faults: list[DeepFloydError] = []
    overrides = [found for text in texts if (found := attempt(faults, _parsed, text)) is not None]
    raise_together(faults)
    for place, override in enumerate(overrides):
        for other in overrides[:place]:
            if override.at == other.at:
                faults.append(ConfigError(_twice(other, override, [each.at for each in overrides].count(other.at))))
    raise_together(faults)
    for override in sorted(overrides, key=lambda each: len(each.tables)):
        attempt(faults, _apply, values, override, path)
    raise_together(faults)


def _twice(one: _Override, other: _Override, count: int) -> str:
    if one.key == other.key:
        return f"--set {shortened(one.key)} is given {count} times; give it once."
    names = " and ".join(f"--set {shortened(each.key)}" for each in (one, other))
    return f"{names} are one key, {one.at}. Keep one of them."


def _parsed(text: str) -> _Override:
    key, equals, value_text = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(
            f"--set {shortened(text)!r} is not of the form key=value, for example --set stage1.lora_rank=8."
        )
    *tables, name = key.strip().split(".", NEST_DEPTH)
    if "." in name:
        raise ConfigError(
            f"--set {shortened(text)!r} names a key in more than {NEST_DEPTH} tables, and there are none."
        )
    name, value = ALIASES.get(name, name), _value(value_text)
    if name in SWITCHES and asked_of_switch(name, value):
        _, name, value = SWITCHES[name]
    return _Override(text, tuple(tables), name, value, removes=not value_text)


def override_texts(override: str) -> Iterator[tuple[str, str]]:
    """The texts in the value of an override, at any depth, each with its key. Raises ConfigError."""
    found = _parsed(override)
    yield from _texts(found.name, found.value)


def _texts(key: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _texts(plain(name), inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(key, inner)


def _value(text: str) -> Any:
    try:
        try:
            return toml_values(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            return checked_values(text)  # a bare word, such as a path
    except (ValueError, RecursionError) as error:
        why = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise ConfigError(f"--set: the value {shortened(text)!r} cannot be used: {why}.") from None


def _apply(values: dict[str, Any], override: _Override, path: Path) -> None:
    table = values
    for name in override.tables:
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set {shortened(override.text)!r}: {shortened(name)} is a value, not a table.")
    tables = [table, *_holding(values, override.name)] if not override.tables else [table]
    if override.removes:
        if not any(override.name in each for each in tables):
            known = {key for each in tables for key in each}
            raise ConfigError(
                f"--set {shortened(override.text)!r} removes a key that {path} does not set. {closest(override.name, known)}"
            )
        for each in tables:
            each.pop(override.name, None)
        return
    for each in tables:
        for switch in _switches(override.name):
            each.pop(switch, None)
        each[override.name] = override.value


def _holding(values: dict[str, Any], name: str) -> Iterator[dict[str, Any]]:
    """The stages' tables that set a key, by its name or by a switch."""
    for table in (values.get(each) for each in STAGE_TABLES):
        if isinstance(table, dict) and {name, *_switches(name)} & table.keys():
            yield table


def _switches(name: str) -> list[str]:
    """The switches that stand for a key."""
    return [switch for switch, (_, key, _) in SWITCHES.items() if key == name]
