"""SimpleTuner's keys for the entries of its data file, with the same four answers as in `simpletuner_options`.

A key that the models of `data_sets` have works. Here are the other keys: other names for those, ignored ones, refused
ones.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from deepfloyd_core.config.base import Spec, scalar_kinds, shown
from deepfloyd_core.config.data_sets import ImageDataset
from deepfloyd_core.config.simpletuner import coerced, grouped, is_off
from deepfloyd_core.config.simpletuner_options import Refusal
from deepfloyd_core.errors import ConfigError, DeepFloydError

DATA_ALIASES = {
    "instance_data_root": "instance_data_dir", "disable": "disabled", "description_column": "fallback_caption_column",
}  # fmt: skip
_KEEPING = "nothing is cached there, and originals are never touched"
_READING = "pictures are listed and read in this pipeline's own way"
_IGNORED = {
    _KEEPING: """
        cache cache_dir cache_dir_conditioning_image_embeds cache_dir_vae cache_file_suffix compress_cache
        conditioning_image_embed_batch_size conditioning_image_embeds delete_nsfw_images delete_problematic_images
        delete_unwanted_images disable_vae_cache hash_filenames image_embeds memory_filesystem_path memory_filesystem_size
        memory_filesystem_sudo preserve_data_backend_cache shorten_filenames text_cache_disable text_cache_ondemand
        vae_batch_size vae_cache_clear_each_epoch vae_cache_disable vae_cache_ondemand vae_cache_scan_behaviour
        """,
    _READING: """
        auto_load bucket_report composite_image_column disable_validation file_extension fps_column height_column
        ignore_epochs image_processing_batch_size max_workers metadata_backend metadata_update_interval num_frames_column
        num_proc quality_column read_batch_size scan_for_errors skip_file_discovery streaming text_encoder_batch_size
        width_column write_batch_size
        """,
    "every data set has the run file's train_batch_size": "train_batch_size",
}
DATA_IGNORED = {name: reason for reason, names in _IGNORED.items() for name in names.split()}
_OF_CONDITIONING = "it belongs to an entry of dataset_type conditioning, which conditioning_data names here"
_NO_VIDEO, _NO_AUDIO = "IF makes pictures, not video", "IF makes pictures, not audio"
_NO_BOXES = "boxes of entities are not supported"
_NO_PARENT = "a loss against the base model is not supported; without the key its pictures are trained"
_NO_GRID = "filters and grids of a saved data set are not supported; use rows as they are"
DATA_REFUSED = {
    "audio": Refusal(_NO_AUDIO),
    "audio_column": Refusal(_NO_AUDIO),
    "aws_session_token": Refusal("a temporary token is read from AWS_SESSION_TOKEN in the environment"),
    "bbox_column": Refusal(_NO_BOXES),
    "bucket_resolutions": Refusal("resolution sets the size of each shape"),
    "caption_file_extensions": Refusal("captions are read beside the pictures; docs/data.md lists their names",
                                       (".txt", "txt")),
    "composite_image_config": Refusal(_NO_GRID),
    "conditioning": Refusal("controlnet_conditioning sets how a ControlNet's conditioning is made; "
                            "conditioning_data has paired ones"),
    "conditioning_type": Refusal(_OF_CONDITIONING),
    "data_generator": Refusal("pictures are not generated here"),
    "end_epoch": Refusal("a data set's time is measured in optimizer steps; use end_step"),
    "filter_func": Refusal(_NO_GRID),
    "grounding": Refusal(_NO_BOXES),
    "hf_token": Refusal("a token is read from HF_TOKEN in the environment"),
    "is_i2v": Refusal(_NO_VIDEO),
    "is_regularisation_data": Refusal(_NO_PARENT),
    "is_regularization_data": Refusal(_NO_PARENT),
    "max_upscale_threshold": Refusal("nothing is ever upsampled: a shape that a picture cannot fill is not used for it"),
    "s2v_datasets": Refusal(_NO_VIDEO),
    "slider_strength": Refusal("slider training is not supported"),
    "source_dataset_id": Refusal(_OF_CONDITIONING),
    "split_composite_images": Refusal(_NO_GRID),
    "start_epoch": Refusal("a data set's time is measured in optimizer steps; use start_step", (1,)),
    "timestep_sampling_offset": Refusal("it shifts flow matching's timesteps; IF predicts epsilon"),
    "video": Refusal(_NO_VIDEO),
    "video_column": Refusal(_NO_VIDEO),
    "webshart": Refusal("tar shards are not supported"),
}  # fmt: skip
# Keys of the block `huggingface` that stand at the top of an entry here.
_COLUMNS = ("image_column", "caption_column", "fallback_caption_column", "dataset_name", "split", "revision")


def data_answer_of(key: str) -> str | None:
    """The answer to a key of an entry: works, alias, ignored or refused; None: it has no answer."""
    if key in DATA_ALIASES:
        return "alias"
    if key in DATA_IGNORED:
        return "ignored"
    if key in DATA_REFUSED:
        return "refused"
    return "works" if key in ImageDataset.model_fields or key == "huggingface" else None


def our_entry(
    entry: Mapping[str, Any], model: type[Spec], where: str, faults: list[DeepFloydError]
) -> tuple[dict[str, Any], list[str]]:
    """An entry of a data file with our keys and types, and the notes on the others; each refused key is added to `faults`.

    Raises ConfigError where two of its keys contradict each other.
    """
    entry = _without_block(_renamed(entry, where), where)
    known = model.model_fields
    faults += [ConfigError(f"{where}: {fault}") for fault in _refused(entry, frozenset(known))]
    ignored: dict[str, list[str]] = {}
    rest: dict[str, Any] = {}
    for key, value in entry.items():
        if key in known:
            rest |= {} if value is None else {key: value}
        elif key in DATA_IGNORED or key.startswith(("_", "/", "#")):
            ignored.setdefault(DATA_IGNORED.get(key, "read as comments"), []).append(key)
        elif key in DATA_REFUSED:
            ignored.setdefault("off, or always done here", []).append(key)
        else:
            rest[key] = value  # for the model to name
    return _entry_values(coerced(rest, scalar_kinds(model)), where), grouped(ignored, "")


def _entry_values(entry: dict[str, Any], where: str) -> dict[str, Any]:
    """Convert `conditioning_data` to one form: a list with one set becomes the set, an off value is removed."""
    given = entry.get("conditioning_data")
    if isinstance(given, list) and len(given) > 1:
        raise ConfigError(
            f"{where}: conditioning_data has {len(given)} sets; a ControlNet takes one conditioning picture. Keep one."
        )
    if isinstance(given, list) and given:
        entry["conditioning_data"] = given[0]
    if is_off(entry.get("conditioning_data")):
        entry.pop("conditioning_data", None)
    return entry


def _renamed(entry: Mapping[str, Any], where: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in entry.items():
        name = DATA_ALIASES.get(key, key) if key != "disable" else key  # of two flags the reader tells
        if name in found and found[name] != value:
            raise ConfigError(f"{where}: {key} and {name} are one key. Keep one of them.")
        found[name] = value
    return found


def _without_block(entry: dict[str, Any], where: str) -> dict[str, Any]:
    """The keys of an entry's block `huggingface` merged into the entry; the entry's own keys take precedence."""
    block = entry.get("huggingface")
    if not isinstance(block, dict):
        return {key: value for key, value in entry.items() if key != "huggingface" or not is_off(value)}
    rest = {key: value for key, value in entry.items() if key != "huggingface"}
    for key, value in _renamed(block, f"{where}: huggingface").items():
        if key not in (*_COLUMNS, *DATA_IGNORED, *DATA_REFUSED):
            raise ConfigError(f"{where}: huggingface.{key} is not a known key. Known keys: {', '.join(_COLUMNS)}.")
        if key in rest and rest[key] != value and key in _COLUMNS:
            raise ConfigError(
                f"{where}: {key} is {shown(key, rest[key])} and in the block huggingface {shown(key, value)}. "
                "Keep one of them."
            )
        rest.setdefault(key, value)
    return rest


def _refused(value: Any, known: frozenset[str] = frozenset()) -> Iterator[str]:
    """The refused keys, at any depth of an entry; `known` are no such keys at its top."""
    if not isinstance(value, dict):
        return
    for key, inner in value.items():
        refusal = DATA_REFUSED.get(key)
        switched_off = isinstance(inner, dict) and "enabled" in inner and is_off(inner["enabled"])
        if refusal and key not in known and not is_off(inner, refusal.off) and not switched_off:
            yield f"{key} is set, but {refusal.reason}. Remove the key."
        else:
            yield from _refused(inner)
