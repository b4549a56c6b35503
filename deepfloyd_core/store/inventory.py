"""What lies in a workspace: its artifacts, finished or not, with every file's size and links; and what else is there.

An artifact is a directory `<kind>/<fingerprint>` whose record says so: a manifest of that kind and fingerprint, or, of
an unfinished one, the request from which the fingerprint follows. Nothing else is one, whatever it is called, and no
symbolic link is followed. Reads every manifest, and asks the file system for every file: 1 s for 100,000 files.
"""

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from deepfloyd_core.errors import ArtifactError
from deepfloyd_core.store.artifacts import FINGERPRINT, Request
from deepfloyd_core.store.collected import FOLDER as COLLECTED
from deepfloyd_core.store.collected import GONE
from deepfloyd_core.store.lineage import artifact_names
from deepfloyd_core.store.locks import artifact_lock, is_locked
from deepfloyd_core.store.manifest import MANIFEST, Manifest, read_manifest
from deepfloyd_core.store.mirror_files import is_held
from deepfloyd_core.store.unfinished import read_request
from deepfloyd_core.store.working_state import REQUEST

TENSORBOARD = "tensorboard"  # folder of the workspace: `<kind>-<fingerprint>/` of each training that is shown there
# What else the program keeps in a workspace; `gc` never removes it.
_RECORDS = {COLLECTED, TENSORBOARD, "held_out", "preview.png", "versions", "wandb"}
_DIFF = re.compile(r"diff_\d+_\d+\.png")  # of `deepfloyd diff`


_BUCKET = -1  # the device of what is in the bucket of the workspace


class FileLink(NamedTuple):
    """A name of a file. A file with several names is freed when the last one is removed."""

    device: int
    inode: int
    links: int  # names of the file, here and elsewhere
    bytes: int


@dataclass(frozen=True)
class Stored:
    """An artifact in a workspace."""

    name: str
    finished: bool
    changed: float  # when the manifest was written; of an unfinished one the last change of a file. Unix time, s
    inputs: tuple[str, ...]  # names of artifacts
    weights: tuple[str, ...]  # names of the artifacts that hold the weights that its training started from
    files: tuple[FileLink, ...]
    locked: bool  # a run, or a job that outlived its run, writes it

    @property
    def kind(self) -> str:
        """The kind of artifact."""
        return self.name.partition("/")[0]

    @property
    def bytes(self) -> int:
        """The size of its files, also of those that it shares with others."""
        return bytes_on_disk(self.files)


@dataclass(frozen=True)
class Leftover:
    """What a killed `gc` had not removed yet, or the TensorBoard folder of an artifact that is not there."""

    path: Path
    files: tuple[FileLink, ...]
    changed: float  # the last change of a file. Unix time, s

    @property
    def is_gone(self) -> bool:
        """Whether a `gc` has already decided that it goes."""
        return self.path.name.startswith(GONE)


@dataclass(frozen=True)
class Inventory:
    """The contents of a workspace."""

    artifacts: tuple[Stored, ...]  # by kind, and by fingerprint
    leftovers: tuple[Leftover, ...]
    damaged: tuple[tuple[Path, str], ...]  # directories that look like artifacts, and why they are none
    foreign: tuple[Path, ...]  # files and folders that the program did not write


def bytes_on_disk(files: Iterable[FileLink]) -> int:
    """The size of files, each counted once, however many names it has."""
    return sum({(file.device, file.inode): file.bytes for file in files}.values())


def take_inventory(workspace: Path) -> Inventory:
    """Read a workspace. Takes no lock: what is removed meanwhile is left out."""
    read = _Reader(workspace)
    for folder in _entries(workspace):
        if folder.name.startswith(".") or folder.name in _RECORDS or _DIFF.fullmatch(folder.name):
            continue
        if folder.is_symlink() or not folder.is_dir():
            read.foreign.append(folder)
        else:
            read.kind(folder)
    read.tensorboard()
    return read.inventory()


class _Reader:
    """Collects the contents of a workspace."""

    def __init__(self, workspace: Path) -> None:
        self.workspace = workspace
        self.records: dict[str, Manifest | Request] = {}  # by the artifact's name; a Request of an unfinished one
        self.leftovers: list[Leftover] = []
        self.damaged: list[tuple[Path, str]] = []
        self.foreign: list[Path] = []
        self._named = Counter[str]()  # how many files of artifacts have these bytes

    def kind(self, folder: Path) -> None:
        """Read a folder at the top of a workspace. One without anything like an artifact is foreign as a whole."""
        before, others = self._count(), list[Path]()
        for path in _entries(folder):
            if path.is_symlink() or not path.is_dir():
                others.append(path)
            elif FINGERPRINT.fullmatch(path.name.removeprefix(GONE)) and path.name.startswith(GONE):
                self.leftovers.append(Leftover(path, tuple(_links(path)), last_change(path)))
            elif not FINGERPRINT.fullmatch(path.name) or not self._artifact(path):
                others.append(path)
        ours = self._count() > before or any(FINGERPRINT.fullmatch(path.name) for path in others)
        self.foreign += others if ours else [folder] if others else []

    def _count(self) -> int:
        return len(self.records) + len(self.leftovers) + len(self.damaged)

    def _artifact(self, path: Path) -> bool:
        """Read a directory with an artifact's name. Returns whether it is one, intact or damaged."""
        name = f"{path.parent.name}/{path.name}"
        try:
            if (path / MANIFEST).exists():
                record = read_manifest(path)
                if f"{record.kind}/{record.fingerprint}" != name:
                    raise ArtifactError(f"{path} holds the manifest of {record.kind} {record.fingerprint}")
                self.records[name] = record
            elif (path / REQUEST).exists():
                self.records[name] = read_request(path)
            else:
                return False
        except ArtifactError as error:
            self.damaged.append((path, str(error)))
        except OSError as error:
            if path.exists():  # else it was removed meanwhile
                self.damaged.append((path, f"{path} cannot be read: {error}"))
        return True

    def tensorboard(self) -> None:
        """The TensorBoard folders of artifacts that do not exist are leftovers; those of others belong to them."""
        known = set(map(artifact_lock, self.records))
        known |= {f"{path.parent.name}-{path.name}" for path, _ in self.damaged}
        for path in _entries(self.workspace / TENSORBOARD):
            if path.name in known:
                continue
            if path.is_dir() and not path.is_symlink() and FINGERPRINT.fullmatch(path.name.rpartition("-")[2]):
                self.leftovers.append(Leftover(path, tuple(_links(path)), last_change(path)))
            else:
                self.foreign.append(path)

    def inventory(self) -> Inventory:
        """Everything that was read."""
        holders, stored = _holders(self.records), []
        for name, record in sorted(self.records.items(), key=lambda pair: pair[0]):
            finished, path = isinstance(record, Manifest), self.workspace / name
            with suppress(FileNotFoundError):  # removed meanwhile
                changed = (path / MANIFEST).stat().st_mtime if finished else last_change(path)
                own = self._in_bucket(record) if isinstance(record, Manifest) and is_held(path) else _links(path)
                files = (*own, *_links(tensorboard_folder(self.workspace, name)))
                inputs, weights = artifact_names(record.inputs), holders.get(record.inputs.get("parent", ""), ())
                locked = is_locked(self.workspace, artifact_lock(name))
                stored.append(Stored(name, finished, changed, tuple(inputs), weights, files, locked))
        return Inventory(tuple(stored), tuple(self.leftovers), tuple(self.damaged), tuple(self.foreign))

    def _in_bucket(self, record: Manifest) -> Iterator[FileLink]:
        """The files of an artifact as they are in the bucket of the workspace: each once, for all that name it."""
        for file in record.files:
            yield FileLink(_BUCKET, int(file.sha256[:16], 16), self._names_of(file.sha256), file.bytes)

    def _names_of(self, sha256: str) -> int:
        if not self._named:
            finished = (record for record in self.records.values() if isinstance(record, Manifest))
            self._named.update(file.sha256 for record in finished for file in record.files)
        return self._named[sha256]


def tensorboard_folder(workspace: Path, name: str) -> Path:
    """What TensorBoard reads of a training; it need not exist. name: of the artifact."""
    return workspace / TENSORBOARD / artifact_lock(name)


def last_change(folder: Path) -> float:
    """When a file below a folder last changed, or the folder itself. Unix time, s."""
    times = [folder.stat().st_mtime]
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                times.append(Path(place, name).lstat().st_mtime)
    return max(times)


def _holders(records: Mapping[str, Manifest | Request]) -> dict[str, tuple[str, ...]]:
    """The artifacts that hold the weights that a training started from, by the sha256 of these weights."""
    parents = {record.inputs["parent"] for record in records.values() if "parent" in record.inputs}
    found: dict[str, list[str]] = {}
    for name, record in records.items():
        if parents and isinstance(record, Manifest):
            for sha256 in {file.sha256 for file in record.files} & parents:
                found.setdefault(sha256, []).append(name)
    return {sha256: tuple(names) for sha256, names in found.items()}


def _links(folder: Path) -> Iterator[FileLink]:
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                stat = Path(place, name).lstat()
                yield FileLink(stat.st_dev, stat.st_ino, stat.st_nlink, stat.st_size)


def _entries(folder: Path) -> list[Path]:
    """The contents of a folder, by name; none if it is not there."""
    try:
        return sorted(folder.iterdir())
    except FileNotFoundError:
        return []
