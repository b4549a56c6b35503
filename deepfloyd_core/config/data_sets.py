"""The data file's entries: SimpleTuner's `multidatabackend.json`, as frozen models.

An entry without `dataset_type` (or with "image") is a set of pictures; "text_embeds" stands for the embeds. A picture
set has one resolution. Up to 128 px it feeds Stage I at that size, and Stage II at four times the size, with every
length multiplied by four. Above 128 px it feeds Stage II only. An entry with `dataset_type` "conditioning" has
conditioning pictures for a ControlNet. `data_file.py` reads the file.
"""

import math
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from deepfloyd_core.config.base import HomePath, Spec
from deepfloyd_core.config.data_blocks import AspectBucket, CaptionShuffle, CaptionTable, Texts
from deepfloyd_core.config.keys import CONTENT, CROPS, ENTRY, LORA, VERDICT, Reader, key
from deepfloyd_core.config.source_keys import SOURCE_TYPES, URL_TYPES, SourceKeys
from deepfloyd_core.config.stages import STAGES, Stage, kind_for_edge

_INDEX: tuple[Reader, ...] = ("index",)
MIN_EDGE_PX, MAX_EDGE_PX = 8, 2048
TABLES = ("parquet", "csv", "jsonl")  # strategies whose captions come from the table of the `parquet` block
# The widest accepted aspect if a picture's own aspect decides its size, unless the data set sets another: a
# 20:1 panorama would need 64 x 1280 px, and 256 x 5120 px at Stage II.
OWN_ASPECT_RANGE = (0.25, 4.0)

_ANYWHERE = ("filename", "instanceprompt", *TABLES)  # strategies for pictures of any source


class ImageDataset(SourceKeys):
    """One set of captioned pictures."""

    dataset_type: Literal["image"] = key("image", says="This entry holds pictures.", makes=ENTRY)
    disabled: bool = key(False, says="Leave this entry out of the run; only its id is checked.", makes=ENTRY)
    disable: bool = key(False, says="Older spelling of `disabled`.", makes=ENTRY)

    resolution: float = key(64.0, gt=0, le=2048, says="Training size, in the unit of `resolution_type`.", makes=CROPS)
    resolution_type: Literal["pixel", "area", "pixel_area"] = key(
        "pixel",
        says="What the four sizes measure. `pixel`: the shorter edge, px. `area`: megapixels (64 x 64 px is "
        "0.004096). `pixel_area`: the edge (px) of the square that has the area.",
        makes=CROPS,
    )
    minimum_image_size: float | None = key(
        None, ge=0, says="Smaller pictures are left out: with `pixel` both edges must be at least this.", makes=VERDICT
    )
    maximum_image_size: float | None = key(
        None,
        gt=0,
        says="A picture above this (its shorter edge, or its area) is first downsampled to `target_downsample_size`.",
        makes=CROPS,
    )
    target_downsample_size: float | None = key(
        None,
        gt=0,
        says="Size to which a picture above `maximum_image_size` is downsampled, in steps of 25 %, before the crop.",
        makes=CROPS,
    )
    minimum_aspect_ratio: float | None = key(
        None,
        gt=0,
        says="Least width / height. Unset: no limit; 0.25 where the size follows the picture's own.",
        makes=VERDICT,
    )
    maximum_aspect_ratio: float | None = key(
        None,
        gt=0,
        says="Greatest width / height. Unset: no limit; 4 where the size follows the picture's own.",
        makes=VERDICT,
    )
    crop: bool = key(
        True,
        says="Crop. False: the whole picture is resized to its aspect bucket, and the rest is cut centrally.",
        makes=CROPS,
    )
    crop_aspect: Literal["square", "preserve", "closest", "random"] = key(
        "square",
        says="Shape of the crop: `square`, the picture's own, the nearest of `crop_aspect_buckets`, or one drawn.",
        makes=CROPS,
    )
    crop_aspect_buckets: Annotated[tuple[AspectBucket | float, ...], Field(strict=False)] = key(
        (),
        says="Shapes (width / height) for `closest` and `random`; `{aspect_bucket, weight}` to weigh them.",
        makes=CROPS,
    )
    crop_style: Literal["center", "random", "corner", "face"] = key(
        "center",
        says="Where the crop is taken. `random` is seeded by (seed, picture, repeat), `corner` is the top left, "
        "`face` needs the extra `face` and uses the centre if it detects no face.",
        makes=("pixels",),
    )
    repeats: int = key(
        0, ge=0, le=10_000, says="Extra passes over each picture: an epoch shows it n + 1 times.", makes=("pixels",)
    )
    random_crops: int = key(
        32,
        ge=1,
        le=10_001,
        says="Random crops stored of each picture; further passes reuse them.",
        makes=("pixels",),
    )

    probability: float = key(
        1.0, gt=0, le=1e6, says="Sampling weight of the set, relative to the other sets.", makes=LORA
    )
    duplicates: Literal["keep", "first"] = key(
        "keep",
        says="Duplicates in the set (copies, also resized or compressed): use all, or only the first.",
        makes=_INDEX,
    )
    max_num_samples: int | None = key(
        None, ge=1, says="Use this many of its pictures, always the same ones.", makes=_INDEX
    )
    start_step: int = key(0, ge=0, says="Optimizer steps before the set is first used.", makes=LORA)
    end_step: int | None = key(None, ge=1, says="Optimizer step after which the set is no longer used.", makes=LORA)

    caption_strategy: Literal["textfile", "filename", "instanceprompt", "parquet", "csv", "jsonl", "huggingface"] = key(
        "filename",
        says="Where captions come from: NAME.txt (one a line), the file's name, `instance_prompt`, a table, or "
        "the columns of the saved data set. With a table of URLs, `csv` and `parquet` are its own captions.",
        makes=_INDEX,
    )
    parquet: CaptionTable | None = key(None, says="The table of `parquet`, `csv` and `jsonl`.", makes=_INDEX)
    disable_multiline_split: bool = key(False, says="All lines of NAME.txt are one caption.", makes=_INDEX)
    instance_prompt: Texts | None = key(
        None, says="Caption (or captions) of every picture, or its prefix.", makes=_INDEX
    )
    prepend_instance_prompt: bool = key(False, says="Put `instance_prompt` before each caption.", makes=_INDEX)
    only_instance_prompt: bool = key(False, says="Use `instance_prompt` alone, whatever the strategy.", makes=_INDEX)
    caption_filter_list: HomePath | Annotated[tuple[str, ...], Field(strict=False)] = key(
        (),
        says="Regular expressions (or a .txt or .json file of them) removed from captions, after the filters of its "
        "text embeds entry; `s/search/replace/` replaces the first.",
        makes=_INDEX,
    )
    caption_shuffle: CaptionShuffle | None = key(None, says="Shuffled orders of the captions' tags.", makes=_INDEX)
    text_embeds: str | None = key(
        None, says="Id of the text embeds entry whose filters apply; unset: default.", makes=CONTENT
    )
    conditioning_data: str | None = key(
        None,
        min_length=1,
        says="Id of the entry with the conditioning pictures, for `controlnet_conditioning = paired`: each picture "
        "takes the file of its name.",
        makes=CONTENT,
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
                f"maximum_image_size is {maximum:g}, and target_downsample_size, to which larger pictures are "
                "downsampled, is missing. Set it, or remove the maximum"
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
        for name, needed in needs_prompt.items():
            if needed and not self.prompts:
                raise ValueError(f"{name} is {getattr(self, name)!r}, and instance_prompt is missing. Set it")
        strategies = (*SOURCE_TYPES[self.type].captions, *_ANYWHERE)
        if self.caption_strategy not in strategies:
            raise ValueError(
                f"caption_strategy is {self.caption_strategy!r}; with type {self.type!r} it is one of "
                f"{', '.join(strategies)}"
            )
        if self.caption_strategy in TABLES and self.parquet is None and self.type not in URL_TYPES:
            raise ValueError(
                f"caption_strategy is {self.caption_strategy!r} and there is no parquet block. Add one with path, "
                "filename_column and caption_column (SimpleTuner's block, for csv and jsonl too)"
            )

    @property
    def own_texts(self) -> bool:
        """Whether the captions lie with the pictures and are read from their source."""
        if self.only_instance_prompt:
            return False
        if self.caption_strategy in TABLES:
            return self.type in URL_TYPES and self.parquet is None
        return self.caption_strategy in SOURCE_TYPES[self.type].captions

    @property
    def edge_px(self) -> float:
        """Edge of a square training picture at the data set's own scale."""
        return math.sqrt(self.resolution * 1e6) if self.resolution_type == "area" else self.resolution

    @property
    def own_aspect(self) -> bool:
        """Whether the size follows the picture's own aspect ratio."""
        return not self.crop or self.crop_aspect == "preserve"

    @property
    def aspect_range(self) -> tuple[float, float]:
        """Least and greatest accepted width / height."""
        low, high = self.minimum_aspect_ratio, self.maximum_aspect_ratio
        least, most = OWN_ASPECT_RANGE if self.own_aspect else (0.0, math.inf)
        # A limit that is set beyond the other one's default also moves the other one.
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
        """The factor for this data set's pixel lengths at a stage; None: it does not feed the stage."""
        own, scale = kind_for_edge(self.edge_px).scale, STAGES[stage].scale
        return scale // own if scale >= own else None


class ConditioningSet(SourceKeys):
    """Conditioning pictures for a ControlNet. A picture's name decides which one belongs to it."""

    id: str = key(min_length=1, says="Name of the entry, for `conditioning_data`.", makes=ENTRY)
    dataset_type: Literal["conditioning"] = key(
        says="This entry holds conditioning pictures for a ControlNet.", makes=ENTRY
    )
    type: Literal["local", "aws"] = key(says="A directory or a bucket; pairs are matched by name.", makes=CONTENT)
    conditioning_type: Literal["controlnet"] | None = key(
        None, says="Use of the pictures; the only value.", makes=CONTENT
    )
    source_dataset_id: str | None = key(
        None, says="Id of their picture set, whose `conditioning_data` must name this entry.", makes=CONTENT
    )
    disabled: bool = key(False, says="Leave this entry out of the run; only its id is checked.", makes=ENTRY)
    disable: bool = key(False, says="Older spelling of `disabled`.", makes=ENTRY)

    @property
    def pictures(self) -> ImageDataset:
        """The same place as a set of pictures, so that a source can be opened on it."""
        return ImageDataset(**{name: getattr(self, name) for name in SourceKeys.model_fields})


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
    disabled: bool = Field(False, description="Leave this entry out of the run; only its id is checked.")
    disable: bool = Field(False, description="Older spelling of `disabled`.")
