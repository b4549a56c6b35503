"""A directory on this machine, searched recursively. Links that leave it, pipes and devices are never read."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

from deepfloyd_core.caption_tables import table_path
from deepfloyd_core.datafile import TABLES, ImageDataset
from deepfloyd_core.errors import ConfigError
from deepfloyd_core.sources.listed import Listed, Raw, decoded, printable, text_name

SIDECARS = (".txt", ".json")  # captions and metadata: not inputs
RACY_NS = 2_000_000_000  # a file this young may change again without a new time of change (FAT counts in 2 s)


class Folder:
    """`type = local`."""

    threads, lost = 0, "unreadable"

    def __init__(self, dataset: ImageDataset) -> None:
        self._root = Path(dataset.instance_data_dir)
        if not self._root.is_dir():
            raise ConfigError(
                f"{dataset.id}: instance_data_dir is {dataset.instance_data_dir!r}, which is not a directory. "
                "Relative paths start at the current directory."
            )
        self._real_root = self._root.resolve()
        self.name = str(self._real_root)
        self._dataset = dataset

    def listing(self) -> Iterator[Listed]:
        """The files that may be pictures, and directories that cannot be listed."""
        table = table_path(self._dataset).resolve() if self._dataset.caption_strategy in TABLES else None
        young = time.time_ns() - RACY_NS
        folders = [""]
        while folders:
            folder = folders.pop()
            try:
                with os.scandir(self._root / folder) as handle:
                    entries = list(handle)
            except OSError:
                yield Listed(printable(folder or "./"), reason="unreadable")
                continue
            texts = {entry.name: entry for entry in entries if entry.name.endswith(".txt")}
            for entry in entries:
                name = entry.name
                if name.startswith("."):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    folders.append(f"{folder}{name}/")
                elif not name.lower().endswith(SIDECARS) and not _is_file(table, entry):
                    yield self._listed(entry, folder + name, young, texts.get(text_name(name)))

    def read(self, name: str) -> bytes:
        """The file's bytes."""
        return (self._root / name).read_bytes()

    def texts(self, names: list[str]) -> list[Raw]:
        """NAME.txt beside each picture."""
        return [self._text(self._root / text_name(name)) for name in names]

    def _text(self, path: Path) -> Raw:
        try:
            if not path.is_file() or not path.resolve().is_relative_to(self._real_root):
                return None  # a pipe would never end, and a link may point at anything on this machine
            return decoded(path.read_bytes())
        except (OSError, RuntimeError):
            return None

    def _listed(self, entry: "os.DirEntry[str]", source: str, young: int, text: "os.DirEntry[str] | None") -> Listed:
        if printable(source) != source:
            return Listed(printable(source), reason="name_not_utf8")
        try:
            if entry.is_symlink() and not Path(entry.path).resolve().is_relative_to(self._real_root):
                return Listed(source, reason="outside_root")
            if not entry.is_file():
                return Listed(source, reason="not_a_file")
            return Listed(source, entry.stat().st_size, _stamp(entry, young), _stamp(text, young) if text else "none")
        except OSError:
            return Listed(source, reason="unreadable")
        except RuntimeError:
            return Listed(source, reason="not_a_file")  # a link that leads to itself, before Python 3.13


def _is_file(table: Path | None, entry: "os.DirEntry[str]") -> bool:
    return table is not None and entry.name == table.name and Path(entry.path).resolve() == table


def _stamp(entry: "os.DirEntry[str]", young: int) -> str:
    try:
        stat = entry.stat()
    except OSError:
        return ""
    if max(stat.st_mtime_ns, stat.st_ctime_ns) > young:
        return ""
    return f"{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}:{stat.st_ino}"
