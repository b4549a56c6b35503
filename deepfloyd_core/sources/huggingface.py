"""A Hugging Face data set: one saved on this machine, or one that `load_dataset` finds by name.

A cell has a picture's bytes or names a file. Whoever made the table may name any, so the rules of local folders hold:
regular files inside of the data set's folder, or for one of the hub of the library's caches.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from deepfloyd_core.config.base import is_file, is_folder
from deepfloyd_core.config.data_sets import ImageDataset
from deepfloyd_core.errors import ConfigError
from deepfloyd_core.files import file_pieces
from deepfloyd_core.sources.folder import leads_out
from deepfloyd_core.sources.listing import FILE_BYTES, Listed, Raw, Texts, cell_text


class Saved:
    """`type = huggingface`. A picture's name is the number of its row."""

    threads, lost = 0, "unreadable"

    def __init__(self, dataset: ImageDataset) -> None:
        self.name, self._image = f"{dataset.dataset_name}[{dataset.split}]", dataset.image_column
        own = dataset.caption_strategy == "huggingface"
        self._captions = _columns(dataset.caption_column) if own else ()
        self._fallback = _columns(dataset.fallback_caption_column) if own else ()
        self._dataset = dataset
        self._load()

    def _load(self) -> None:
        self._rows = _open(self._dataset)
        missing = [
            name for name in (self._image, *self._captions, *self._fallback) if name not in self._rows.column_names
        ]
        if missing:
            known = ", ".join(self._rows.column_names)
            raise ConfigError(
                f"{self._dataset.id}: {self.name} has no column {missing[0]!r}; it has {known}. Set image_column and "
                "caption_column."
            )
        self._pictures = _undecoded(self._rows.select_columns([self._image]), self._dataset)
        self._places = _places(self._dataset)

    def listing(self) -> Iterator[Listed]:
        """Every row."""
        self._load()  # it may have been saved again since
        version = self._rows._fingerprint  # the library's own word for "these rows"
        for number in range(len(self._rows)):
            yield Listed(f"{number:08d}", 0, f"{version}:{number}")

    def pieces(self, name: str) -> Iterator[bytes]:
        """The bytes in the row's cell, or of the file that it names, a piece at a time."""
        cell = self._pictures[int(name)][self._image]
        if cell is None or not (cell["bytes"] or cell["path"]):
            raise FileNotFoundError(f"{self.name}: row {name} has no picture")
        if cell["bytes"]:
            yield bytes(cell["bytes"])
            return
        path = Path(cell["path"])
        try:
            if self._dataset.follow_links or not leads_out(path, self._places):
                yield from file_pieces(path, FILE_BYTES)
                return
        except (RuntimeError, ValueError) as error:  # a link to itself before Python 3.13, a zero byte in a name
            raise OSError(f"row {name} names {str(path)!r}: {error}") from None
        raise OSError(
            f"row {name} names {path}, out of {self._places[0]}; set follow_links = true to use what it names"
        )

    def texts(self, names: list[str]) -> list[Texts]:
        """The captions in the row's columns; a list in a cell is several."""
        rows = self._rows.select_columns(list(dict.fromkeys((*self._captions, *self._fallback))))
        cells = (rows[int(name)] for name in names)
        return [Texts(_texts(row, self._captions) or _texts(row, self._fallback)) for row in cells]


def _columns(given: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else given or ()


def _texts(row: dict[str, Any], columns: tuple[str, ...]) -> Raw:
    cells = [row[name] if isinstance(row[name], list) else [row[name]] for name in columns]
    texts = (cell_text(part) for cell in cells for part in cell)
    return tuple(text for text in texts if text.strip()) or None


def _open(dataset: ImageDataset) -> Any:
    try:
        import datasets
    except ImportError:
        raise ConfigError(
            f"{dataset.id}: type is 'huggingface', and the package datasets is not installed. pip install "
            "'deepfloyd-pipeline[huggingface]'."
        ) from None
    datasets.disable_progress_bars()
    name = dataset.dataset_name or ""
    place = Path(name)
    saved = is_file(place / "state.json") or is_file(place / "dataset_dict.json")
    try:
        found = datasets.load_from_disk(str(place)) if saved else datasets.load_dataset(name, revision=dataset.revision)
    except (OSError, ValueError, KeyError, TypeError, datasets.exceptions.DatasetsError) as error:
        raise ConfigError(
            f"{dataset.id}: dataset_name {dataset.dataset_name!r} cannot be opened ({type(error).__name__}: {error}). "
            "Give a folder made by save_to_disk, a folder of Parquet files or pictures, or a name on the hub."
        ) from None
    if not isinstance(found, dict):
        return found
    if dataset.split not in found:
        raise ConfigError(f"{dataset.id}: split is {dataset.split!r}; the data set has {', '.join(map(repr, found))}.")
    return found[dataset.split]


def _places(dataset: ImageDataset) -> list[Path]:
    """Where files may lie that cells name."""
    from huggingface_hub.constants import HF_HUB_CACHE

    import datasets

    folder = Path(dataset.dataset_name or "")
    if is_folder(folder):
        return [folder.resolve()]
    caches = (datasets.config.HF_DATASETS_CACHE, datasets.config.DOWNLOADED_DATASETS_PATH, HF_HUB_CACHE)
    return [Path(place).resolve() for place in caches]


def _undecoded(rows: Any, dataset: ImageDataset) -> Any:
    import datasets

    try:
        return rows.cast_column(dataset.image_column, datasets.Image(decode=False))
    except (ValueError, TypeError, pa.ArrowException) as error:
        raise ConfigError(
            f"{dataset.id}: column {dataset.image_column!r} does not hold pictures ({error}). Set image_column."
        ) from None
