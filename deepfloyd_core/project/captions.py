"""Where the captions of a folder are: text files, a table in the folder, the files' names, or nowhere.

Each possibility is tried as the data set that a run would read, on the pictures of the sample: so what counts is not
that a caption file is there, but that a run gets captions from it.
"""

import csv
import re
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.parquet as pq

from deepfloyd_core.config.data_blocks import CaptionTable
from deepfloyd_core.config.data_sets import ImageDataset
from deepfloyd_core.errors import ConfigError, DataError
from deepfloyd_core.files import parsed_json
from deepfloyd_core.index.captions import finished_captions, missing_caption, raw_captions
from deepfloyd_core.sources.listing import text_encoding
from deepfloyd_core.sources.names import words
from deepfloyd_core.sources.tables import TABLE_KINDS
from deepfloyd_core.store.counts import many

ENOUGH = 0.5  # of the pictures must get a caption from files or a table
ENOUGH_NAMES = 0.8  # of the names must be words
_LINE_BYTES = 1 << 20  # of the first line of a table
_FILE_COLUMNS = (
    "file_name",
    "filename",
    "file",
    "image",
    "image_path",
    "image_name",
    "path",
    "filepath",
    "name",
    "id",
    "key",
)
_TEXT_COLUMNS = ("caption", "captions", "text", "texts", "prompt", "description")
# Words that cameras and programs put into names.
_MACHINE_WORDS = words(
    "img image images dsc dscn dscf dcim pxl mvimg vid burst portrait night cover photo photos pic picture pictures scan "
    "screenshot screen shot whatsapp signal telegram received untitled unnamed download file copy of at from edited bild "
    "foto fotos kopie frame page fb insta jpg jpeg png heic am pm final new and the"
)
_NUMBER_AT_END = r"[ _-]*\(?\d+\)?$"  # of `a red car 01`, `a red car (2)`


@dataclass(frozen=True)
class CaptionsSeen:
    """The best source of captions."""

    strategy: str  # textfile, csv, jsonl, parquet, filename; instanceprompt: there are none
    texts: tuple[tuple[str, ...], ...]  # of the pictures of the sample that have some
    missing: int = 0  # pictures of the sample without one
    fault: str = ""  # of one of these: why
    table: CaptionTable | None = None
    strips_numbers: bool = False  # numbers at the end of names
    beside: str = ""  # captions that are there and are not used, in words

    @property
    def share(self) -> float:
        """Share of the pictures with a caption."""
        return len(self.texts) / max(1, len(self.texts) + self.missing)

    @property
    def most(self) -> int:
        """The largest number of captions of a picture."""
        return max(map(len, self.texts), default=1)


NONE = CaptionsSeen("instanceprompt", ())
FILTERS = (_NUMBER_AT_END,)  # of a data set with captions from names


def caption_table(name: str) -> bool:
    """Whether a file may be a table of captions: one in the folder itself, by its ending."""
    return "/" not in name and PurePosixPath(name).suffix.lower() in TABLE_KINDS


def seen_captions(folder: Path, names: list[str], with_text: int, tables: list[str]) -> CaptionsSeen:
    """The captions of a folder, tried on some of its pictures. with_text: pictures with a caption file beside them."""
    beside = []
    if with_text:
        found = _tried(_dataset(folder, "textfile"), names)
        if found.share >= ENOUGH:
            return found
        told = f"{len(found.texts)} of {many(len(names), 'picture')} with a caption file"
        beside.append(f"{told} ({found.fault})" if found.fault and not found.texts else told)
    for table in tables:
        found = _best_of_table(folder, table, names)
        if found.share >= ENOUGH:
            return found
        beside.append(found.beside)
    worded = sum(is_worded(PurePosixPath(name).stem) for name in names)
    if worded >= ENOUGH_NAMES * len(names) and len({*map(_words_of, names)}) > len(names) / 2:
        return _tried(_dataset(folder, "filename", caption_filter_list=FILTERS), names, strips_numbers=True)
    return CaptionsSeen(NONE.strategy, (), beside="; ".join(beside))


def is_worded(stem: str) -> bool:
    """Whether a file's name is a text: three or more words, most of which no camera or program writes."""
    parts = re.findall(r"[^\W\d_]+", stem)
    told = [word for word in parts if word.lower() not in _MACHINE_WORDS]
    return len(parts) >= 3 and len(told) >= 2 and bool(re.search(r"[ _]", stem))


def _words_of(name: str) -> str:
    return re.sub(_NUMBER_AT_END, "", PurePosixPath(name).stem)


def _dataset(folder: Path, strategy: str, **keys: object) -> ImageDataset:
    values = {"id": "look", "type": "local", "instance_data_dir": str(folder), "caption_strategy": strategy, **keys}
    return ImageDataset.model_validate(values)


def _tried(dataset: ImageDataset, names: list[str], strips_numbers: bool = False) -> CaptionsSeen:
    """What a run gets of a data set. Raises ConfigError or DataError for a table that it cannot read."""
    texts, fault, missing = [], "", 0
    column = pa.chunked_array([pa.array(names, pa.string())])
    for name, found in zip(names, raw_captions(dataset, column).to_pylist(), strict=True):
        raw = found["raw"]
        captions = finished_captions(dataset, raw, 0)
        if captions:
            texts.append(tuple(captions))
        else:
            missing += 1
            fault = fault or f"{name}: {found['fault'] or missing_caption(dataset, name, raw)}"
    return CaptionsSeen(dataset.caption_strategy, tuple(texts), missing, fault, dataset.parquet, strips_numbers)


def _best_of_table(folder: Path, name: str, names: list[str]) -> CaptionsSeen:
    """The captions that a table has for the pictures; without any, `beside` says why."""
    path = folder / name
    try:
        columns = _columns(path)
        file, text = _among(_FILE_COLUMNS, columns), _among(_TEXT_COLUMNS, columns)
        if file is None or text is None:
            lacks = "names of files" if file is None else "captions"
            return CaptionsSeen(NONE.strategy, (), beside=f"{name} has no column that is known for {lacks}")
        tried = []
        for with_extension in (True, False):
            keys: dict[str, str | bool] = {"path": str(path), "filename_column": file, "caption_column": text}
            keys |= {"identifier_includes_extension": True} if with_extension else {}
            table = CaptionTable.model_validate(keys)
            dataset = _dataset(folder, TABLE_KINDS[path.suffix.lower()].replace("tsv", "csv"), parquet=table)
            try:
                tried.append(_tried(dataset, names))
            except DataError as error:
                tried.append(CaptionsSeen(NONE.strategy, (), beside=f"{name} is not used ({error})"))
            if tried[-1].share >= ENOUGH:
                return tried[-1]
    except (ConfigError, OSError, ValueError, NotImplementedError, csv.Error) as error:  # pyarrow's too
        return CaptionsSeen(NONE.strategy, (), beside=f"{name} cannot be read as a table ({error})")
    best = max(tried, key=lambda one: one.share)
    told = f"{name} has captions of {len(best.texts)} of {many(len(names), 'picture')}"
    return best if best.beside else CaptionsSeen(NONE.strategy, (), beside=told)


def _columns(path: Path) -> list[str]:
    """The names of a table's columns, from its first line or its schema."""
    kind = TABLE_KINDS[path.suffix.lower()]
    if kind == "parquet":
        return list(pq.read_schema(path).names)
    with path.open("rb") as handle:
        encoding = text_encoding(handle.read(4))
    with path.open(encoding=encoding, newline="") as handle:
        lines = (handle.readline(_LINE_BYTES) for _ in range(10))
        first = next((line for line in lines if line.strip()), "")
    if kind == "jsonl":
        record = parsed_json(first or "{}")
        return list(record) if isinstance(record, dict) else []
    return next(islice(csv.reader([first], delimiter="\t" if kind == "tsv" else ","), 1), [])


def _among(known: tuple[str, ...], columns: list[str]) -> str | None:
    """The first known name that a column has, as the table spells it."""
    lowered = {column.strip().lower(): column for column in columns}
    return next((lowered[name] for name in known if name in lowered), None)
