"""Pictures in a directory on this machine, searched recursively.

Pipes and devices are never read. Links that leave the directory are read only if the data set allows it.
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from operator import attrgetter
from pathlib import Path

from deepfloyd_core.config.base import is_folder
from deepfloyd_core.config.data_sets import TABLES, ImageDataset
from deepfloyd_core.errors import ConfigError
from deepfloyd_core.files import file_pieces, read_file
from deepfloyd_core.sources.listing import FILE_BYTES, TEXT_BYTES, Listed, Texts, large_text, printable, read_text
from deepfloyd_core.sources.names import JUNK_FOLDERS, Kind, caption_file, caption_files, kind
from deepfloyd_core.sources.tables import table_path

RACY_NS = 2_000_000_000  # a file this young may change again without a new time of change (FAT counts in 2 s)
_FOLLOW = "set follow_links = true to use what it leads to"
_FOLDERS_AT_ONCE = 8  # whose caption files are remembered: names come folder by folder
_HUB_FOLDERS = ("datasets--", "models--", "spaces--")
Entry = os.DirEntry[str]


class Folder:
    """`type = local`."""

    threads, lost = 0, "unreadable"

    def __init__(self, dataset: ImageDataset) -> None:
        self._root = Path(dataset.instance_data_dir)
        if not is_folder(self._root):
            raise ConfigError(
                f"{dataset.id}: instance_data_dir is {dataset.instance_data_dir!r}, which is not a directory"
                + ("." if self._root.is_absolute() else f" of {Path.cwd()}, where relative paths start.")
            )
        self._real_root = self._root.resolve()
        self._inside = [self._real_root, *_blobs(self._real_root)]
        self.name = str(self._real_root)
        self._dataset = dataset

    def listing(self) -> Iterator[Listed]:
        """The files that may be pictures, other files, and directories that cannot be listed."""
        table = table_path(self._dataset).resolve() if self._dataset.caption_strategy in TABLES else None
        young = time.time_ns() - RACY_NS
        folders, seen = [""], {self._real_root}
        while folders:
            folder = folders.pop()
            try:
                with os.scandir(self._root / folder) as handle:
                    # Sorted: which of several links to a directory is followed names its pictures.
                    entries = {entry.name: entry for entry in sorted(handle, key=attrgetter("name"))}
            except OSError:
                yield Listed(printable(folder or "./"), reason="unreadable")
                continue
            texts = caption_files(entries)
            for name, entry in entries.items():
                if name.startswith("."):
                    continue
                is_folder = self._is_folder(entry)
                if (is_folder or entry.is_symlink()) and name.lower() in JUNK_FOLDERS:
                    yield Listed(printable(f"{folder}{name}/"), kind="other")
                elif is_folder:
                    if self._is_new(entry, seen):
                        folders.append(f"{folder}{name}/")
                elif (what := kind(name)) != "caption" and (table is None or not _is_file(table, entry)):
                    text = caption_file(name, texts)
                    yield self._listed(entry, folder + name, what, young, entries[text] if text else None)

    def pieces(self, name: str) -> Iterator[bytes]:
        """The file's bytes, a piece at a time."""
        return file_pieces(self._root / name, FILE_BYTES)

    def texts(self, names: list[str]) -> list[Texts]:
        """The caption file beside each picture."""

        @lru_cache(_FOLDERS_AT_ONCE)
        def files(folder: str) -> dict[str, str]:
            return caption_files(path.name for path in (self._root / folder).iterdir())

        return [self._text(name, files) for name in names]

    def _text(self, name: str, files: Callable[[str], dict[str, str]]) -> Texts:
        folder, _, last = name.rpartition("/")
        try:
            text = caption_file(last, files(folder))
            if text is None:
                return Texts()
            path = self._root / folder / text
            if fault := self._leads_out(path):
                return Texts(None, f"{text} {fault}")
            if not path.is_file():
                return Texts(None, f"{text} is not a file")
            return (
                large_text(text) if path.stat().st_size > TEXT_BYTES else read_text(read_file(path, TEXT_BYTES), text)
            )
        except (OSError, RuntimeError) as error:
            return Texts(None, str(error), passing=True)

    def _is_folder(self, entry: Entry) -> bool:
        try:
            return entry.is_dir(follow_symlinks=self._dataset.follow_links)
        except OSError:
            return False  # a link that leads to itself

    def _is_new(self, entry: Entry, seen: set[Path]) -> bool:
        """Whether a directory was not listed before: through links it can contain itself."""
        if not self._dataset.follow_links:
            return True
        real = Path(entry.path).resolve()
        new = real not in seen
        seen.add(real)
        return new

    def _leads_out(self, path: Path) -> str | None:
        """Why a link is not followed; None: it is followed, or is no link."""
        if self._dataset.follow_links or not path.is_symlink():
            return None
        if not leads_out(path, self._inside):
            return None
        return f"is a link to {path.resolve()}, out of {self._real_root}; {_FOLLOW}"

    def _listed(self, entry: Entry, source: str, what: Kind, young: int, text: Entry | None) -> Listed:
        if what == "other" or printable(source) != source:
            return Listed(printable(source), reason="name_not_utf8", kind=what)
        try:
            if entry.is_symlink() and (fault := self._leads_out(Path(entry.path))):
                return Listed(source, reason="outside_root", detail=fault)
            if not entry.is_file():
                detail = f"is a link to a folder; {_FOLLOW}" if entry.is_symlink() and entry.is_dir() else None
                return Listed(source, reason="not_a_file", detail=detail)
            return Listed(source, entry.stat().st_size, _stamp(entry, young), self._text_stamp(text, young), kind=what)
        except OSError:
            return Listed(source, reason="unreadable")
        except RuntimeError:
            return Listed(source, reason="not_a_file")  # a link that leads to itself, before Python 3.13

    def _text_stamp(self, text: Entry | None, young: int) -> str:
        if text is None:
            return "none"
        if text.is_symlink() and self._leads_out(Path(text.path)):
            return ""  # what it says changes with the data set's keys
        stamp = _stamp(text, young)
        return f"{text.name}:{stamp}" if stamp else ""


def leads_out(path: Path, places: Iterable[Path]) -> bool:
    """Whether a path, once its links are followed, lies in none of the places, whose links were followed.

    Raises OSError or RuntimeError for a link that leads to itself.
    """
    real = path.resolve()
    return not any(real.is_relative_to(place) for place in places)


def _blobs(root: Path) -> list[Path]:
    """The folder where the links of a Hugging Face cache lead: `blobs` beside `snapshots`, if the directory is one of
    these.
    """
    caches = [parent.parent for parent in root.parents if parent.name == "snapshots"]
    blobs = [cache / "blobs" for cache in caches if cache.name.startswith(_HUB_FOLDERS)]
    return [place for place in blobs if place.is_dir() and not place.is_symlink()]


def _is_file(table: Path, entry: Entry) -> bool:
    return entry.name == table.name and Path(entry.path).resolve() == table


def _stamp(entry: Entry, young: int) -> str:
    try:
        stat = entry.stat()
    except OSError:
        return ""
    if max(stat.st_mtime_ns, stat.st_ctime_ns) > young:
        return ""
    return f"{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}:{stat.st_ino}"
