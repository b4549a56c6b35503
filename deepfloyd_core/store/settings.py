"""The settings of an artifact that differ from the defaults, by their names in the run file and the data file."""

import json
import math
from collections.abc import Iterator
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from deepfloyd_core.config.data_sets import ImageDataset
from deepfloyd_core.config.run import RunConfig
from deepfloyd_core.config.stage import StageConfig
from deepfloyd_core.config.stage3 import TABLE, Stage3Config
from deepfloyd_core.config.stage_optimizer import OPTIMIZER_KINDS
from deepfloyd_core.config.stages import STAGES
from deepfloyd_core.store.changes import user_key
from deepfloyd_core.types import Json

_GROUPS = {"datasets", "rows", "validation", TABLE, *(stage.table for stage in STAGES.values())}  # of a spec's keys
_TURNS = "probability", "start_step", "end_step"  # of a data set, in a LoRA's spec under `shares`
_Path = tuple[str, ...]


def changed_settings(kind: str, spec: Json) -> dict[str, tuple[str, str]]:
    """Each setting of a kind's spec that differs from its default, by its name: the value, and the default.

    The default is empty for a setting that every file must have.
    """
    found = {}
    for path, value in _settings(spec):
        name = user_key(kind, path)
        field = _field(name, path)
        if field is None:  # it follows from others
            continue
        default = None if field.is_required() else to_jsonable_python(field.default)
        value, default = _as_written(path[-1], value), _effective(path[-1], default, spec)
        if value != default:
            found[name] = _text(value), "" if field.is_required() else _text(default)
    return found


def _settings(spec: Json, path: _Path = ()) -> Iterator[tuple[_Path, Any]]:
    """Each setting of a spec: where it is, and its value."""
    for key, value in spec.items():
        if key == "shares":
            for name, turns in value.items():
                yield from ((("datasets", name, turn), each) for turn, each in zip(_TURNS, turns, strict=True))
        elif isinstance(value, dict) and (key in _GROUPS or path[-1:] == ("datasets",)):
            yield from _settings(value, (*path, key))
        else:
            yield (*path, key), value


def _field(name: str, path: _Path) -> FieldInfo | None:
    """The key of the user's files that a setting has, if it is one."""
    key = name.rpartition(".")[2]
    if "datasets" in path:
        return ImageDataset.model_fields.get(key)
    if name.startswith(f"{TABLE}."):
        return Stage3Config.model_fields.get(key)
    return (StageConfig if name.startswith("stage") and "." in name else RunConfig).model_fields.get(key)


def _as_written(key: str, value: Any) -> Any:
    """A value as the user's file has it."""
    if key == "sizes":
        return ",".join(str(width) if width == height else f"{width}x{height}" for width, height in value)
    return value


def _effective(key: str, default: Any, spec: Json) -> Any:
    """The default as a spec has it: of some keys it depends on others."""
    if key == "lr_end":
        tenth = spec["learning_rate"] / 10
        return spec[key] if math.isclose(spec[key], tenth) else tenth
    if key == "lr_scheduler":
        return "constant" if OPTIMIZER_KINDS[spec["optimizer"]].averages else "cosine"
    return {"max_train_steps": 1000, "sizes": str(default)}.get(key, default)


def _text(value: Any) -> str:
    """A value for people; without quotation marks, which only the run file needs."""
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    if isinstance(value, bool) or not isinstance(value, float):
        return (
            "unset"
            if value is None or value == ""
            else value
            if isinstance(value, str)
            else json.dumps(value, ensure_ascii=False)
        )
    return f"{value:g}"
