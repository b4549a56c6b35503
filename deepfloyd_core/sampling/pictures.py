"""The pictures that `generate` is asked for: prompts times sizes times seeds. No torch.

Prompts come from the command line and from a file: a text with a prompt a line, a JSON library of named prompts, or a table
(CSV, TSV, JSON lines, Parquet) whose columns are those of `COLUMNS`.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from deepfloyd_core.config.base import Spec
from deepfloyd_core.config.run_validation import sizes_px
from deepfloyd_core.config.stage3 import DrawnStage, scale_of
from deepfloyd_core.config.stages import STAGES, Stage
from deepfloyd_core.errors import ConfigError, DataError
from deepfloyd_core.files import canonical_json
from deepfloyd_core.hashing import digest
from deepfloyd_core.sources.tables import TABLE_KINDS, table_records
from deepfloyd_core.store.counts import many

MOST_DRAWN = 4096  # pictures of one call, whose texts are held in memory
MOST_SEEDS = 2**32  # as many as a generator of torch tells apart
INDEX, SHEET = "index.parquet", "sheet.png"  # of the pictures, beside them
COLUMNS = ("prompt", "negative_prompt", "seed", "size")
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")

Size = tuple[int, int]


class Picture(Spec):
    """One picture to draw."""

    prompt: str
    negative_prompt: str
    seed: int  # 0 to 2**32 - 1
    size: Size  # (width, height) of Stage I's, px


class PromptRow(Spec):
    """A prompt, and what it has of its own; None: as for all prompts."""

    prompt: str
    negative_prompt: str | None = None
    seeds: tuple[int, ...] | None = None
    sizes: tuple[Size, ...] | None = None


def grid(
    rows: Iterable[PromptRow], seeds: tuple[int, ...], sizes: tuple[Size, ...], negative_prompt: str
) -> tuple[Picture, ...]:
    """Each prompt at each size with each seed, in this order. Raises ConfigError for a picture that is asked for twice, and
    for more than MOST_DRAWN.
    """
    pictures: dict[Picture, None] = {}
    for row in rows:
        negative = negative_prompt if row.negative_prompt is None else row.negative_prompt
        for size in row.sizes or sizes:
            for seed in row.seeds or seeds:
                picture = Picture(prompt=row.prompt, negative_prompt=negative, seed=seed, size=size)
                if picture in pictures:
                    raise ConfigError(
                        f"The picture of {row.prompt!r} with seed {seed} and size {size[0]}x{size[1]} is asked for twice. "
                        "For other pictures of a prompt give more seeds."
                    )
                pictures[picture] = None
                if len(pictures) > MOST_DRAWN:
                    raise ConfigError(f"More than {MOST_DRAWN:,} pictures are asked for. Draw them in several calls.")
    return tuple(pictures)


def parse_seeds(text: str) -> tuple[int, ...]:
    """Seeds such as `7` or `0-7,42`, each once. Raises ConfigError."""
    seeds: dict[int, None] = {}
    for part in text.split(","):
        match = _RANGE.fullmatch(part.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last < MOST_SEEDS or last - first >= MOST_DRAWN:
            raise ConfigError(
                f"The seeds are {text!r}; give numbers from 0 to {MOST_SEEDS - 1} and ranges of at most {MOST_DRAWN:,}, for "
                "example 7 or 0-7,42."
            )
        seeds |= dict.fromkeys(range(first, last + 1))
    return tuple(seeds)


def parse_sizes(text: str) -> tuple[Size, ...]:
    """Sizes of Stage I such as `64` or `64,96x64` (width x height), px, each once. Raises ConfigError."""
    try:
        return sizes_px(text, "The size")
    except ValueError as error:
        raise ConfigError(f"{error}.") from None


def read_prompts(path: Path) -> list[PromptRow]:
    """The prompts of a file. Raises ConfigError for a file that is not there or has no prompt, a column that is not known, a
    row with a fault, by its number; DataError for a file that cannot be read.
    """
    if not path.is_file():
        raise ConfigError(f"The file of prompts {path} is not there.")
    rows = list(_rows(path))
    if not rows:
        raise ConfigError(f"The file of prompts {path} has no prompt.")
    return rows


def asked_digest(pictures: Iterable[Picture]) -> str:
    """What identifies pictures."""
    return digest(canonical_json([picture.model_dump(mode="json") for picture in pictures]))


def batches(pictures: tuple[Picture, ...], most: int) -> list[list[int]]:
    """Numbers of pictures that are sampled together: of one size, `most` at once."""
    by_size: dict[Size, list[int]] = {}
    for number, picture in enumerate(pictures):
        by_size.setdefault(picture.size, []).append(number)
    return [same[start : start + most] for same in by_size.values() for start in range(0, len(same), most)]


def picture_file(pictures: Sequence[Picture], number: int, scale: int) -> str:
    """The name of the file of a picture. scale: pixels of the stage along one of the first."""
    digits, picture = max(3, len(str(len(pictures) - 1))), pictures[number]
    width, height = (edge * scale for edge in picture.size)
    return f"picture-{number:0{digits}}-seed-{picture.seed}-{width}x{height}.png"


def picture_scale(stage: DrawnStage, first: Stage) -> int:
    """Pixels of a stage along one of the stage that the cascade starts with."""
    return scale_of(stage) // STAGES[first].scale


def drawn(folder: Path) -> Iterator[tuple[str, Path]]:
    """The prompt and the file of each picture that was drawn in a folder, the first stage's first."""
    import pyarrow.parquet as pq

    for row in pq.read_table(folder / INDEX, columns=["prompt", "file"]).to_pylist():
        yield row["prompt"], folder / row["file"]


def told(pictures: Sequence[Picture]) -> str:
    """How many pictures are drawn, and of what."""
    counts = [
        many(len({one.prompt for one in pictures}), "prompt"),
        many(len({one.size for one in pictures}), "size"),
        many(len({one.seed for one in pictures}), "seed"),
    ]
    return f"{many(len(pictures), 'picture')}: {', '.join(counts)}"


def _rows(path: Path) -> Iterator[PromptRow]:
    kind = path.suffix.lower()
    if kind in TABLE_KINDS:
        for number, record in enumerate(table_records(path, COLUMNS[:1], COLUMNS, str(path)), 1):
            try:
                yield _row(record)
            except ConfigError as error:
                raise ConfigError(f"{path}, row {number}: {error}") from None
        return
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"The file of prompts {path} cannot be read: {error}. Save it as UTF-8.") from None
    lines = _library(path, text) if kind == ".json" else text.splitlines()
    yield from (PromptRow(prompt=_text(line)) for line in lines if line.strip())


def _library(path: Path, text: str) -> list[str]:
    """The prompts of a JSON library: {"name": "prompt", ...}, or a list."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise DataError(f"The file of prompts {path} is no JSON: {error}.") from None
    prompts = list(found.values()) if isinstance(found, dict) else found
    if not isinstance(prompts, list) or not all(isinstance(one, str) for one in prompts):
        raise ConfigError(f'{path} is no library of prompts, which is {{"name": "prompt", ...}} or a list of prompts.')
    return prompts


def _row(record: dict[str, Any]) -> PromptRow:
    cells = {name: _text(value) for name, value in record.items()}
    if not cells.get("prompt"):
        raise ConfigError("the prompt is empty.")
    return PromptRow(
        prompt=cells["prompt"],
        negative_prompt=cells.get("negative_prompt") or None,
        seeds=parse_seeds(cells["seed"]) if cells.get("seed") else None,
        sizes=parse_sizes(cells["size"]) if cells.get("size") else None,
    )


def _text(value: Any) -> str:
    """A cell as text; a number that a table with empty cells holds as 7.0 is 7. Nothing and NaN are empty."""
    if value is None or value != value:
        return ""
    text = str(int(value) if isinstance(value, float) and value.is_integer() else value).strip()
    return text.encode("utf-8", "replace").decode()  # JSON can hold half of a surrogate pair
