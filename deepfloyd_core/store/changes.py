"""How an artifact differs from the last one of its kind, in the user's words: keys of the run file and the data file."""

import json
import math
import re
from collections.abc import Iterator
from typing import Any

from deepfloyd_core.config.run import RunConfig
from deepfloyd_core.config.stage3 import TABLE, TITLE
from deepfloyd_core.config.stages import STAGES, StageKind
from deepfloyd_core.types import Json

DRAWN = frozenset(("generated", "upscaled", "compared"))  # pictures for people, from which nothing is made
_LONGEST = 60  # characters of a value
_ARTIFACT = re.compile(r"(\w+)/[0-9a-f]{16}")
# Keys of a spec that have another name in the run file.
_NAMES = {
    "prompts": "validation_prompt", "sizes": "validation_resolution", "negative_prompt": "validation_negative_prompt",
    "images": "num_validation_images", "upscaled": "num_upscaled_images", "measure": "sample_measure",
    "strength": "low_res_stage1_strength", "back_projection": "validation_back_projection",
}  # fmt: skip
# Those that stand outside of a stage's table, in a LoRA's spec too.
_OF_RUN = {*RunConfig.model_fields, "prompts", "sizes", "negative_prompt", "images", "upscaled", "cleaner"}
_PHRASES = {
    "captions": "captions or prompts changed", "captions_sha256": "captions or prompts changed",
    "encoder": "text encoder changed", "faces": "crop_style = face added or removed",
    "asked": "other pictures are asked for",
    "columns": "this version of the program measures differently",
    "paired": "controlnet_conditioning = paired added or removed", "reads_heif": "HEIF support added or removed",
}  # fmt: skip
# Keys of what a command draws that are options of it: their names where these differ, and those whose values are hashes or
# texts. The shares of a style are the program's own.
_FLAGS = {"loras": "lora", "versions": "compare", "style_shares": "style"}
_FILES_OF_OPTIONS = {"control", "image", "mask", "loras", "style", "style_shares"}
_OPTIONS = {(key,) for key in ("version", "versions", "strength", "seed", *_FILES_OF_OPTIONS)}
_FILES = {
    "data": "pictures or captions changed", "pictures": "pictures or captions changed",
    "pairs": "conditioning pictures changed", "eval_set": "held-out pictures changed",
    "text": "the encoding of captions changed", "text_embeds": "the encoding of captions changed",
    "encoder": "text encoder changed", "parent": "init_lora changed", "bundle": "the bundle of --version changed",
}  # fmt: skip


def label(kind: str) -> str:
    """An artifact's kind as people read it: `Stage I LoRA`."""
    for stage in STAGES.values():
        kind = kind.replace(stage.table, stage.title)
    return kind.replace("_", " ").replace("lora", "LoRA")


def changes(kind: str, old: Json, new: Json) -> list[str]:
    """How the format, spec and inputs of two artifacts of a kind differ: a phrase for each, at least one.

    Of pictures that a command draws, its options are named.
    """
    found = ["this version of the program builds it differently"] if old["format"] != new["format"] else []
    differ = list(_differences(old["spec"], new["spec"]))
    if found:  # a key that only one of them has may be the program's own
        differ = [change for change in differ if None not in change[1:]]
    found += [_setting(kind, *change) for change in differ if not _follows(change[0], old["spec"], new["spec"])]
    for name in sorted(old["inputs"].keys() | new["inputs"].keys()):
        found += _input(name, old["inputs"].get(name), new["inputs"].get(name))
    return list(dict.fromkeys(phrase for phrase in found if phrase)) or ["its settings changed"]


def _differences(old: Json, new: Json, path: tuple[str, ...] = ()) -> Iterator[tuple[Any, Any, Any]]:
    """The path and both values of each difference; None for a missing value."""
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            yield from _differences(before, after, (*path, key))
        elif before != after:
            yield (*path, key), before, after


def _setting(kind: str, path: tuple[str, ...], before: Any, after: Any) -> str:
    """What differs in a value of a spec; empty for one that another one settles."""
    key = path[-1]
    if kind in DRAWN and path in _OPTIONS:
        return _option(key, before, after)
    if key == "stages":
        came, went = [each for each in after if each not in before], [each for each in before if each not in after]
        return ", ".join([f"stage {each} added" for each in came] + [f"stage {each} removed" for each in went])
    own = next((kind for kind in STAGES.values() if kind.table == key), None)
    if own and (before is None or after is None):
        return f"stage {own.number} {'added' if before is None else 'removed'}"
    if key == TABLE:
        return f"{TITLE} {'added' if before is None else 'removed' if after is None else 'changed'}"
    if path[0] == "shares" or (len(path) > 1 and path[-2] == "datasets"):
        return _data_set(key, before, after)
    if key in _PHRASES:
        return _PHRASES[key]
    if key == "validation":  # with all that belongs to it
        key = "validation_step_interval"
        before, after = (value and value[key] for value in (before, after))
    return f"{user_key(kind, (*path[:-1], key))} {_value(before)} -> {_value(after)}"


def rebuilt(kind: str) -> str:
    """What an artifact is beside the last one of its kind: pictures for people replace no others."""
    return "other than the last ones" if kind in DRAWN else "rebuilt"


def _option(key: str, before: Any, after: Any) -> str:
    """What differs in an option of a command; empty for one that another one settles."""
    flag = f"--{_FLAGS.get(key, key)}"
    if key in _FILES_OF_OPTIONS:
        return f"{flag} {'added' if before is None else 'removed' if after is None else 'changed'}"
    if before is None or after is None:
        return ""  # the strength, with its picture
    return f"{flag} {_value(before)} -> {_value(after)}".replace('"', "")


def _follows(path: tuple[str, ...], old: Json, new: Json) -> bool:
    """Whether a value follows from the learning rate when nobody sets it."""
    if path != ("lr_end",) or not (old.get("learning_rate") and new.get("learning_rate")):
        return False
    return math.isclose(old["lr_end"] / old["learning_rate"], new["lr_end"] / new["learning_rate"])


def user_key(kind: str, path: tuple[str, ...]) -> str:
    """The name in the user's files of a key of a kind's spec."""
    key = path[-1]
    if "datasets" in path and key != "seed":
        return ".".join(path[path.index("datasets") + 1 :])
    if key == "seed" and (kind == "cascade_samples" or path[0] == "validation"):
        return "validation_seed"
    name, stage = _NAMES.get(key, key), _stage(path[0]) or _stage(kind)
    if path[0] == TABLE:
        return f"{TABLE}.{name}"
    if stage and stage.is_upscaler and path == ("validation", "images"):
        return "num_upscaled_images"
    if key in _OF_RUN or stage is None:
        return name
    if kind.endswith("_low_res") and key != "strength":  # of the stage that samples the low-res pictures
        return f"stage{stage.upscales}.{name}"
    return f"{stage.table}.{name}"


def _stage(name: str) -> StageKind | None:
    """The stage that a key or a kind names first."""
    return next((kind for kind in STAGES.values() if re.fullmatch(rf"{kind.table}(_\w+)?", name)), None)


def _data_set(name: str, before: Any, after: Any) -> str:
    """A data set that was added or removed, or a change of how it takes turns with others."""
    if before is None or after is None:
        return f"data set {name} {'added' if before is None else 'removed'}"
    turns = zip(("probability", "start_step", "end_step"), before, after, strict=True)
    return ", ".join(f"{name}.{key} {_value(was)} -> {_value(now)}" for key, was, now in turns if was != now)


def _value(value: Any) -> str:
    text = (
        "unset"
        if value is None
        else f"{value:g}"
        if isinstance(value, float)
        else json.dumps(value, ensure_ascii=False)
    )
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _input(name: str, before: str | None, after: str | None) -> list[str]:
    """The change of an artifact's input, in words; empty if it is reported with another change."""
    if before == after:
        return []
    became = "added" if before is None else "removed" if after is None else "changed"
    if artifact := _ARTIFACT.fullmatch(after or before or ""):
        return [f"{label(artifact[1])} {became}"]
    if name.startswith("of "):  # what is compared
        return ["what is compared changed"]
    if name in RunConfig.model_fields:  # weights of a network that measures, by the key that names them
        return [f"{name} {became}"]
    if name.endswith(("_pictures", "_held_out")) and (before is None or after is None):
        return []  # with their stage
    if name.endswith(("_pictures", "_held_out")):
        return ["held-out pictures changed"]
    if name == f"{TABLE}_model":
        return [f"model of {TITLE} changed"] if before and after else []  # else it is with its stage
    if name in ("model", "unet") or name.endswith("_model"):
        of = f" of stage {own.number}" if (own := _stage(name)) else ""
        return [f"base model{of} changed"] if before and after else []  # else it is with its stage
    return [_FILES.get(name, f"{name} changed")]
