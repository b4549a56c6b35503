"""A configuration key and its effects, declared in one place.

`key` replaces pydantic's `Field`. It declares which artifacts read the key: a change of the key rebuilds these
artifacts and all that are made from them. The artifacts' identities (`read_by`) and docs/config.md are computed from
this. It also declares with which values of other keys the key has an effect: a key that is set without them is refused
(`idle_faults`).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from pydantic import Field
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from deepfloyd_core.config.base import Spec
from deepfloyd_core.config.stages import STAGES, Stage, tables
from deepfloyd_core.types import Json

# What reads a key. `verdict`: whether a picture can be used; a change decodes every picture again. `validation`: the LoRA,
# if its training makes pictures. `content`: the files at that place decide, not the key itself. `all`: a change makes
# another entry.
Reader = Literal[
    "all", "content", "verdict", "index", "pixels", "eval_set", "embeds", "low_res", "lora", "validation", "samples",
    "generated",
]  # fmt: skip
NOTHING: tuple[Reader, ...] = ()
LORA: tuple[Reader, ...] = ("lora",)
CONTENT: tuple[Reader, ...] = ("content",)
ENTRY: tuple[Reader, ...] = ("all",)
VERDICT: tuple[Reader, ...] = ("verdict", "index")
CROPS: tuple[Reader, ...] = (*VERDICT, "pixels", "eval_set")
EVERY_STAGE: tuple[Stage, ...] = tuple(STAGES)
_FOR_ALL = ("validation_noise_level",)  # may stand at the top level of a file with all stages, as in SimpleTuner's


@dataclass(frozen=True)
class Effect:
    """What a key affects."""

    makes: tuple[Reader, ...]  # what a change of it rebuilds
    stages: tuple[Stage, ...]  # those that use it
    only_with: Mapping[str, tuple[object, ...]]  # the values of other keys that it has an effect with


def key(
    default: Any = PydanticUndefined, *, says: str, makes: tuple[Reader, ...], stages: tuple[Stage, ...] = EVERY_STAGE,
    only_with: Mapping[str, tuple[object, ...]] | None = None, **rules: Any,
) -> Any:  # fmt: skip
    """A field of a configuration model. `says`: its help; `rules`: bounds and the like, as pydantic's `Field` takes them."""
    field: FieldInfo = Field(default, description=says, **rules)
    field.metadata.append(Effect(makes, stages, only_with or {}))
    return field


def effect_of(field: FieldInfo) -> Effect | None:
    """What a key affects; None for a table, whose own keys declare it."""
    return next((part for part in field.metadata if isinstance(part, Effect)), None)


@cache
def effects(model: type[Spec]) -> dict[str, Effect]:
    """The effect of each key of a model."""
    found = {name: effect_of(field) for name, field in model.model_fields.items()}
    return {name: effect for name, effect in found.items() if effect is not None}


def keys_of(model: type[Spec], reader: Reader, stage: Stage | None = None) -> frozenset[str]:
    """The keys that a reader depends on: those of every stage and, if a stage is given, those of that stage."""
    return frozenset(
        name
        for name, effect in effects(model).items()
        if reader in effect.makes and (effect.stages == EVERY_STAGE or stage in effect.stages)
    )


def read_by(config: Spec, reader: Reader, stage: Stage | None = None, group: type[Spec] | None = None) -> Json:
    """The keys that a reader depends on, with their values, as plain JSON: their part of an artifact's identity.

    group: only those of a group of the model's keys.
    """
    return config.model_dump(mode="json", include=set(keys_of(group or type(config), reader, stage)))


def belongings(model: type[Spec]) -> Iterator[tuple[str, str, tuple[object, ...]]]:
    """Each key that has an effect only with some values of another key: (key, other key, these values)."""
    for name, effect in effects(model).items():
        for other, values in effect.only_with.items():
            yield name, other, values


def is_changed(config: Spec, name: str) -> bool:
    """Whether a key has another value than its default."""
    return bool(getattr(config, name) != type(config).model_fields[name].default)


def idle_faults(config: Spec, values: Mapping[str, object]) -> Iterator[str]:
    """Each key that was changed but has no effect, once, with the key that would give it an effect.

    values: effective values of keys that have another meaning while they are unset.
    """
    told = set()
    for name, other, needed in belongings(type(config)):
        value, found = getattr(config, name), values.get(other, getattr(config, other))
        if is_changed(config, name) and found not in needed and name not in told:
            told.add(name)
            remedy = " or ".join(str(option) for option in needed)
            yield f"{name} is {value}, without effect while {other} is {found}. Remove it, or set {other} = {remedy}"


def other_stage_faults(config: Spec, stage: Stage, model: str) -> Iterator[str]:
    """Each changed key that belongs to other stages. model: what the stage's model is called."""
    for name, effect in effects(type(config)).items():
        value = getattr(config, name)
        if stage in effect.stages or name in _FOR_ALL or not is_changed(config, name):
            continue
        shown = list(value) if isinstance(value, tuple) else value
        yield f"{name} is {shown}, and {model} is a {STAGES[stage].title} model. Put it into {tables(effect.stages)}"
