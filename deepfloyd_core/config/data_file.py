"""Reads the data file: which entries count, which keys are ignored or refused, and which entries need each other.

Of a disabled entry only the id is read, so that a file for other tools, or an unfinished one, does not stop the run.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from deepfloyd_core.config.base import SpecT, parse_spec, read_config_file, scalar_kinds, shown
from deepfloyd_core.config.data_sets import TABLES, ConditioningSet, ImageDataset, TextEmbedBackend
from deepfloyd_core.config.simpletuner import coerced, grouped
from deepfloyd_core.config.simpletuner_data import DATA_IGNORED, our_entry
from deepfloyd_core.errors import ConfigError, DeepFloydError, attempt, each_line

_NO: tuple[Any, ...] = (None, False, 0, "", [], {})
# Other kinds of entries: caches have no use here, the rest needs another pipeline.
_CACHES = ("image_embeds", "conditioning_image_embeds", "distillation_cache")
_OTHER_SETS = {
    "video": "IF makes pictures, not video",
    "audio": "IF makes pictures, not audio",
    "eval": "num_eval_images holds eval pictures out of each data set",
    "caption": "captions come with their pictures",
}
# An entry with these keys alone is a cache, although its other keys do not say so.
_CACHE_KEYS = ("id", "type", "disabled", "disable", "default", *DATA_IGNORED)


@dataclass(frozen=True)
class DataFile:
    """The contents of a data file, as far as it could be read. With faults it makes no run."""

    datasets: tuple[ImageDataset, ...]  # the enabled picture sets
    conditioning: tuple[ImageDataset, ...]  # the places of pairs for a ControlNet
    text_embeds: tuple[TextEmbedBackend, ...]
    notes: tuple[str, ...]  # one for each key that has no effect
    faults: tuple[DeepFloydError, ...]
    whole: bool  # whether every entry could be read, so that nothing is missing here


_Entry = ImageDataset | ConditioningSet | TextEmbedBackend


def load_data_file(path: Path, defaults: Mapping[str, Any] = MappingProxyType({})) -> DataFile:
    """Read a data file. `defaults`: values of a picture set for keys that its entry does not set.

    Unknown keys, values out of range and duplicate ids are faults of the result. Raises ConfigError for a file that is
    not a list of entries. Nothing that the file names is opened.
    """
    entries = read_config_file(path)
    if not isinstance(entries, list) or not entries:
        raise ConfigError(f"{path} must be a list of data sets (SimpleTuner's multidatabackend form).")
    faults: list[DeepFloydError] = []
    read: list[_Entry] = []
    notes: list[str] = []
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict):
            faults.append(ConfigError(f"{path}: entry {number} is {type(entry).__name__}; it must be an object."))
            continue
        name = entry.get("id")
        where = f"{path}: {name if isinstance(name, str) and name else f'entry {number}'}"
        parsed = attempt(faults, _parse_entry, entry, where, defaults, faults)
        if parsed is not None:
            read += [parsed[0]] if parsed[0] is not None else []
            notes += [f"{where}: {note}" for note in parsed[1]]
    datasets = tuple(entry for entry in read if isinstance(entry, ImageDataset))
    if not faults and not datasets:
        faults.append(ConfigError(f"{path} has no enabled data set of pictures."))
    whole = not faults
    conditioning = tuple(entry for entry in read if isinstance(entry, ConditioningSet))
    faults += map(ConfigError, _double_ids(path, entries))
    if whole:
        faults += map(ConfigError, _conditioning_faults(path, datasets, conditioning))
        notes += _unused_conditioning(path, datasets, conditioning)
    places = tuple(entry.pictures for entry in conditioning)
    backends = tuple(entry for entry in read if isinstance(entry, TextEmbedBackend))
    return DataFile(datasets, places, backends, tuple(notes), tuple(faults), whole)


def _parse_entry(
    entry: dict[str, Any], where: str, defaults: Mapping[str, Any], faults: list[DeepFloydError]
) -> tuple[_Entry | None, list[str]]:
    """The entry's model (None: it is disabled, a cache, or has faults, which are added) and its notes."""
    if not isinstance(entry.get("id"), str) or not entry["id"]:
        raise ConfigError(f"{where}: id is {shown('id', entry.get('id'))}; every entry needs a name of its own.")
    if _disabled(entry, where):
        return None, []
    kind = entry.get("dataset_type") or "image"
    if not isinstance(kind, str):
        told = shown("dataset_type", kind)
        raise ConfigError(f"{where}: dataset_type is {told}; it must be image, conditioning or text_embeds.")
    if kind in _CACHES:
        return None, [f"dataset_type {kind!r} is ignored; nothing is cached there in this pipeline"]
    if kind in _OTHER_SETS:
        raise ConfigError(f"{where}: dataset_type is {kind!r}, but {_OTHER_SETS[kind]}. Remove or disable the entry.")
    if kind not in ("image", "text_embeds", "conditioning"):
        raise ConfigError(f"{where}: dataset_type is {kind!r}; it must be image, conditioning or text_embeds.")
    if kind == "conditioning":
        return _parse_conditioning(entry, where, faults)
    if kind == "text_embeds":
        return _parse_texts(entry, where, faults)
    if entry.get("type", "local") == "local" and all(key in _CACHE_KEYS for key in entry):
        return None, ["it has no pictures, and is ignored as a cache of another tool"]
    rest, notes = our_entry(entry, ImageDataset, where, faults)
    taken = [key for key in defaults if key not in rest]
    notes += [f"{', '.join(sorted(taken))} as in the run file"] if taken else []
    dataset = _parsed(ImageDataset, {**defaults, **rest}, where, faults)
    return dataset, notes + (_useless(entry, dataset) if dataset else [])


def _parsed(model: type[SpecT], values: dict[str, Any], where: str, faults: list[DeepFloydError]) -> SpecT | None:
    try:
        return parse_spec(model, values, where)
    except ConfigError as error:
        faults += each_line(error)
        return None


def _parse_texts(
    entry: dict[str, Any], where: str, faults: list[DeepFloydError]
) -> tuple[TextEmbedBackend | None, list[str]]:
    """The entry's model, and notes on its place, which has no effect: text embeds are in the workspace."""
    place = sorted(key for key in entry if key.startswith("aws_"))
    own = {key: value for key, value in entry.items() if key not in place}
    rest, notes = our_entry(own, TextEmbedBackend, where, faults)
    notes += grouped({"text embeds are in the workspace": place}, "")
    return _parsed(TextEmbedBackend, rest, where, faults), notes


def _parse_conditioning(
    entry: dict[str, Any], where: str, faults: list[DeepFloydError]
) -> tuple[ConditioningSet | None, list[str]]:
    """The entry's model, and notes on keys of picture sets that stand in it: its pictures are cropped as theirs are."""
    own = ConditioningSet.model_fields
    of_sets = [key for key in entry if key not in own and key in ImageDataset.model_fields]
    kept = {key: value for key, value in entry.items() if key not in of_sets}
    rest, notes = our_entry(kept, ConditioningSet, where, faults)
    notes += grouped({"a conditioning picture is cropped and resized like its picture": of_sets}, "")
    return _parsed(ConditioningSet, rest, where, faults), notes


def _conditioning_faults(
    path: Path, datasets: tuple[ImageDataset, ...], conditioning: tuple[ConditioningSet, ...]
) -> Iterator[str]:
    """Sets that do not name each other."""
    known = ", ".join(repr(entry.id) for entry in conditioning) or "none"
    users = {dataset.id: dataset.conditioning_data for dataset in datasets}
    for name, used in users.items():
        if used is not None and used not in [entry.id for entry in conditioning]:
            yield (
                f"{path}: {name}: conditioning_data is {used!r}; enabled entries of dataset_type conditioning: {known}. "
                "Use one of these, or remove it."
            )
    for entry in conditioning:
        source = entry.source_dataset_id
        if source is not None and users.get(source) != entry.id:
            yield (
                f"{path}: {entry.id}: source_dataset_id is {source!r}, and no enabled picture set of that id has "
                f"conditioning_data = {entry.id!r}. Set it there, or remove source_dataset_id."
            )


def _unused_conditioning(
    path: Path, datasets: tuple[ImageDataset, ...], conditioning: tuple[ConditioningSet, ...]
) -> list[str]:
    """A note for each entry that no picture set names."""
    used = {dataset.conditioning_data for dataset in datasets}
    return [f"{path}: {entry.id}: has no effect: no picture set names it as conditioning_data"
            for entry in conditioning if entry.id not in used]  # fmt: skip


def _disabled(entry: dict[str, Any], where: str) -> bool:
    flags = coerced({key: entry[key] for key in ("disabled", "disable") if key in entry}, scalar_kinds(ImageDataset))
    for key, value in flags.items():
        if not isinstance(value, bool):
            raise ConfigError(f"{where}: {key} is {shown(key, value)}; it must be true or false.")
    if len(set(flags.values())) > 1:
        raise ConfigError(f"{where}: disabled and disable contradict each other. Keep one of them.")
    return any(flags.values())


def _useless(entry: dict[str, Any], dataset: ImageDataset) -> list[str]:
    """Notes on keys that the entry sets and that another of its keys leaves without effect."""
    found: dict[str, str] = {}
    if not dataset.crop:
        keys = ("crop_aspect", "crop_style", "maximum_image_size", "target_downsample_size")
        found |= dict.fromkeys(keys, "crop is false")
    if not dataset.crop or dataset.crop_aspect not in ("closest", "random"):
        found["crop_aspect_buckets"] = "only closest and random use it"
    if dataset.maximum_image_size is None:
        found.setdefault("target_downsample_size", "maximum_image_size is not set")
    if dataset.caption_strategy not in TABLES:
        found["parquet"] = f"caption_strategy is {dataset.caption_strategy}"
    notes = [f"{key} has no effect: {why}" for key, why in found.items() if entry.get(key) not in _NO]
    random = dataset.crop_aspect == "random" or dataset.crop_style == "random"
    if dataset.crop and random and dataset.repeats + 1 > dataset.random_crops:
        notes.append(
            f"an epoch shows each picture {dataset.repeats + 1:,} times, in {dataset.random_crops} random crops by "
            "turns; raise random_crops to store more"
        )
    shuffle = dataset.caption_shuffle
    if shuffle and shuffle.enable and dataset.repeats < shuffle.count:
        notes.append(
            f"caption_shuffle makes {shuffle.count} orders of a caption, and repeats = {dataset.repeats} uses "
            f"{dataset.repeats + 1} captions of a picture; raise repeats to see more of them"
        )
    return notes


def _double_ids(path: Path, entries: list[Any]) -> Iterator[str]:
    ids = [entry["id"] for entry in entries if isinstance(entry, dict) and isinstance(entry.get("id"), str)]
    for name, count in Counter(ids).items():
        if name and count > 1:
            yield f"{path}: the id {name!r} is used {count} times; ids must differ."
