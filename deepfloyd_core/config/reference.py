"""docs/config.md, written from the configuration models: `python -m deepfloyd_core.config.reference > docs/config.md`."""

import sys
from collections.abc import Iterable, Iterator
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from deepfloyd_core.config.base import Spec
from deepfloyd_core.config.data_blocks import AspectBucket, CaptionShuffle, CaptionTable
from deepfloyd_core.config.data_sets import ConditioningSet, ImageDataset, TextEmbedBackend
from deepfloyd_core.config.keys import Reader, effect_of
from deepfloyd_core.config.run import GROUPS as RUN_GROUPS
from deepfloyd_core.config.run import RunConfig
from deepfloyd_core.config.simpletuner_data import DATA_ALIASES, DATA_IGNORED, DATA_REFUSED
from deepfloyd_core.config.simpletuner_options import ALIASES, DATA_DEFAULTS, IGNORED, REFUSED, SWITCHES, WORKS, Refusal
from deepfloyd_core.config.source_keys import SourceKeys
from deepfloyd_core.config.stage import GROUPS as STAGE_GROUPS
from deepfloyd_core.config.stage import StageConfig
from deepfloyd_core.config.stage3 import Stage3Config
from deepfloyd_core.config.stages import STAGES

_TABLES = " and ".join(f"`[{kind.table}]`" for kind in STAGES.values())
_MODEL_TYPES = ", ".join(f"`{name}`" for kind in STAGES.values() for name in kind.model_types)
_SECTIONS: tuple[tuple[str, type[Spec], str], ...] = (
    ("The run file", RunConfig, "Top level of the TOML or JSON file."),
    (
        "Stage settings",
        StageConfig,
        f"In {_TABLES}, or at the top level for each of them. A file without these tables trains the one stage that its "
        f"`model_type` ({_MODEL_TYPES}) or `model_flavour` names.",
    ),
    (
        "Stage III",
        Stage3Config,
        "In `[stage3]`. It is sampled and not trained, by `generate --stages 1-3` and `upscale --stage 3`; without this "
        "table `generate --stages 1-3` enlarges by Lanczos.",
    ),
    (
        "Picture sets of the data file",
        ImageDataset,
        "Entries of the JSON list that `data_backend_config` names; [data.md](data.md) describes how they combine.",
    ),
    (
        "Caption table",
        CaptionTable,
        "The block `parquet` of a picture set; a change of the captions rebuilds the index.",
    ),
    ("Shuffled tags", CaptionShuffle, "The block `caption_shuffle` of a picture set; a change rebuilds the index."),
    ("Weighted shapes", AspectBucket, "An entry of `crop_aspect_buckets`, in place of a number."),
    (
        "Conditioning pictures",
        ConditioningSet,
        "Entries that `conditioning_data` names, see [data.md](data.md#pictures-for-a-controlnet-to-follow). The "
        "keys of picture sets for a place apply; other keys of picture sets are reported as ignored.",
    ),
    ("Text embeds in the data file", TextEmbedBackend, "Accepted so that SimpleTuner's files work unchanged."),
)

_GROUPS: dict[type[Spec], tuple[type[Spec], ...]] = {RunConfig: RUN_GROUPS, StageConfig: STAGE_GROUPS}


# Who reads a key, in words.
_WORDS: dict[Reader, str] = {
    "all": "artifacts that use it", "content": "artifacts whose input differs",
    "verdict": "index (all pictures are decoded again)",
    "index": "index", "pixels": "crops", "eval_set": "held-out pictures", "embeds": "embeds",
    "low_res": "Stage I's remakes for Stage II", "lora": "LoRA", "validation": "LoRA if it has validations",
    "samples": "samples", "generated": "generated pictures",
}  # fmt: skip
_MORE: dict[Reader, tuple[Reader, ...]] = {
    "verdict": ("index",),
    "lora": ("validation",),
}  # what says less than another

_SIMPLETUNER = (
    "SimpleTuner's `config.json`, or its older `config.env`, works unchanged as a run file: leading dashes are "
    "dropped, numbers and truth values may be text, empty and null options count as unset, and `output_dir` replaces "
    "a missing `workspace`. An unsupported option that would change the training is refused unless it is off; an "
    "option that only sets how SimpleTuner runs, or what it shows, is ignored with a note. "
    "`benchmarks/simpletuner_files.py FOLDER` tries all files of a folder."
)


def render() -> str:
    """The whole page as Markdown."""
    lines = ["# Configuration", "", "Generated from the configuration models; `make docs` rewrites it.", ""]
    lines += [
        "Relative paths start at the current directory if the data file is there, else at the nearest folder, from "
        "the run file's folder upwards, that contains it; paths of `--set` at the current directory; `~/` at the "
        "home folder. Every key can be overridden, `--set stage1.lora_rank=8`, or removed, `--set "
        "stage1.lora_rank=`; `--set lora_rank=8` sets it for every stage, also over the values in their tables.",
        "",
        "The last column lists what a run rebuilds after a change of the key, together with all artifacts made from "
        "it: index, crops, embeds, LoRA, samples, bundle. All others are reused, also those made before the change.",
        "",
    ]
    for title, model, intro in _SECTIONS:
        lines += [f"## {title}", "", intro, ""]
        for heading, fields in _grouped(model):
            lines += [f"### {heading}", ""] if heading else []
            lines += ["| key | type | default | meaning | a change rebuilds |", "|---|---|---|---|---|"]
            lines += [_row(name, field) for name, field in fields.items() if not _is_said(model, name)]
            lines.append("")
    return "\n".join([*lines, *_simpletuner()])


def _grouped(model: type[Spec]) -> Iterator[tuple[str, dict[str, FieldInfo]]]:
    """The keys of a model that are in none of its groups, and those of each group under its heading."""
    groups = _GROUPS.get(model, ())
    grouped = {name for group in groups for name in group.model_fields}
    if own := {name: field for name, field in model.model_fields.items() if name not in grouped}:
        yield "", own
    for group in groups:
        yield (group.__doc__ or "").rstrip("."), dict(group.model_fields)


def _simpletuner() -> list[str]:
    """The answers to SimpleTuner's options, a line for each reason."""
    rows: list[tuple[str, Iterable[str], str]] = [
        ("works", WORKS, ""),
        ("works", DATA_DEFAULTS, "for the picture sets that do not set it"),
    ]
    rows += [("alias", [theirs], f"`{name}`") for theirs, name in ALIASES.items()]
    rows += [
        ("alias", [theirs], f"at `{_plain(at)}`: `{name}` = `{_plain(meaning)}`; else ignored")
        for theirs, (at, name, meaning) in SWITCHES.items()
    ]
    for reason in dict.fromkeys(IGNORED.values()):
        rows.append(("ignored", [name for name, why in IGNORED.items() if why == reason], reason))
    for refusal in dict.fromkeys(REFUSED.values()):
        rows.append(("refused", [name for name, own in REFUSED.items() if own == refusal], _exceptions(refusal)))
    rows += [("in the data file: alias", [theirs], f"`{name}`") for theirs, name in DATA_ALIASES.items()]
    for reason in dict.fromkeys(DATA_IGNORED.values()):
        names = [name for name, why in DATA_IGNORED.items() if why == reason]
        rows.append(("in the data file: ignored", names, reason))
    for refusal in dict.fromkeys(DATA_REFUSED.values()):
        names = [name for name, own in DATA_REFUSED.items() if own == refusal]
        rows.append(("in the data file: refused", names, _exceptions(refusal)))
    head = ["## SimpleTuner's options", "", _SIMPLETUNER, "", "| answer | options | why |", "|---|---|---|"]
    return [*head, *(f"| {answer} | {_listed(names)} | {why} |" for answer, names, why in rows), ""]


def _listed(names: Iterable[str]) -> str:
    return " ".join(f"`{name}`" for name in sorted(names))


def _exceptions(refusal: Refusal) -> str:
    """A refusal's reason, and the values that are not refused."""
    at = f", at {_listed(str(value) for value in refusal.off)}" if refusal.off else ""
    within = f", without `{' = '.join(refusal.within)}`" if refusal.within else ""
    return f"{refusal.reason}; ignored when off{at}{within}"


def _is_said(model: type[Spec], name: str) -> bool:
    """Whether a key of a place is explained at the picture sets."""
    return model is ConditioningSet and name in SourceKeys.model_fields and name not in ("id", "type")


def _row(name: str, field: FieldInfo) -> str:
    default = "required" if field.default is PydanticUndefined else f"`{_plain(field.default)}`"
    meaning = (field.description or "") + _bounds(field)
    return f"| `{name}` | {_type(field.annotation)} | {default} | {meaning} | {_made_anew(field)} |"


def _made_anew(field: FieldInfo) -> str:
    effect = effect_of(field)
    if effect is None:
        return ""  # a table, whose keys say it, or a key of one that is read as a whole
    told = {less for more, lesser in _MORE.items() if more in effect.makes for less in lesser}
    return ", ".join(word for name, word in _WORDS.items() if name in {*effect.makes} - told) or "nothing"


def _plain(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(str(part) for part in value) or "[]"
    return "unset" if value is None else str(value) or '""'


def _type(annotation: Any) -> str:
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " or ".join(f"`{part}`" for part in parts)
    if origin is tuple:
        return f"list of {_type(parts[0])}"
    if parts and hasattr(annotation, "__metadata__"):
        return _type(parts[0])
    if parts:
        return " or ".join(_type(part) for part in parts if part is not type(None))
    if isinstance(annotation, type) and issubclass(annotation, Spec):
        return "table"
    names = {"str": "string", "int": "integer", "float": "number", "bool": "true or false"}
    return names.get(annotation.__name__, str(annotation.__name__))


def _bounds(field: FieldInfo) -> str:
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    found = [
        f"{sign} {getattr(rule, name)}"
        for rule in field.metadata
        for name, sign in signs.items()
        if hasattr(rule, name)
    ]
    return f" ({', '.join(found)})" if found else ""


if __name__ == "__main__":
    sys.stdout.write(render())
