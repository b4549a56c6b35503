"""The artifact contract: a directory is finished when its manifest.json is there, and the manifest is written last.

`<workspace>/<kind>/<fingerprint>/`, the fingerprint taken over (kind, format, spec, inputs) and nothing else: where,
when, on how many workers and on which device something was made changes no bytes and so is not in it. A directory
without a manifest is unfinished: its builder continues it. One `flock` per artifact lets two runs share a workspace;
the kernel frees it when the holder dies, and child processes inherit it, so that a dying trainer still owns its files.
"""

import fcntl
import logging
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path
from typing import Any

from deepfloyd_core.errors import ArtifactError
from deepfloyd_core.files import canonical_json, fsync_path, read_sealed, sha256_bytes, sha256_file, write_sealed
from deepfloyd_core.storage import flock, written

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
LOCKS = ".locks"  # folder of a workspace
_REQUEST = ".request.json"  # of an unfinished artifact
KINDS = (
    "image_index", "text_embeds", "stage1_text", "stage2_text", "stage1_pixels", "stage2_pixels", "eval_set",
    "stage1_conditioning", "eval_conditioning", "stage1_lora", "stage2_low_res", "stage2_lora", "cascade_samples",
    "lora_bundle", "generated",
)  # fmt: skip
_PROVENANCE_PACKAGES = ("torch", "diffusers", "transformers", "peft", "pillow", "imagehash", "pyarrow", "prefect")
_ELSEWHERE = "Set `workspace` to a folder on a local disk"


@dataclass(frozen=True)
class Artifact:
    """A finished artifact; small enough to pass between tasks."""

    kind: str
    fingerprint: str
    path: Path

    @property
    def manifest(self) -> dict[str, Any]:
        """The sealed record: spec, inputs, files, summary, provenance."""
        return read_sealed(self.path / MANIFEST)

    @property
    def summary(self) -> dict[str, Any]:
        """What the builder reported, e.g. counts and metrics."""
        return dict(self.manifest["summary"])

    @property
    def hashes(self) -> dict[str, str]:
        """The recorded sha256 of every file, by its path inside the artifact."""
        return {entry["path"]: entry["sha256"] for entry in self.manifest["files"]}


@dataclass(frozen=True)
class Request:
    """What an artifact is made of. `spec` and `inputs` must be plain JSON values."""

    kind: str
    format: int
    spec: dict[str, Any]
    inputs: dict[str, str]

    @property
    def fingerprint(self) -> str:
        """First 16 hex digits of sha256 over the canonical JSON of (kind, format, spec, inputs)."""
        return sha256_bytes(canonical_json({"kind": self.kind, **self.record}).encode())[:16]

    @property
    def record(self) -> dict[str, Any]:
        """What two requests of a kind can differ in."""
        return {"format": self.format, "spec": self.spec, "inputs": self.inputs}


@dataclass(frozen=True)
class WorkDir:
    """An unfinished artifact under construction. Dot files in it are working state and vanish at the commit."""

    path: Path
    lock_fd: int


Builder = Callable[[WorkDir], dict[str, Any]]


def find(workspace: Path, request: Request) -> Artifact | None:
    """The finished artifact for a request, or None."""
    path = workspace / request.kind / request.fingerprint
    return Artifact(request.kind, request.fingerprint, path) if (path / MANIFEST).exists() else None


def newest(
    workspace: Path, kind: str, format: int, fits: Callable[[dict[str, Any]], bool] = lambda record: True
) -> Artifact | None:
    """The finished artifact of a kind and format that was made last, for what a new one can take over from it.

    `fits`: of those whose manifest it accepts.
    """
    for path in reversed(_by_age(workspace, kind)):
        try:
            record = read_sealed(path / MANIFEST)
            if record["format"] == format and fits(record):
                return Artifact(kind, path.name, path)
        except ArtifactError:
            continue  # damaged: nothing is taken from it
    return None


def materialise(workspace: Path, request: Request, build: Builder, parts: str | None = None) -> tuple[Artifact, bool]:
    """Return the artifact and whether it was reused; build it if it is not there, resuming what a kill left.

    `build` gets the directory, writes its files and returns the summary. Raises whatever `build` raises; the
    directory then stays unfinished. With `parts` (a pattern of file names) a finished artifact is hashed before it is
    reused; of a damaged one those parts stay that are whole. Without, only sizes are compared.
    """
    path = workspace / request.kind / request.fingerprint
    with locked(workspace, f"{request.kind}-{request.fingerprint}") as lock_fd:
        found = find(workspace, request)
        if found is not None:
            damage = verify_artifact(found) if parts else list(_stat_damage(found))
            if not damage:
                log.info("%s %s: reused", request.kind, request.fingerprint)
                return found, True
            log.warning("%s %s: rebuilt because %s", request.kind, request.fingerprint, "; ".join(damage))
            _unfinish(found, parts)
        else:
            _log_why(workspace, request)
            _log_left(workspace, request)
        path.mkdir(parents=True, exist_ok=True)
        write_sealed(path / _REQUEST, request.record)
        started = datetime.now(UTC)
        summary = build(WorkDir(path, lock_fd))
        return commit(path, request, summary, started), False


def commit(path: Path, request: Request, summary: dict[str, Any], started: datetime) -> Artifact:
    """Hash and fsync every file, drop the working state, write the manifest last."""
    hashes = {file: _recorded_hash(file) for file in path.rglob("*") if file.is_file()}
    for entry in list(path.rglob(".*")):
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink(missing_ok=True)
    files = [file for file in sorted(path.rglob("*")) if file.is_file()]
    entries = []
    for file in files:
        fsync_path(file)
        name, digest = str(file.relative_to(path)), hashes.get(file) or sha256_file(file)
        entries.append({"path": name, "bytes": file.stat().st_size, "sha256": digest})
    for folder in {file.parent for file in files} | {path}:
        fsync_path(folder)
    record = {
        "kind": request.kind, "format": request.format, "fingerprint": request.fingerprint,
        "spec": request.spec, "inputs": request.inputs, "files": entries, "summary": summary,
        "provenance": provenance(started),
    }  # fmt: skip
    write_sealed(path / MANIFEST, record)
    log.info("%s %s: built, %d files", request.kind, request.fingerprint, len(files))
    return Artifact(request.kind, request.fingerprint, path)


def provenance(started: datetime) -> dict[str, Any]:
    """When, with which versions, on what: for people, never part of a fingerprint."""
    versions = {name: metadata.version(name) for name in _PROVENANCE_PACKAGES}
    finished = datetime.now(UTC)
    return {
        "started": started.isoformat(timespec="seconds"),
        "seconds": round((finished - started).total_seconds(), 2),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "packages": versions,
    }


@contextmanager
def locked(workspace: Path, name: str) -> Iterator[int]:
    """Hold a workspace's lock `name`, waiting for it if need be; yields its file descriptor for child processes.

    Raises StorageError in place of any OSError of the block.
    """
    path = workspace / LOCKS / name
    with written(workspace):
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, path, _ELSEWHERE)
            except BlockingIOError:
                log.info("%s: another run holds it; waiting", name)
                flock(fd, fcntl.LOCK_EX, path)
            yield fd
        finally:
            os.close(fd)


def is_workspace(path: Path) -> bool:
    """Whether a folder holds artifacts, finished or not."""
    return any((path / name).is_dir() for name in (*KINDS, LOCKS))


def all_artifacts(workspace: Path) -> Iterator[Artifact]:
    """Every finished artifact of a workspace, in the order of KINDS, oldest first."""
    for kind in KINDS:
        for path in _by_age(workspace, kind):
            yield Artifact(kind, path.name, path)


def verify_artifact(artifact: Artifact) -> list[str]:
    """Re-hash one artifact; one line for each thing that is wrong, none when every byte is as written."""
    try:
        record = artifact.manifest
    except ArtifactError as error:
        return [str(error)]
    request = Request(record["kind"], record["format"], record["spec"], record["inputs"])
    damage = list(_stat_damage(artifact))
    if (request.kind, request.fingerprint) != (artifact.kind, artifact.fingerprint):
        damage.append(f"{artifact.path} holds the manifest of {request.kind} {request.fingerprint}")
    for entry in record["files"]:
        file = artifact.path / entry["path"]
        if file.is_file() and file.stat().st_size == entry["bytes"] and sha256_file(file) != entry["sha256"]:
            damage.append(f"{file} has other bytes than its manifest says")
    known = {entry["path"] for entry in record["files"]} | {MANIFEST}
    present = {str(file.relative_to(artifact.path)) for file in artifact.path.rglob("*") if file.is_file()}
    damage += [f"{artifact.path / extra} is not in the manifest" for extra in sorted(present - known)]
    return damage


def finish_part(file: Path, sha256: str | None = None) -> None:
    """Record a finished file of an unfinished artifact, so that a resumed build can trust it by its hash, if known."""
    write_sealed(_part_record(file), {"bytes": file.stat().st_size, "sha256": sha256 or sha256_file(file)})


def part_is_whole(file: Path) -> bool:
    """Whether an earlier, interrupted build finished this file and its bytes are still the same."""
    return file.is_file() and _recorded_hash(file) == sha256_file(file)


def take_part(old: Path, sha256: str, new: Path) -> None:
    """Link (or copy) a file of a finished artifact into an unfinished one, where it is a finished part."""
    if part_is_whole(new):
        return
    new.unlink(missing_ok=True)
    try:
        new.hardlink_to(old)
    except OSError:  # a file system without links
        shutil.copyfile(old, new)
    finish_part(new, sha256)


def spec_diff(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Field-level differences of two nested dicts, e.g. `spec.learning_rate: 4e-05 -> 0.0001`."""
    lines = []
    for key in sorted(set(old) | set(new)):
        before, after, name = old.get(key), new.get(key), f"{prefix}{key}"
        if isinstance(before, dict) and isinstance(after, dict):
            lines += spec_diff(before, after, f"{name}.")
        elif before != after:
            lines.append(f"{name}: {before!r} -> {after!r}")
    return lines


def _by_age(workspace: Path, kind: str) -> list[Path]:
    """The directories of a kind's finished artifacts, oldest first."""
    manifests = (workspace / kind).glob(f"*/{MANIFEST}")
    return [file.parent for file in sorted(manifests, key=lambda file: file.stat().st_mtime_ns)]


def _recorded_hash(file: Path) -> str | None:
    """What `finish_part` wrote down of a file."""
    try:
        return str(read_sealed(_part_record(file))["sha256"])
    except (OSError, ArtifactError):
        return None


def _part_record(file: Path) -> Path:
    return file.with_name(f".part-{file.name}.json")


def _stat_damage(artifact: Artifact) -> Iterator[str]:
    try:
        record = artifact.manifest
    except ArtifactError as error:
        yield str(error)
        return
    for entry in record["files"]:
        file = artifact.path / entry["path"]
        if not file.is_file():
            yield f"{file} is missing"
        elif file.stat().st_size != entry["bytes"]:
            yield f"{file} has {file.stat().st_size} bytes, its manifest says {entry['bytes']}"


def _unfinish(artifact: Artifact, parts: str | None) -> None:
    """Drop the manifest and every file of a damaged artifact, but for `parts` that are as the manifest says."""
    try:
        recorded = artifact.hashes if parts else {}
    except ArtifactError:
        recorded = {}  # the manifest itself is damaged
    (artifact.path / MANIFEST).unlink()
    for file in [file for file in artifact.path.rglob("*") if file.is_file()]:
        digest = recorded.get(str(file.relative_to(artifact.path)))
        if digest and fnmatch(file.name, parts or "") and sha256_file(file) == digest:
            finish_part(file, digest)
        else:
            file.unlink()


def _log_why(workspace: Path, request: Request) -> None:
    """Say what changed against the newest artifact of the same kind, field by field."""
    others = _by_age(workspace, request.kind)
    if not others:
        return
    try:
        old = read_sealed(others[-1] / MANIFEST)
    except ArtifactError:
        return
    log.info("%s %s: built anew because %s", request.kind, request.fingerprint, _changes(old, request))


def _log_left(workspace: Path, request: Request) -> None:
    """Say what changed against the artifact of the same kind that was left unfinished last: it is not continued."""
    if (workspace / request.kind / request.fingerprint / _REQUEST).exists():
        return
    finished = _by_age(workspace, request.kind)
    since = (finished[-1] / MANIFEST).stat().st_mtime_ns if finished else 0
    left = [path for path in (workspace / request.kind).glob(f"*/{_REQUEST}") if not (path.parent / MANIFEST).exists()]
    try:
        left = [path for path in left if path.stat().st_mtime_ns > since and not _is_held(workspace, path.parent)]
        newest = max(left, key=lambda path: path.stat().st_mtime_ns, default=None)
        old = read_sealed(newest) if newest else None
    except (ArtifactError, OSError):  # damaged, or finished meanwhile
        return
    if newest and old:
        log.warning(
            "%s %s starts from the beginning; the unfinished %s is not continued, because %s. Its own settings would",
            request.kind, request.fingerprint, newest.parent.name, _changes(old, request),
        )  # fmt: skip


def _is_held(workspace: Path, path: Path) -> bool:
    """Whether a run is making the artifact of a directory right now."""
    fd = os.open(workspace / LOCKS / f"{path.parent.name}-{path.name}", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, workspace / LOCKS)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def _changes(old: dict[str, Any], request: Request) -> str:
    """Field-level differences of a record's format, spec and inputs to a request."""
    return "; ".join(spec_diff({name: old[name] for name in request.record}, request.record))
