"""The data file's entries: SimpleTuner's `multidatabackend.json`, as frozen models.

An entry without `dataset_type` (or with "image") is a set of pictures, "text_embeds" stands for the embeds. A picture set
has one resolution: up to 128 px it feeds Stage I at that size and Stage II at four times the size with every length
multiplied by four; above that it feeds Stage II only. An entry with `dataset_type` "conditioning" has pictures for a
ControlNet to follow. `data_file.py` reads the file.
"""

import math
from typing import Annotated, Literal, Self

from pydantic import Field, SecretStr, model_validator

from deepfloyd_core.config.base import HomePath, NameOrPath, Spec
from deepfloyd_core.config.data_blocks import AspectBucket, CaptionShuffle, CaptionTable, Texts
from deepfloyd_core.config.flavours import UPSCALE, Stage

STAGE1_MAX_PX = 128
MIN_EDGE_PX, MAX_EDGE_PX = 8, 2048
TABLES = ("parquet", "csv", "jsonl")  # strategies whose captions come from the table of the `parquet` block
# Where the picture's own aspect becomes its size, the widest that is taken unless the data set says otherwise: a
# 20:1 panorama would ask for 64 x 1280 px, and 256 x 5120 px at Stage II.
OWN_ASPECT_RANGE = (0.25, 4.0)

# What each type cannot do without.
_PLACE_KEYS = {
    "local": ("instance_data_dir",), "aws": ("aws_bucket_name",), "csv": ("csv_file", "csv_cache_dir"),
    "parquet": ("csv_file", "csv_cache_dir"), "huggingface": ("dataset_name",), "webdataset": ("instance_data_dir",),
}  # fmt: skip
URL_TYPES = ("csv", "parquet")
_ANYWHERE = ("filename", "instanceprompt", *TABLES)
_STRATEGIES = {
    "local": ("textfile", *_ANYWHERE), "aws": ("textfile", *_ANYWHERE), "webdataset": ("textfile", *_ANYWHERE),
    "csv": _ANYWHERE, "parquet": _ANYWHERE, "huggingface": ("huggingface", *_ANYWHERE),
}  # fmt: skip


class Place(Spec):
    """Where the pictures of a set are, and how to get them. Nothing of it is part of what they are."""

    id: str = Field(min_length=1, description="Name of the data set; part of every ledger row.")
    type: Literal["local", "aws", "csv", "parquet", "huggingface", "webdataset"] = Field(
        description="`local`: a directory on this machine. `aws`: a bucket of S3 or another server of its kind. `csv`, "
        "`parquet`: a table of URLs. `huggingface`: a saved data set. `webdataset`: a directory of tar files."
    )
    instance_data_dir: HomePath = Field(
        "", description="Directory of the pictures or tar files, searched recursively; tar files also at an s3:// URL."
    )
    follow_links: bool = Field(
        False,
        description="Use what links in `instance_data_dir` lead to outside of it (`local`). Those of a Hugging Face cache "
        "to its `blobs` are used as it is.",
    )
    aws_bucket_name: str | None = Field(None, min_length=1, description="The bucket of `aws`.")
    aws_data_prefix: str | None = Field(None, description="Where in the bucket the pictures are, searched recursively.")
    aws_endpoint_url: str | None = Field(None, description="Server other than Amazon's, for example https://host:9000.")
    aws_region_name: str | None = Field(None, description="The bucket's region.")
    aws_access_key_id: SecretStr | None = Field(
        None, description="Better left to the environment (AWS_ACCESS_KEY_ID) or the machine's own role."
    )
    aws_secret_access_key: SecretStr | None = Field(
        None, description="Better left to the environment (AWS_SECRET_ACCESS_KEY) or the machine's own role."
    )
    csv_file: HomePath | None = Field(
        None, description="The table of `csv` or `parquet`: a row for each picture; .csv, .tsv, .parquet or .jsonl."
    )
    csv_url_column: str = Field("url", description="Its column with the pictures' http or https URLs.")
    csv_caption_column: Texts = Field("caption", description="Its column (or columns) with captions.")
    csv_cache_dir: HomePath | None = Field(None, description="Directory that keeps the downloaded pictures.")
    csv_user_agent: str | None = Field(
        None,
        pattern="^[ -~]+$",
        description="What downloads call themselves; unset: deepfloyd-pipeline and its version. Some servers ask for an "
        "address to write to.",
    )
    dataset_name: NameOrPath | None = Field(
        None, description="`huggingface`: a folder made by save_to_disk, or what load_dataset takes."
    )
    split: str = Field("train", description="`huggingface`: which split of it.")
    image_column: str = Field("image", description="`huggingface`: column with the pictures.")
    caption_column: Texts = Field("caption", description="`huggingface`: column (or columns) with captions.")

    fallback_caption_column: Texts | None = Field(
        None, description="`huggingface`: column (or columns) used where `caption_column` is empty."
    )
    revision: str | None = Field(
        None, description="`huggingface`: branch, tag or commit on the hub; unset: its main one."
    )

    @model_validator(mode="after")
    def _named(self) -> Self:
        for kind, keys in _PLACE_KEYS.items():
            missing = [key for key in keys if not getattr(self, key)] if self.type == kind else []
            if missing:
                raise ValueError(f"type is {kind!r}, and {missing[0]} is missing")
        return self


class ImageDataset(Place):
    """One set of captioned pictures."""

    dataset_type: Literal["image"] = Field("image", description="This entry holds pictures.")
    disabled: bool = Field(False, description="Leave this entry out of the run; nothing but its id is then looked at.")
    disable: bool = Field(False, description="Older spelling of `disabled`.")

    resolution: float = Field(64.0, gt=0, le=2048, description="Training size, in the unit of `resolution_type`.")
    resolution_type: Literal["pixel", "area", "pixel_area"] = Field(
        "pixel",
        description="What the four sizes measure. `pixel`: the shorter edge, px. `area`: megapixels (64 x 64 px is "
        "0.004096). `pixel_area`: the edge (px) of the square that has the area.",
    )
    minimum_image_size: float | None = Field(
        None, ge=0, description="Smaller pictures are left out: with `pixel` both edges must be at least this."
    )
    maximum_image_size: float | None = Field(
        None, gt=0, description="A picture above this (its shorter edge, or its area) is first brought to the target."
    )
    target_downsample_size: float | None = Field(
        None, gt=0, description="What an oversized picture is brought down to, in steps of 25 %, before the crop."
    )
    minimum_aspect_ratio: float | None = Field(
        None, gt=0, description="Least width / height. Unset: no limit; 0.25 where the size follows the picture's own."
    )
    maximum_aspect_ratio: float | None = Field(
        None, gt=0, description="Greatest width / height. Unset: no limit; 4 where the size follows the picture's own."
    )
    crop: bool = Field(
        True,
        description="Crop. False: all of the picture is resized to its aspect bucket, the remainder cut centrally.",
    )
    crop_aspect: Literal["square", "preserve", "closest", "random"] = Field(
        "square",
        description="Shape of the crop: `square`, the picture's own, the nearest of `crop_aspect_buckets`, or one drawn.",
    )
    crop_aspect_buckets: Annotated[tuple[AspectBucket | float, ...], Field(strict=False)] = Field(
        (), description="Shapes (width / height) for `closest` and `random`; `{aspect_bucket, weight}` to weigh them."
    )
    crop_style: Literal["center", "random", "corner", "face"] = Field(
        "center",
        description="Where the crop is taken. `random` is seeded by (seed, picture, repeat), `corner` is the top left, "
        "`face` needs the extra `face` and takes the centre where there is none.",
    )
    repeats: int = Field(
        0, ge=0, le=10_000, description="Extra passes over each picture: an epoch shows it n + 1 times."
    )
    random_crops: int = Field(
        32, ge=1, le=10_001, description="Random crops of a picture that are stored; further passes show these again."
    )

    probability: float = Field(1.0, gt=0, le=1e6, description="How often it is drawn from, relative to the other sets.")
    duplicates: Literal["keep", "first"] = Field(
        "keep",
        description="Of pictures of the set that show the same (copies, also resized or compressed): use all, or the first.",
    )
    max_num_samples: int | None = Field(None, ge=1, description="Use this many of its pictures, always the same ones.")
    start_step: int = Field(0, ge=0, description="Optimizer steps that are done before it is drawn from.")
    end_step: int | None = Field(None, ge=1, description="Optimizer step after which it is drawn from no more.")

    caption_strategy: Literal["textfile", "filename", "instanceprompt", "parquet", "csv", "jsonl", "huggingface"] = (
        Field(
            "filename",
            description="Where captions come from: NAME.txt (one a line), the file's name, `instance_prompt`, a table, or "
            "the columns of the saved data set. With a table of URLs, `csv` and `parquet` are its own captions.",
        )
    )
    parquet: CaptionTable | None = Field(None, description="The table of `parquet`, `csv` and `jsonl`.")
    disable_multiline_split: bool = Field(False, description="NAME.txt is one caption, whatever its lines.")
    instance_prompt: Texts | None = Field(None, description="Caption (or captions) of every picture, or its prefix.")
    prepend_instance_prompt: bool = Field(False, description="Put `instance_prompt` before each caption.")
    only_instance_prompt: bool = Field(False, description="Use `instance_prompt` alone, whatever the strategy.")
    caption_filter_list: HomePath | Annotated[tuple[str, ...], Field(strict=False)] = Field(
        (),
        description="Regular expressions (or a .txt or .json file of them) removed from captions, after those of its "
        "text embeds; `s/search/replace/` replaces the first.",
    )
    caption_shuffle: CaptionShuffle | None = Field(None, description="Other orders of the captions' tags.")
    text_embeds: str | None = Field(
        None, description="Id of the text embeds entry whose filters apply; unset: default."
    )
    conditioning_data: str | None = Field(
        None,
        min_length=1,
        description="Id of the entry whose pictures a ControlNet follows, with `controlnet_conditioning = paired`: for each "
        "picture the file of its name.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        self._check_sizes()
        self._check_shape()
        self._check_captions()
        if self.end_step is not None and self.end_step <= self.start_step:
            raise ValueError(f"end_step is {self.end_step}, not above start_step ({self.start_step}): no step is left")
        return self

    def _check_sizes(self) -> None:
        sizes = ("resolution", "minimum_image_size", "maximum_image_size", "target_downsample_size")
        broken = [name for name in sizes if self.resolution_type != "area" and (getattr(self, name) or 0) % 1]
        if broken:
            raise ValueError(f"{broken[0]} is {getattr(self, broken[0]):g}; with {self.resolution_type} it is whole px")
        if not MIN_EDGE_PX <= self.edge_px <= MAX_EDGE_PX:
            if "resolution" not in self.model_fields_set:
                raise ValueError(
                    f"resolution_type is {self.resolution_type!r}, and resolution, which is measured in it, is missing. "
                    "Set it, for 64 px to 0.004096"
                )
            raise ValueError(
                f"resolution is {self.resolution:g} ({self.resolution_type}), a square of {self.edge_px:.0f} px; it must "
                f"be {MIN_EDGE_PX} to {MAX_EDGE_PX} px. For 64 px set resolution_type = pixel and resolution = 64"
            )
        target, maximum = self.target_downsample_size, self.maximum_image_size
        if not self.crop or maximum is None:
            return
        if target is None:
            raise ValueError(
                f"maximum_image_size is {maximum:g}, and target_downsample_size, to which larger pictures are brought down, "
                "is missing. Set it, or remove the maximum"
            )
        if target < self.resolution:
            raise ValueError(
                f"target_downsample_size is {target:g}, below resolution {self.resolution:g}: "
                "the crop would not fit. Raise it to the resolution or more"
            )
        if target > maximum:
            raise ValueError("target_downsample_size is above maximum_image_size: nothing is ever upsampled")

    def _check_shape(self) -> None:
        low, high = self.aspect_range
        if low > high:
            raise ValueError(f"minimum_aspect_ratio {low:g} is above maximum_aspect_ratio {high:g}; no picture is left")
        if self.crop and self.crop_aspect in ("closest", "random") and not self.crop_aspect_buckets:
            raise ValueError(
                f"crop_aspect is {self.crop_aspect!r} and crop_aspect_buckets is empty. List the shapes, for example "
                "[1.0, 0.75, 1.33], or set crop_aspect = preserve"
            )
        wrong = [aspect for aspect, _ in self.buckets if not 0.05 <= aspect <= 20]
        if wrong:
            raise ValueError(f"crop_aspect_buckets has {wrong[0]:g}; an aspect is width / height, 0.05 to 20")

    def _check_captions(self) -> None:
        needs_prompt = {
            "only_instance_prompt": self.only_instance_prompt,
            "prepend_instance_prompt": self.prepend_instance_prompt,
            "caption_strategy": self.caption_strategy == "instanceprompt",
        }
        for key, needed in needs_prompt.items():
            if needed and not self.prompts:
                raise ValueError(f"{key} is {getattr(self, key)!r}, and instance_prompt is missing. Set it")
        if self.caption_strategy not in _STRATEGIES[self.type]:
            raise ValueError(
                f"caption_strategy is {self.caption_strategy!r}; with type {self.type!r} it is one of "
                f"{', '.join(_STRATEGIES[self.type])}"
            )
        if self.caption_strategy in TABLES and self.parquet is None and self.type not in URL_TYPES:
            raise ValueError(
                f"caption_strategy is {self.caption_strategy!r} and there is no parquet block. Add one with path, "
                "filename_column and caption_column (SimpleTuner's block, for csv and jsonl too)"
            )

    @property
    def own_texts(self) -> bool:
        """Whether the captions lie with the pictures, and are asked of their source."""
        if self.only_instance_prompt:
            return False
        if self.caption_strategy in TABLES:
            return self.type in URL_TYPES and self.parquet is None
        return self.caption_strategy in ("textfile", "huggingface")

    @property
    def edge_px(self) -> float:
        """Edge of a square training picture at the data set's own scale."""
        return math.sqrt(self.resolution * 1e6) if self.resolution_type == "area" else self.resolution

    @property
    def own_aspect(self) -> bool:
        """Whether the size follows the picture's own aspect."""
        return not self.crop or self.crop_aspect == "preserve"

    @property
    def aspect_range(self) -> tuple[float, float]:
        """Least and greatest width / height that is taken."""
        low, high = self.minimum_aspect_ratio, self.maximum_aspect_ratio
        least, most = OWN_ASPECT_RANGE if self.own_aspect else (0.0, math.inf)
        # A limit that is set beyond the other one's default moves that with it.
        least, most = min(least, least * (high or 1)), max(most, most * (low or 1))
        return least if low is None else low, most if high is None else high

    @property
    def buckets(self) -> tuple[tuple[float, float], ...]:
        """(width / height, weight) of each listed shape."""
        parts = self.crop_aspect_buckets
        return tuple((b.aspect_bucket, b.weight) if isinstance(b, AspectBucket) else (b, 1.0) for b in parts)

    @property
    def prompts(self) -> tuple[str, ...]:
        """The instance prompts that are not blank."""
        given = (self.instance_prompt,) if isinstance(self.instance_prompt, str) else self.instance_prompt or ()
        return tuple(prompt.strip() for prompt in given if prompt.strip())

    def factor(self, stage: Stage) -> int | None:
        """By what the pixel lengths of this data set are multiplied for a stage; None: it does not feed the stage."""
        if stage == 1:
            return 1 if self.edge_px <= STAGE1_MAX_PX else None
        return UPSCALE if self.edge_px <= STAGE1_MAX_PX else 1


class ConditioningSet(Place):
    """Pictures for a ControlNet to follow. Which of them belongs to a picture goes by its name."""

    id: str = Field(min_length=1, description="Name of the entry, for `conditioning_data`.")
    dataset_type: Literal["conditioning"] = Field(description="This entry holds pictures for a ControlNet to follow.")
    type: Literal["local", "aws"] = Field(description="A directory or a bucket: pairs are found by their names.")
    conditioning_type: Literal["controlnet"] | None = Field(
        None, description="What they are for; nothing else is known."
    )
    source_dataset_id: str | None = Field(
        None, description="The picture set that they belong to; its `conditioning_data` must name this entry."
    )
    disabled: bool = Field(False, description="Leave this entry out of the run; nothing but its id is then looked at.")
    disable: bool = Field(False, description="Older spelling of `disabled`.")

    @property
    def pictures(self) -> ImageDataset:
        """The same place as a set of pictures, which a source can be opened of."""
        return ImageDataset(**{name: getattr(self, name) for name in Place.model_fields})


class TextEmbedBackend(Spec):
    """The entry that stands for the text embeds. They live in the workspace, so its place is only reported."""

    id: str = Field(min_length=1, description="Name of the entry.")
    dataset_type: Literal["text_embeds"] = Field(description="This entry stands for text embeds.")
    type: str = Field("local", description="Kind of storage; has no effect.")
    default: bool = Field(False, description="Its filters apply to the data sets that name no other entry.")
    caption_filter_list: HomePath | Annotated[tuple[str, ...], Field(strict=False)] = Field(
        (),
        description="Regular expressions (or a .txt or .json file of them) removed from the captions of its data sets.",
    )
    disabled: bool = Field(False, description="Leave this entry out of the run; nothing but its id is then looked at.")
    disable: bool = Field(False, description="Older spelling of `disabled`.")
