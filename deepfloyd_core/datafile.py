"""The data file: SimpleTuner's `multidatabackend.json`, read unchanged.

A list of entries; an entry without `dataset_type` (or with "image") is a set of pictures, "text_embeds" names the
embed backend. A picture set has one resolution: up to 128 px it feeds Stage I at that size and Stage II at four times
the size with every pixel length multiplied by four; above that it feeds Stage II only.
"""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from deepfloyd_core.errors import ConfigError
from deepfloyd_core.flavours import UPSCALE, Stage
from deepfloyd_core.spec import Spec, parse_spec, read_config_file

STAGE1_MAX_PX = 128

# Keys of SimpleTuner's data file that change nothing here: accepted, and reported as ignored.
IGNORED = frozenset({
    "cache_dir_vae", "vae_cache_clear_each_epoch", "metadata_backend", "skip_file_discovery", "write_batch_size",
    "preserve_data_backend_cache", "text_embeds", "image_embeds", "hash_filenames", "cache_dir", "scan_for_errors",
    "delete_unwanted_images", "delete_problematic_images", "is_regularisation_data",
})  # fmt: skip
# Keys that ask for something this pipeline does not do: refused, with the reason.
REFUSED = {
    "conditioning_data": "ControlNet conditioning is not supported yet",
    "video": "IF makes pictures, not video",
    "audio": "IF makes pictures, not audio",
}


class ImageDataset(Spec):
    """One set of captioned pictures."""

    id: str = Field(min_length=1, description="Name of the data set; part of every ledger row.")
    type: Literal["local"] = Field(description="Where the pictures are. `local`: a directory on this machine.")
    dataset_type: Literal["image"] = Field("image", description="This entry holds pictures.")
    instance_data_dir: str = Field(description="Directory of the pictures, searched recursively.")
    disabled: bool = Field(False, description="Leave this entry out of the run.")
    disable: bool = Field(False, description="Older spelling of `disabled`.")

    resolution: int = Field(64, ge=8, le=2048, description="Edge of the training pictures, in pixels.")
    resolution_type: Literal["pixel"] = Field("pixel", description="Unit of the sizes: `pixel`, the shorter edge.")
    minimum_image_size: int | None = Field(None, ge=1, description="Both edges must be at least this, in pixels.")
    maximum_image_size: int | None = Field(
        None, ge=1, description="A picture whose shorter edge is above this (px) is first brought down to the target."
    )
    target_downsample_size: int | None = Field(
        None, ge=1, description="Shorter edge (px) that an oversized picture is brought down to, in steps of 25 %."
    )
    crop: bool = Field(True, description="Crop to the training size.")
    crop_aspect: Literal["square"] = Field("square", description="Shape of the crop: `square`.")
    crop_style: Literal["center", "random", "corner"] = Field(
        "center", description="Where the crop is taken. `random` is seeded by (seed, picture, repeat)."
    )
    repeats: int = Field(0, ge=0, le=10_000, description="Extra passes over each picture; n + 1 rows are made of it.")

    caption_strategy: Literal["textfile", "filename", "instanceprompt"] = Field(
        "filename", description="Where the caption comes from: NAME.txt, the file's name, or `instance_prompt`."
    )
    instance_prompt: str | None = Field(None, description="Caption of every picture, or its prefix.")
    prepend_instance_prompt: bool = Field(False, description="Put `instance_prompt` before each caption.")
    only_instance_prompt: bool = Field(False, description="Use `instance_prompt` alone, whatever the strategy.")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.crop:
            raise ValueError("crop is false; this version prepares square crops only. Set crop = true")
        if (self.maximum_image_size is None) != (self.target_downsample_size is None):
            raise ValueError("maximum_image_size and target_downsample_size go together; set both or neither")
        if self.target_downsample_size is not None and self.target_downsample_size < self.resolution:
            raise ValueError(
                f"target_downsample_size is {self.target_downsample_size}, below resolution {self.resolution}: "
                "the crop would not fit. Raise it to the resolution or more"
            )
        if (
            self.target_downsample_size is not None
            and self.maximum_image_size is not None
            and self.target_downsample_size > self.maximum_image_size
        ):
            raise ValueError("target_downsample_size is above maximum_image_size: nothing is ever upsampled")
        needs_prompt = self.only_instance_prompt or self.prepend_instance_prompt
        if (needs_prompt or self.caption_strategy == "instanceprompt") and not (self.instance_prompt or "").strip():
            raise ValueError("instance_prompt is missing, and the caption settings need it")
        return self

    def factor(self, stage: Stage) -> int | None:
        """By what the pixel lengths of this data set are multiplied for a stage; None: it does not feed the stage."""
        if stage == 1:
            return 1 if self.resolution <= STAGE1_MAX_PX else None
        return UPSCALE if self.resolution <= STAGE1_MAX_PX else 1


class TextEmbedBackend(Spec):
    """The entry that stands for the text embeds. They live in the workspace, so its place is only reported."""

    id: str = Field(min_length=1, description="Name of the entry.")
    dataset_type: Literal["text_embeds"] = Field(description="This entry stands for text embeds.")
    type: Literal["local"] = Field("local", description="Kind of storage.")
    default: bool = Field(False, description="Whether data sets use it by default.")
    disabled: bool = Field(False, description="Leave this entry out of the run.")
    disable: bool = Field(False, description="Older spelling of `disabled`.")


def load_data_file(path: Path) -> tuple[tuple[ImageDataset, ...], list[str]]:
    """Read a data file: the enabled picture sets, and one note for each key that is ignored.

    Raises ConfigError for unknown keys, values out of range, double ids, a directory that is not there.
    """
    entries = read_config_file(path)
    if not isinstance(entries, list) or not entries:
        raise ConfigError(f"{path} must be a list of data sets (SimpleTuner's multidatabackend form).")
    datasets, notes = [], []
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise ConfigError(f"{path}: entry {number} is {type(entry).__name__}; it must be an object.")
        where = f"{path}: {entry.get('id', f'entry {number}')}"
        dataset, ignored = _parse_entry(entry, where)
        notes += [f"{where}: {key} is ignored; it has no effect in this pipeline" for key in ignored]
        if isinstance(dataset, ImageDataset) and not (dataset.disabled or dataset.disable):
            datasets.append(dataset)
    _check_together(path, datasets)
    return tuple(datasets), notes


def _parse_entry(entry: dict[str, Any], where: str) -> tuple[ImageDataset | TextEmbedBackend, list[str]]:
    for key, reason in REFUSED.items():
        if entry.get(key):
            raise ConfigError(f"{where}: {key} is set, but {reason}. Remove the key.")
    ignored = sorted(key for key in entry if key in IGNORED)
    rest = {key: value for key, value in entry.items() if key not in IGNORED and key not in REFUSED}
    if entry.get("dataset_type") == "text_embeds":
        return parse_spec(TextEmbedBackend, rest, where), ignored
    return parse_spec(ImageDataset, rest, where), ignored


def _check_together(path: Path, datasets: list[ImageDataset]) -> None:
    if not datasets:
        raise ConfigError(f"{path} has no enabled data set of pictures.")
    ids = [dataset.id for dataset in datasets]
    for name in ids:
        if ids.count(name) > 1:
            raise ConfigError(f"{path}: the id {name!r} is used {ids.count(name)} times; ids must differ.")
    for dataset in datasets:
        if not Path(dataset.instance_data_dir).is_dir():
            raise ConfigError(
                f"{path}: {dataset.id}: instance_data_dir is {dataset.instance_data_dir!r}, which is not a directory. "
                "Relative paths start at the current directory."
            )
