"""From a picture's raw texts to its captions for training, in a fixed order.

First, filters clean what a captioner wrote; then tags are shuffled; then the instance prompt goes in front, so that a
prompt is never filtered and always comes first. Every variant is listed, so that the text embeds contain each caption
that a crop can have. Pass `repeat` over a picture with n captions takes number repeat % n.
"""

import random
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import zip_longest
from typing import TYPE_CHECKING

from deepfloyd_core.config.data_blocks import CaptionShuffle
from deepfloyd_core.config.data_sets import ImageDataset
from deepfloyd_core.errors import ConfigError, DeepFloydError, raise_together
from deepfloyd_core.files import text_lines
from deepfloyd_core.hashing import hash_seed
from deepfloyd_core.sources.names import caption_names
from deepfloyd_core.sources.source import Raw, open_source

if TYPE_CHECKING:
    import pyarrow as pa  # a command line that only reads its files is not to wait for it

Filter = tuple[re.Pattern[str], str, int]  # what, by what, how often (0: always)

_SED = re.compile(r"s/((?:[^/\\]|\\.)*)/((?:[^/\\]|\\.)*)/?")
_SPLIT = {"comma": (",", ", "), "space": (None, " "), "period": (".", ". ")}
_AT_ONCE = 1 << 14  # pictures whose texts are asked for at once
_TRIES = 20  # random orders for each one wanted; with few tags they soon repeat


@dataclass(frozen=True)
class Strategy:
    """Where captions come from."""

    read: Callable[[ImageDataset, "pa.ChunkedArray"], "pa.Table"]  # the texts of pictures, by their names, as TOLD
    missing: Callable[[ImageDataset, str], str]  # why a picture of a name has no text, and what to do
    by_line: bool = False  # each line of a text is a caption, unless `disable_multiline_split` is set
    final: bool = False  # texts are captions as they are: not filtered, not shuffled, without a prefix


def raw_captions(dataset: ImageDataset, sources: "pa.ChunkedArray") -> "pa.Table":
    """The texts of each picture, by its name in the data set's source, as TOLD.

    Raises ConfigError or DataError when the data set's table cannot be used.
    """
    return _strategy(dataset).read(dataset, sources)


def finished_captions(dataset: ImageDataset, raw: Raw, seed: int) -> list[str]:
    """The captions of one picture; empty when it has none. `seed`: the run's, for shuffled tags."""
    strategy, texts = _strategy(dataset), list(raw or ())
    if strategy.final:
        return texts
    if strategy.by_line and not dataset.disable_multiline_split:
        texts = [line for text in texts for line in text_lines(text)]
    filters = compiled_filters(tuple(dataset.caption_filter_list))
    captions = [filtered(text, filters).strip() for text in texts]
    shuffle = dataset.caption_shuffle
    variants = [shuffled(caption, shuffle, seed) if shuffle else [caption] for caption in captions if caption]
    # The first form of each caption before the second of any: few repeats then show all captions.
    ordered = [caption for turn in zip_longest(*variants) for caption in turn if caption is not None]
    if not dataset.prepend_instance_prompt:
        return ordered
    return [f"{prompt} {caption}" for caption in ordered for prompt in dataset.prompts]


def missing_caption(dataset: ImageDataset, source: str, raw: Raw) -> str:
    """Why a picture, given its name and its raw texts, has no caption, and what to do."""
    if raw and any(text.strip() for text in raw):
        return "caption_filter_list leaves nothing of its caption"
    return "its caption is blank" if raw else _strategy(dataset).missing(dataset, source)


def _strategy(dataset: ImageDataset) -> Strategy:
    return STRATEGIES["instanceprompt" if dataset.only_instance_prompt else dataset.caption_strategy]


# What they import loads pyarrow.
def _from_source(dataset: ImageDataset, sources: "pa.ChunkedArray") -> "pa.Table":
    """The texts that lie with the pictures."""
    from deepfloyd_core.sources.columns import TOLD, InColumns, tabled

    source = open_source(dataset)
    if isinstance(source, InColumns):
        return source.told(sources)
    blocks = (sources.slice(start, _AT_ONCE).to_pylist() for start in range(0, len(sources), _AT_ONCE))
    return tabled((texts for block in blocks for texts in source.texts(block)), TOLD)


def _from_table(dataset: ImageDataset, sources: "pa.ChunkedArray") -> "pa.Table":
    """The texts of the `parquet` block's table; without one, of the table of URLs that the pictures come from."""
    from deepfloyd_core.sources.caption_tables import told_by_table

    return _from_source(dataset, sources) if dataset.own_texts else told_by_table(dataset, sources)


def _from_names(dataset: ImageDataset, sources: "pa.ChunkedArray") -> "pa.Table":
    import pyarrow.compute as pc

    from deepfloyd_core.sources.columns import as_paths, last_names, one_each, told, without_extensions

    stems = without_extensions(last_names(as_paths(sources)))
    return told(one_each(pc.replace_substring(stems, "_", " ")))


def _prompts(dataset: ImageDataset, sources: "pa.ChunkedArray") -> "pa.Table":
    import pyarrow as pa

    from deepfloyd_core.sources.columns import TEXTS, told

    return told(pa.repeat(pa.scalar(list(dataset.prompts), TEXTS), len(sources)))


def _no_file(dataset: ImageDataset, source: str) -> str:
    name = caption_names(source.rpartition("/")[2])[0]
    return f"there is no {name} beside it; without such files set caption_strategy = instanceprompt and instance_prompt"


def _no_row(dataset: ImageDataset, source: str) -> str:
    return "its row has no caption" if dataset.own_texts else "the table has no row for it, or no caption in it"


def _no_text(dataset: ImageDataset, source: str) -> str:
    return "there is no text for it"


# By the value of `caption_strategy`.
STRATEGIES: dict[str, Strategy] = {
    "textfile": Strategy(_from_source, _no_file, by_line=True),
    "filename": Strategy(_from_names, _no_text),
    "instanceprompt": Strategy(_prompts, _no_text, final=True),
    "parquet": Strategy(_from_table, _no_row),
    "csv": Strategy(_from_table, _no_row),
    "jsonl": Strategy(_from_table, _no_row),
    "huggingface": Strategy(_from_source, _no_row),
}


@lru_cache(maxsize=64)
def compiled_filters(lines: tuple[str, ...], where: str = "caption_filter_list") -> tuple[Filter, ...]:
    """Each line as a regular expression to remove, or `s/search/replace/` to replace once. Raises ConfigError."""
    filters: list[Filter] = []
    faults: list[DeepFloydError] = []
    for number, line in enumerate(lines, 1):
        sed = _SED.fullmatch(line)
        search, replacement = (sed[1], sed[2].replace("\\/", "/")) if sed else (line, "")
        try:
            with warnings.catch_warnings(action="ignore", category=FutureWarning):  # of sets that may be nested one day
                pattern = re.compile(search)
            pattern.sub(replacement, "")  # a group that is not there is found here
        except (re.error, IndexError, OverflowError, RecursionError) as error:
            # Not the line, nor what the error quotes of it: the file may be none of filters.
            reason = re.sub(r"'.*'", "...", str(error), flags=re.DOTALL)
            fault = f"{where}: line {number} is no regular expression ({reason})"
            faults.append(ConfigError(f"{fault}. Put a backslash before a literal special character."))
            continue
        filters.append((pattern, replacement, 1 if sed else 0))
    raise_together(faults)
    return tuple(filters)


def filtered(caption: str, filters: tuple[Filter, ...]) -> str:
    """A caption after every filter, in their order."""
    for pattern, replacement, count in filters:
        caption = pattern.sub(replacement, caption, count=count)
    return caption


def shuffled(caption: str, shuffle: CaptionShuffle, seed: int) -> list[str]:
    """A caption's variants, the same ones for the same (seed, caption): as written, then up to `count` other orders."""
    split, join = _SPLIT[shuffle.split_on]
    tags = [tag.strip() for tag in caption.split(split) if tag.strip()]
    fixed, loose = tags[: shuffle.position_start], tags[shuffle.position_start :]
    if not shuffle.enable or len(loose) < 2:
        return [caption]
    draws = random.Random(hash_seed("caption_shuffle", seed if shuffle.seed is None else shuffle.seed, caption))
    orders: dict[tuple[str, ...], None] = {}
    for _ in range(_TRIES * shuffle.count):
        order = tuple(draws.sample(loose, len(loose)))
        if list(order) != loose and len(orders) < shuffle.count:
            orders[order] = None
    end = "." if shuffle.split_on == "period" and caption.endswith(".") else ""
    variants = [join.join([*fixed, *order]) + end for order in orders]
    return [caption, *variants] if shuffle.include_original or not variants else variants
