"""The files of a workspace in a bucket: brought when they are used, sent when an artifact is finished.

An artifact that is in the bucket needs none of its files here: its manifest is enough to know that it is finished. Whoever
asks for its directory (`Artifact.path`) gets the files. A file that is damaged here is taken from the bucket again; one that
is damaged there is made again by the next run that needs it, like any other.
"""

import hashlib
import logging
import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from deepfloyd_core.errors import ArtifactError, DamagedError
from deepfloyd_core.files import fsync_path
from deepfloyd_core.store.bucket import PIECE
from deepfloyd_core.store.damage import MARK
from deepfloyd_core.store.file_faults import need_room, written
from deepfloyd_core.store.leases import take_lease
from deepfloyd_core.store.locks import artifact_lock, locked_if_free
from deepfloyd_core.store.manifest import MANIFEST, FileEntry, read_manifest
from deepfloyd_core.store.mirror import (
    FOLDER,
    PARTS,
    RECORDS,
    Mirror,
    at_once,
    check_turn,
    fences,
    mirror_of,
    mirror_of_artifact,
    place_manifest,
)
from deepfloyd_core.store.mirror_cache import trim

log = logging.getLogger(__name__)

OBJECTS = "objects/"
_whole: dict[Path, str] = {}  # artifacts that this process has brought, by directory: the ETags of their manifests


def is_held(folder: Path) -> bool:
    """Whether the bucket has an artifact, so that its files need not be here. folder: of the artifact."""
    mirror = mirror_of_artifact(folder)
    return mirror is not None and _seen(mirror, folder).exists()


def is_elsewhere(folder: Path, entry: FileEntry) -> bool:
    """Whether a file of an artifact that the bucket has is not here: no fault, `bring` brings it."""
    if (folder / entry.path).exists():
        return False
    _whole.pop(folder, None)
    return True


def bring(folder: Path) -> None:
    """Bring the files of an artifact that are in the bucket only. Does nothing in a plain workspace.

    Raises DamagedError, and marks the artifact, where the bucket lacks a file or has other bytes.
    """
    mirror = mirror_of_artifact(folder)
    etag = _etag(mirror, folder) if mirror else None
    if mirror is None or etag is None or _whole.get(folder) == etag:
        return
    take_lease(mirror.workspace, _name(folder))
    if missing := [entry for entry in read_manifest(folder).files if entry.misfit(folder)]:
        faults = _fetched(mirror, folder, missing)
        if faults:
            (folder / MARK).touch()
            raise DamagedError(f"{faults[0]}. The next run that needs {folder.parent.name} makes it again.")
    _whole[folder] = etag
    os.utime(_seen(mirror, folder))  # when it was last used
    if missing:
        trim(mirror)


def restore(folder: Path, damage: Callable[[FileEntry, Path], str]) -> bool:
    """Take the files of an artifact that are damaged here from the bucket. Returns whether any was.

    damage: why a file is not as the manifest says; empty: it is.
    """
    mirror = mirror_of_artifact(folder)
    if mirror is None or not _seen(mirror, folder).exists():
        return False
    try:
        damaged = [entry for entry in read_manifest(folder).files if damage(entry, folder)]
    except ArtifactError as error:
        log.warning("%s: its manifest is taken from %s: %s", folder, mirror.url, error)
        data = mirror.bucket.get(f"{RECORDS}{_name(folder)}/{MANIFEST}")
        return data is not None and place_manifest(folder / MANIFEST, data[0])
    if damaged:
        log.warning("%s: %d of its files are taken from %s", folder, len(damaged), mirror.url)
    return len(_fetched(mirror, folder, damaged)) < len(damaged)


def push(folder: Path) -> None:
    """Send a finished artifact to the bucket, its manifest last. Does nothing in a plain workspace."""
    mirror = mirror_of(folder.parent.parent)
    if mirror is None:
        return
    check_turn(mirror.workspace)
    manifest, bucket = read_manifest(folder), mirror.bucket
    data, name = (folder / MANIFEST).read_bytes(), f"{folder.parent.name}/{folder.name}/{MANIFEST}"
    files = {entry.sha256: entry for entry in manifest.files}

    def send(entry: FileEntry) -> None:
        if bucket.size(_object(entry)) != entry.bytes:
            bucket.upload(folder / entry.path, _object(entry))

    at_once(send, files.values())
    check_turn(mirror.workspace)
    etag = bucket.put_new(RECORDS + name, data)
    if etag is None:
        etag = _replaced(mirror, RECORDS + name, data)
    if etag is not None:
        mirror.seen(name).write_text(etag)
        trim(mirror)
    else:
        log.info("%s: another machine made %s/%s meanwhile", mirror.url, folder.parent.name, folder.name)


def push_unsent(mirror: Mirror) -> None:
    """Send the finished artifacts of a mirror that are not in the bucket: a kill came between. The caller has the turn."""
    for file in sorted(mirror.workspace.glob(f"*/*/{MANIFEST}"), key=lambda file: file.stat().st_mtime_ns):
        folder = file.parent
        if not folder.name.startswith(".") and not _seen(mirror, folder).exists():
            with suppress(ArtifactError), locked_if_free(mirror.workspace, artifact_lock(_name(folder))) as free:
                if free and not any(entry.misfit(folder) for entry in read_manifest(folder).files):
                    push(folder)


def _replaced(mirror: Mirror, key: str, data: bytes) -> str | None:
    """Write a manifest over that of the same artifact, made again because it was damaged: by the run that has the turn."""
    while mirror.workspace in fences and (now := mirror.bucket.get(key)):
        check_turn(mirror.workspace)
        if etag := mirror.bucket.put_if(key, data, now[1]):
            return etag
    return None


def _fetched(mirror: Mirror, folder: Path, entries: list[FileEntry]) -> list[str]:
    """Bring files. Returns a clause for each that the bucket lacks, or has with other bytes."""
    need_room(
        mirror.workspace,
        sum(entry.bytes for entry in entries),
        f"What {_name(folder)} of {mirror.url} lacks here takes",
    )
    return [fault for fault in at_once(lambda entry: _fetch(mirror, folder, entry), entries) if fault]


def _fetch(mirror: Mirror, folder: Path, entry: FileEntry) -> str:
    """Bring a file. Returns why the bucket does not have it; empty: it is here now."""
    file, part = folder / entry.path, mirror.workspace / FOLDER / PARTS / secrets.token_hex(8)
    with written(mirror.workspace):
        try:
            with part.open("wb") as out:
                fault = _read(mirror, folder, entry, out.write)
            if not fault:
                fsync_path(part)
                file.parent.mkdir(parents=True, exist_ok=True)
                part.replace(file)
                fsync_path(file.parent)
        finally:
            part.unlink(missing_ok=True)
    return fault


def damage_there(folder: Path, entry: FileEntry) -> str:
    """Why the bucket does not have a file of an artifact as its manifest says; empty: it has. Reads the whole object."""
    mirror = mirror_of_artifact(folder)
    assert mirror is not None
    return _read(mirror, folder, entry, lambda piece: None)


def _read(mirror: Mirror, folder: Path, entry: FileEntry, write: Callable[[bytes], object]) -> str:
    """Read a file's bytes in the bucket, piece by piece. Returns why they are not those of the manifest; empty: they are."""
    key, digest = _object(entry), hashlib.sha256()
    for start in range(0, entry.bytes, PIECE):
        piece = mirror.bucket.piece(key, start, min(start + PIECE, entry.bytes))
        if piece is None:
            return f"{mirror.url} lacks {key}, which is {entry.path} of {_name(folder)}"
        digest.update(piece)
        write(piece)
    if digest.hexdigest() == entry.sha256:
        return ""
    if mirror.workspace in fences:  # whoever makes the file again would find one of its name and size there
        mirror.bucket.delete(key)
    return f"{key} of {mirror.url} has other bytes than its name says"


def _object(entry: FileEntry) -> str:
    return f"{OBJECTS}{entry.sha256[:2]}/{entry.sha256}"


def _name(folder: Path) -> str:
    return f"{folder.parent.name}/{folder.name}"


def _etag(mirror: Mirror, folder: Path) -> str | None:
    """Of an artifact's manifest in the bucket; None: it is not there."""
    try:
        return _seen(mirror, folder).read_text()
    except FileNotFoundError:
        return None


def _seen(mirror: Mirror, folder: Path) -> Path:
    return mirror.seen(f"{_name(folder)}/{MANIFEST}")
