"""The pictures that `generate` is asked for: prompts times sizes times seeds. No torch.

Prompts come from the command line and from a file: a text with a prompt a line, a JSON library of named prompts, or a table
(CSV, TSV, JSON lines, Parquet) whose columns are those of `COLUMNS`.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from deepfloyd_core.config.base import FILE_BYTES, Spec
from deepfloyd_core.config.run_validation import sizes_px
from deepfloyd_core.config.stage3 import DrawnStage, scale_of, title_of
from deepfloyd_core.config.stages import STAGES, Stage
from deepfloyd_core.errors import ConfigError, DataError, raise_together
from deepfloyd_core.files import canonical_json, parsed_json, read_file
from deepfloyd_core.hashing import digest
from deepfloyd_core.sources.tables import TABLE_KINDS, table_records
from deepfloyd_core.store.counts import many, ranges

MOST_DRAWN = 4096  # pictures of one call, whose texts are held in memory
MOST_TOLD = 10  # faults of rows, and lines of a list
_LINE_LETTERS = 80  # of a text in such a line
MOST_SEEDS = 2**32  # as many as a generator of torch tells apart
INDEX, SHEET = "index.parquet", "sheet.png"  # of the pictures, beside them
COLUMNS = ("prompt", "negative_prompt", "seed", "size")
_STRENGTH = "adapter_strength"  # of SimpleTuner's libraries: of the LoRA, for one prompt
_NO_LIBRARY = (
    'is no library of prompts, which is {"name": PROMPT, ...} or a list of them, and PROMPT a text or '
    '{"prompt": TEXT, "adapter_strength": NUMBER}.'
)
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
    where: str = ""  # its file and row, for messages; empty: the command line
    unused: str = ""  # what it says that nothing here does


def grid(
    rows: Iterable[PromptRow], seeds: tuple[int, ...], sizes: tuple[Size, ...], negative_prompt: str
) -> tuple[Picture, ...]:
    """Each prompt at each size with each seed, in this order. Raises ConfigError for pictures that are asked for twice, by
    their rows, and for more than MOST_DRAWN.
    """
    pictures: dict[Picture, str] = {}
    faults: dict[tuple[str, str], ConfigError] = {}  # one for two rows
    for row in rows:
        for picture in _of_row(row, seeds, sizes, negative_prompt):
            if picture in pictures:
                faults.setdefault((pictures[picture], row.where), _asked_twice(picture, pictures[picture], row.where))
            pictures.setdefault(picture, row.where)
            if len(pictures) > MOST_DRAWN:
                raise ConfigError(f"More than {MOST_DRAWN:,} pictures are asked for. Draw them in several calls.")
    raise_together(first_faults(list(faults.values())))
    return tuple(pictures)


def _of_row(row: PromptRow, seeds: tuple[int, ...], sizes: tuple[Size, ...], negative_prompt: str) -> Iterator[Picture]:
    negative = negative_prompt if row.negative_prompt is None else row.negative_prompt
    for size in row.sizes or sizes:
        for seed in row.seeds or seeds:
            yield Picture(prompt=row.prompt, negative_prompt=negative, seed=seed, size=size)


def _asked_twice(picture: Picture, first: str, second: str) -> ConfigError:
    width, height = picture.size
    by = f", by {first or 'the command line'} and by {second or 'the command line'}" if first or second else ""
    return ConfigError(
        f"The picture of {picture.prompt!r} with seed {picture.seed} and size {width}x{height} is asked for twice{by}. "
        "For other pictures of a prompt give more seeds."
    )


def first_faults(faults: Sequence[ConfigError]) -> list[ConfigError]:
    """Faults of rows, of many the first ones, with a line that counts the others."""
    others = len(faults) - MOST_TOLD
    counted = [ConfigError(f"{many(others, 'more row')} like these.")] if others > 0 else []
    return [*faults[:MOST_TOLD], *counted]


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
    """The prompts of a file. Raises ConfigError for a file that is not there, cannot be read or has no prompt, a column
    that is not known, and rows with a fault, by their numbers.
    """
    if not path.is_file():
        raise ConfigError(f"The file of prompts {path} is not there.")
    try:
        rows = _table(path) if path.suffix.lower() in TABLE_KINDS else list(_texts(path))
    except DataError as error:  # of a table; here it is a fault of the command line
        raise ConfigError(str(error)) from None
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


def told(pictures: Sequence[Picture], stages: Iterable[DrawnStage]) -> list[str]:
    """How many pictures are drawn, and of what; then each prompt and size with its seeds, of many the first ones."""
    counts = [
        many(len({one.prompt for one in pictures}), "prompt"),
        many(len({one.size for one in pictures}), "size"),
        many(len({one.seed for one in pictures}), "seed"),
    ]
    seeds: dict[tuple[str, str, Size], list[int]] = {}
    for one in pictures:
        seeds.setdefault((one.prompt, one.negative_prompt, one.size), []).append(one.seed)
    lines = [
        f"- {_short(prompt)}, {size[0]}x{size[1]}, seed{'s' if len(own) > 1 else ''} {_short(ranges(own))}"
        for (prompt, _, size), own in islice(seeds.items(), MOST_TOLD)
    ]
    others = len(pictures) - sum(map(len, islice(seeds.values(), MOST_TOLD)))
    drawn_by = " and ".join(map(title_of, stages))
    return [
        f"{many(len(pictures), 'picture')} of {drawn_by}: {', '.join(counts)}",
        *lines,
        *([f"- and {many(others, 'more picture')}"] if others else []),
    ]


def _short(text: str) -> str:
    """The beginning of a text, on one line."""
    line = " ".join(text.split())
    return line if len(line) <= _LINE_LETTERS else line[: _LINE_LETTERS - 3] + "..."


def _table(path: Path) -> list[PromptRow]:
    """The rows of a table. Raises ConfigError for all rows with a fault."""
    rows, faults = [], []
    for number, record in enumerate(table_records(path, COLUMNS[:1], COLUMNS, str(path)), 1):
        where = f"{path}, row {number}"
        try:
            rows.append(_row(record, where))
        except ConfigError as error:
            faults.append(ConfigError(f"{where}: {error}"))
    raise_together(first_faults(faults))
    return rows


def _texts(path: Path) -> Iterator[PromptRow]:
    """The prompts of a text, one a line, or of a library."""
    try:
        text = read_file(path, FILE_BYTES).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The file of prompts {path} cannot be read: {error}. Save it as UTF-8.") from None
    if path.suffix.lower() == ".json":
        yield from _library(path, text)
        return
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield PromptRow(prompt=_text(line), where=f"{path}, line {number}")


def _library(path: Path, text: str) -> Iterator[PromptRow]:
    """The prompts of a JSON library: {"name": PROMPT, ...}, or a list of them. As in SimpleTuner's PROMPT is a text, or
    {"prompt": TEXT, "adapter_strength": NUMBER}.
    """
    try:
        found = parsed_json(text)
    except ValueError as error:
        raise ConfigError(f"The file of prompts {path} is no JSON: {error}.") from None
    named = found.items() if isinstance(found, dict) else enumerate(found, 1) if isinstance(found, list) else ()
    if not isinstance(found, dict | list):
        raise ConfigError(f"{path} {_NO_LIBRARY}")
    for name, one in named:
        where = f"{path}, {name!r}" if isinstance(found, dict) else f"{path}, entry {name}"
        entry = one if isinstance(one, dict) else {"prompt": one}
        if not isinstance(entry.get("prompt"), str) or entry.keys() - {"prompt", _STRENGTH}:
            raise ConfigError(f"{where}: this {_NO_LIBRARY}")
        strength = entry.get(_STRENGTH)
        unused = f"{_STRENGTH} {strength}" if strength not in (None, 1) else ""
        if entry["prompt"].strip():
            yield PromptRow(prompt=_text(entry["prompt"]), where=where, unused=unused)


def unused_words(rows: Iterable[PromptRow]) -> list[str]:
    """What prompts say that nothing here does, a sentence for each thing."""
    of: dict[str, list[str]] = {}
    for row in rows:
        if row.unused:
            of.setdefault(row.unused, []).append(row.where)
    return [
        f"{unused} is not used: {', '.join(where[:3])}{' and others' if len(where) > 3 else ''}. A LoRA's weight is that of "
        "all prompts of a call: --lora version:N@WEIGHT."
        for unused, where in of.items()
    ]


def _row(record: dict[str, Any], where: str) -> PromptRow:
    cells = {name: _text(value) for name, value in record.items()}
    if not cells.get("prompt"):
        raise ConfigError("the prompt is empty.")
    return PromptRow(
        prompt=cells["prompt"],
        negative_prompt=cells.get("negative_prompt") or None,
        seeds=parse_seeds(cells["seed"]) if cells.get("seed") else None,
        sizes=parse_sizes(cells["size"]) if cells.get("size") else None,
        where=where,
    )


def _text(value: Any) -> str:
    """A cell as text; a number that a table with empty cells holds as 7.0 is 7. Nothing and NaN are empty."""
    if value is None or value != value:
        return ""
    text = str(int(value) if isinstance(value, float) and value.is_integer() else value).strip()
    return text.encode("utf-8", "replace").decode()  # JSON can hold half of a surrogate pair
