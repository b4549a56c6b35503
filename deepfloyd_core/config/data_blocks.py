"""The blocks inside a data file's entries: a weighted shape, a table of captions, tags in other orders."""

from typing import Annotated, Literal

from pydantic import Field

from deepfloyd_core.config.base import HomePath, Spec

Texts = str | Annotated[tuple[str, ...], Field(strict=False)]


class AspectBucket(Spec):
    """One shape of `crop_aspect_buckets` with its weight."""

    aspect_bucket: float = Field(ge=0.05, le=20, description="Width / height.")
    weight: float = Field(1.0, gt=0, description="Weight with which `random` draws this shape, relative to the others.")


class CaptionTable(Spec):
    """A table with the captions of a picture set: SimpleTuner's `parquet` block, for CSV and JSON lines as well."""

    path: HomePath = Field(
        min_length=1,
        description="The table: .parquet, .csv, .tsv or .jsonl; for another ending `caption_strategy` gives the "
        "format. Searched in the current directory, then in `instance_data_dir`.",
    )
    filename_column: str = Field("id", description="Column with the pictures' names, or paths in `instance_data_dir`.")
    caption_column: Texts = Field(
        "caption", description="Column (or columns) with the captions; a list in a cell is several captions."
    )
    fallback_caption_column: Texts | None = Field(None, description="Used where `caption_column` is empty.")
    identifier_includes_extension: bool = Field(False, description="Whether the names in the table end in .jpg etc.")
    width_column: str | None = Field(None, description="Has no effect: sizes are read from the pictures.")
    height_column: str | None = Field(None, description="Has no effect: sizes are read from the pictures.")


class CaptionShuffle(Spec):
    """Extra captions, made from each caption by reordering its tags; the same ones in every run."""

    enable: bool = Field(False, description="Whether to add shuffled captions.")
    count: int = Field(
        1, ge=1, le=100, description="Shuffled orders of each caption; fewer if its tags have fewer orders."
    )
    seed: int | None = Field(None, ge=0, description="Seed of the orders; unset: the run's.")
    split_on: Literal["comma", "space", "period"] = Field("comma", description="Separator of tags.")
    position_start: int = Field(0, ge=0, description="Number of leading tags that keep their place.")
    include_original: bool = Field(True, description="Also keep the original caption.")
