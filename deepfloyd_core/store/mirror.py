"""A workspace in a bucket, and the folder of this machine that mirrors it. All other code works with that folder.

`<prefix>/objects/AB/SHA256` has the bytes of files, once, however many artifacts have them: what is a hard link on a disk is
a reference here. `<prefix>/records/` has the manifests and the other records under the names that they have in the folder.
An artifact is there when its manifest is, which is written last, under the condition that there is none.

The folder has the record of everything, and the files of what was used here (`mirror_files.py`). `refresh` brings records.
The bucket decides: a record is written there first, and an artifact that another machine removed there goes here as well.
`.bucket/` in the folder tells which workspace it mirrors, and of each record the ETag that it had in the bucket. A folder
without `.bucket/` is a plain workspace, and costs one look for it.
"""

import json
import logging
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TypeVar

from deepfloyd_core.errors import ArtifactError, StorageError
from deepfloyd_core.files import read_sealed, sealed_bytes, write_bytes, write_sealed
from deepfloyd_core.store.bucket import Bucket
from deepfloyd_core.store.file_faults import written
from deepfloyd_core.store.locks import artifact_lock, create_workspace, locked, locked_if_free
from deepfloyd_core.store.manifest import MANIFEST, read_manifest
from deepfloyd_core.store.working_state import REQUEST
from deepfloyd_core.types import Json

log = logging.getLogger(__name__)

FOLDER = ".bucket"  # of a mirror
RECORDS = "records/"
PLACE = "place.json"
PARTS = "parts"  # files on their way
_SEEN = "seen"  # a file for each record, with its ETag
_VERSIONS = "versions/"
# What else is below RECORDS is none of ours, and is not written to a disk.
_NAMES = re.compile(
    r"versions/\d{4,}\.json|versions/events/\d{6,}\.json|held_out/\d+\.json|collected/\w+-[0-9a-f]{16}\.json"
    rf"|\w+/[0-9a-f]{{16}}/{re.escape(MANIFEST)}"
)
_AT_ONCE = 8
_OLD_S = 86400.0
T = TypeVar("T")
R = TypeVar("R")


class RacedError(StorageError):
    """Another machine wrote a record of this name first."""


@dataclass(frozen=True)
class Mirror:
    """A folder that mirrors a workspace in a bucket."""

    workspace: Path
    url: str
    id: str  # of this folder, on this machine

    @property
    def bucket(self) -> Bucket:
        """A connection, of this process."""
        return _connected(self.url)

    def seen(self, name: str) -> Path:
        """The file with the ETag that a record had in the bucket. name: its path in the folder."""
        return self.workspace / FOLDER / _SEEN / name.replace("/", ":")


_mirrors: dict[tuple[int, Path], Mirror] = {}
_buckets: dict[tuple[int, str], Bucket] = {}
fences: dict[Path, Callable[[], None]] = {}  # by workspace: raises unless this run still has its turn


def _connected(url: str) -> Bucket:
    key = os.getpid(), url  # s3fs does not survive a fork
    if key not in _buckets:
        _buckets[key] = Bucket(url)
    return _buckets[key]


def mirror_of(workspace: Path) -> Mirror | None:
    """The mirror that a workspace is; None: a plain folder."""
    key = os.getpid(), workspace
    if key not in _mirrors:
        file = workspace / FOLDER / PLACE
        if not file.exists():
            return None
        record = read_sealed(file, f"Remove {workspace}: it mirrors a bucket, and is filled again")
        _mirrors[key] = Mirror(workspace, str(record["url"]), str(record["id"]))
    return _mirrors[key]


def mirror_of_artifact(folder: Path) -> Mirror | None:
    """The mirror in which the directory of an artifact is, also by a link to it."""
    return mirror_of((folder.resolve() if folder.is_symlink() else folder).parent.parent)


def open_mirror(url: str, workspace: Path) -> Mirror:
    """Make a folder the mirror of a workspace in a bucket, and bring its records. Raises StorageError where that fails."""
    create_workspace(workspace)
    with written(workspace), locked(workspace, "mirror", quiet=True):
        file = workspace / FOLDER / PLACE
        is_new = not file.exists()
        if is_new:
            if any(child.name != ".locks" for child in workspace.iterdir() if child.name != FOLDER):
                raise StorageError(f"{workspace} is to mirror {url}, and holds something else. Move that away.")
            file.parent.mkdir(exist_ok=True)
            for name in (_SEEN, PARTS):
                (file.parent / name).mkdir(exist_ok=True)
            write_sealed(file, {"url": url, "id": secrets.token_hex(8)})
        mirror = mirror_of(workspace)
        assert mirror is not None
        if mirror.url != url:
            raise StorageError(f"{workspace} mirrors {mirror.url}, not {url}. Set another `workspace_cache`.")
        _clean(mirror)
        try:
            refresh(mirror)
        except StorageError:
            if is_new:  # of a URL that is wrong, or may not be read
                shutil.rmtree(workspace / FOLDER)
                del _mirrors[os.getpid(), workspace]
            raise
    return mirror


def _clean(mirror: Mirror) -> None:
    """Remove files that were on their way in processes that were killed."""
    for part in (mirror.workspace / FOLDER / PARTS).iterdir():
        with suppress(FileNotFoundError):
            if time.time() - part.lstat().st_mtime > _OLD_S:
                shutil.rmtree(part) if part.is_dir() else part.unlink()


def refresh(mirror: Mirror, below: str = "") -> None:
    """Bring the records that the bucket has and this folder lacks or has otherwise, and drop what was removed there.

    below: only those whose names begin so.
    """
    listed = mirror.bucket.list(RECORDS + below)
    there = {below + name: each for name, each in listed.items() if _NAMES.fullmatch(below + name)}
    seen = {file.name.replace(":", "/"): file.read_text() for file in (mirror.workspace / FOLDER / _SEEN).iterdir()
            if file.name.replace(":", "/").startswith(below) and not file.name.startswith(".")}  # fmt: skip
    gone = sorted(seen.keys() - there.keys())
    if lost := [name for name in gone if name.startswith(_VERSIONS)]:
        raise ArtifactError(
            f"{mirror.url} lacks {lost[0]}, which it had. Restore it from a backup of the bucket ({mirror.workspace} has a "
            "copy); if the workspace was emptied on purpose, remove that folder."
        )
    changed = [name for name, each in there.items() if seen.get(name) != each.etag or _is_lost(mirror, name)]
    at_once(lambda name: _pull_record(mirror, name, there[name].changed_s), changed)
    for name in gone:
        _drop_here(mirror, name)


def _is_lost(mirror: Mirror, name: str) -> bool:
    """Whether a record is not here, or, of a version, damaged; `restore` looks at the manifests that are used."""
    file = mirror.workspace / name
    if name.startswith(_VERSIONS):
        try:
            read_sealed(file, "It is brought again")
        except (ArtifactError, OSError):
            return True
    return not file.exists()


def has_records(mirror: Mirror) -> bool:
    """Whether the bucket had any record when it was last asked."""
    return any((mirror.workspace / FOLDER / _SEEN).iterdir())


def leads_inside(name: str) -> bool:
    """Whether a file's name in a record from a bucket leads to a place inside of the directory that the record is of."""
    return bool(name) and not set(name) & set("\\\0:") and not {"", ".", ".."} & set(name.split("/"))


def write_record(workspace: Path, file: Path, record: Json, *, once: bool = False) -> None:
    """Write a sealed record of a workspace; of one in a bucket there first. once: it must not be there yet.

    Raises RacedError when another machine wrote it first.
    """
    mirror = mirror_of(workspace)
    if mirror is None:
        write_sealed(file, record)
        return
    data, name = sealed_bytes(record), str(file.relative_to(workspace))
    check_turn(workspace)
    etag = mirror.bucket.put_new(RECORDS + name, data) if once else mirror.bucket.put(RECORDS + name, data)
    if etag is None:
        raise RacedError(f"Another machine wrote {name} of {mirror.url} at this moment. Run the same command again.")
    write_bytes(file, data)
    mirror.seen(name).write_text(etag)


def drop_record(workspace: Path, file: Path) -> None:
    """Remove a record of a workspace, if it is there."""
    mirror, name = mirror_of(workspace), str(file.relative_to(workspace))
    if mirror is not None and mirror.seen(name).exists():
        mirror.bucket.delete(RECORDS + name)
        mirror.seen(name).unlink()
    file.unlink(missing_ok=True)


def check_turn(workspace: Path) -> None:
    """Raise unless the run of this process, if it has one, still has its turn in the workspace."""
    if fence := fences.get(workspace):
        fence()


def _pull_record(mirror: Mirror, name: str, changed_s: float) -> None:
    """Bring a record. changed_s: when it was written, by the store's clock. That is its time here, too: the age of a version
    follows from it.
    """
    found = mirror.bucket.get(RECORDS + name)
    if found is None:
        return  # removed meanwhile
    data, etag = found
    file = mirror.workspace / name
    if file.name != MANIFEST:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(file, data)
        os.utime(file, (changed_s, changed_s))
    else:
        artifact = f"{file.parent.parent.name}/{file.parent.name}"
        with locked_if_free(mirror.workspace, artifact_lock(artifact)) as free:
            if not free:
                return  # somebody makes it here, too; the next refresh decides
            if not place_manifest(file, data):
                log.warning("%s: %s names files outside of its artifact: it is not used", mirror.url, name)
                return
    mirror.seen(name).write_text(etag)


def place_manifest(file: Path, data: bytes) -> bool:
    """Write the manifest of an artifact that another machine finished, and remove files that it has otherwise. Returns
    whether it may be one: what lies in a bucket may be anybody's.
    """
    folder, new = file.parent, dict[str, str]()
    with suppress(ValueError, KeyError, TypeError):  # whoever reads it tells that it is damaged
        new = {str(each["path"]): str(each["sha256"]) for each in json.loads(data)["files"]}
    if not all(map(leads_inside, new)):
        return False
    if (folder / REQUEST).exists():
        shutil.rmtree(folder)
    elif file.exists():
        with suppress(ArtifactError):
            for entry in read_manifest(folder).files:
                if new.get(entry.path) != entry.sha256:
                    (folder / entry.path).unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(file, data)
    with suppress(ArtifactError):  # as it is on the machine that made it: the order of artifacts follows from it
        made = read_manifest(folder).provenance
        finished = datetime.fromisoformat(made.started).timestamp() + made.seconds
        os.utime(file, (finished, finished))
    return True


def _drop_here(mirror: Mirror, name: str) -> None:
    """Remove what another machine has removed from the bucket."""
    file = mirror.workspace / name
    if file.name == MANIFEST:
        kind, fingerprint = file.parent.parent.name, file.parent.name
        with locked_if_free(mirror.workspace, artifact_lock(f"{kind}/{fingerprint}")) as free:
            if not free:
                return
            part = mirror.workspace / FOLDER / PARTS / secrets.token_hex(8)
            with suppress(FileNotFoundError):
                file.parent.rename(part)
                shutil.rmtree(part)
    else:
        file.unlink(missing_ok=True)
    mirror.seen(name).unlink(missing_ok=True)


def at_once(work: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """The results for several items, a few at once. Raises the first error."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(work, items))
