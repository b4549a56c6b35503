"""The artifact contract: a directory is finished when its manifest.json is there, which is written after its files.

An artifact lies in `<workspace>/<kind>/<fingerprint>/`. The fingerprint is taken over (kind, format, spec, inputs) and
nothing else: place, time, device and number of workers change no bytes, so they are not in it. A directory without a
manifest is unfinished; its builder continues it. One `flock` per artifact lets two runs share a workspace. The kernel
frees the lock when its holder dies. Child processes inherit it, so a trainer that outlives its parent still owns its
files.
"""

import logging
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from deepfloyd_core.errors import ArtifactError
from deepfloyd_core.files import (
    canonical_json,
    fsync_path,
    make_folder,
    read_sealed,
    sha256_bytes,
    sha256_file,
    write_sealed,
)
from deepfloyd_core.store.changes import changes, rebuilt
from deepfloyd_core.store.collected import record_file
from deepfloyd_core.store.counts import duration, many
from deepfloyd_core.store.damage import is_marked, unmark
from deepfloyd_core.store.faults import all_faults, faults_in
from deepfloyd_core.store.leases import take_lease
from deepfloyd_core.store.locks import artifact_lock, is_locked, locked
from deepfloyd_core.store.manifest import MANIFEST, FileEntry, Manifest, Summary, read_manifest
from deepfloyd_core.store.mending import mend
from deepfloyd_core.store.mirror import drop_record
from deepfloyd_core.store.mirror_files import bring, is_held, push, restore
from deepfloyd_core.store.mirror_state import drop_state, sent_meanwhile
from deepfloyd_core.store.parts import recorded_hash
from deepfloyd_core.store.provenance import provenance
from deepfloyd_core.store.set_aside import BEFORE, set_aside
from deepfloyd_core.store.working_state import REQUEST, drop_working_state, own_paths
from deepfloyd_core.types import Json

log = logging.getLogger(__name__)

S = TypeVar("S", bound=Summary)
FINGERPRINT = re.compile("[0-9a-f]{16}")


@dataclass(frozen=True)
class Artifact:
    """A finished artifact; small enough to pass between tasks."""

    kind: str
    fingerprint: str
    folder: Path  # its directory; of a workspace in a bucket it may lack files
    reused: bool = field(
        default=False, compare=False
    )  # of `materialise`: it existed and was intact, so nothing was built

    @property
    def path(self) -> Path:
        """Its directory, with all its files: what is in a bucket only is brought now."""
        bring(self.folder)
        return self.folder

    @property
    def name(self) -> str:
        """KIND/FINGERPRINT. It is also the directory in the workspace, and names the artifact in the inputs of others."""
        return f"{self.kind}/{self.fingerprint}"

    @property
    def manifest(self) -> Manifest:
        """The sealed record. Raises ArtifactError when it is damaged or not such a record."""
        return read_manifest(self.folder)

    @property
    def spec(self) -> Json:
        """The settings that decide its bytes."""
        return self.manifest.spec

    @property
    def inputs(self) -> dict[str, str]:
        """What it was made from: names of artifacts, and fingerprints of files from elsewhere."""
        return self.manifest.inputs

    @property
    def hashes(self) -> dict[str, str]:
        """The recorded sha256 of every file, by its path inside the artifact."""
        return {entry.path: entry.sha256 for entry in self.manifest.files}

    def summary(self, kind: type[S]) -> S:
        """The builder's report. Raises ArtifactError when it is not a summary of this kind."""
        return kind.of_record(self.manifest.summary, self.folder)


@dataclass(frozen=True)
class Request:
    """What an artifact is made from. `spec` and `inputs` must be plain JSON values; an input that is an artifact is its
    name.
    """

    kind: str
    format: int
    spec: Json
    inputs: dict[str, str]

    @property
    def fingerprint(self) -> str:
        """First 16 hex digits of sha256 over the canonical JSON of (kind, format, spec, inputs)."""
        return sha256_bytes(canonical_json({"kind": self.kind, **self.record}).encode())[:16]

    @property
    def name(self) -> str:
        """KIND/FINGERPRINT, as `Artifact.name`."""
        return f"{self.kind}/{self.fingerprint}"

    @property
    def record(self) -> Json:
        """Everything in which two requests of a kind can differ."""
        return {"format": self.format, "spec": self.spec, "inputs": self.inputs}


@dataclass(frozen=True)
class WorkDir:
    """An unfinished artifact under construction. Dot files in it are working state and vanish after the commit."""

    path: Path
    lock_fd: int

    @property
    def workspace(self) -> Path:
        """Directory of all artifacts."""
        return workspace_of(self.path)

    @property
    def before(self) -> Artifact | None:
        """What is left of the same artifact, which was finished and then damaged; None: it was not."""
        left = Artifact(self.path.parent.name, self.path.name, self.path / BEFORE)
        return left if (left.folder / MANIFEST).exists() else None


Builder = Callable[[WorkDir], Summary]


def workspace_of(path: Path) -> Path:
    """The workspace of an artifact's directory, which is `<workspace>/<kind>/<fingerprint>`."""
    return path.parent.parent


def find(workspace: Path, request: Request) -> Artifact | None:
    """The finished artifact for a request, or None."""
    take_lease(workspace, request.name)
    path = workspace / request.kind / request.fingerprint
    return Artifact(request.kind, request.fingerprint, path) if (path / MANIFEST).exists() else None


def newest(
    workspace: Path, kind: str, format: int, fits: Callable[[Manifest], bool] = lambda manifest: True
) -> Artifact | None:
    """The newest of `finished` whose manifest `fits` accepts: a new artifact can reuse parts of it."""
    for artifact, manifest in finished(workspace, kind, format):
        if fits(manifest):
            take_lease(workspace, artifact.name)
            if (artifact.folder / MANIFEST).exists():  # else it was collected just now
                return artifact
    return None


def finished(workspace: Path, kind: str, format: int) -> Iterator[tuple[Artifact, Manifest]]:
    """The finished artifacts of a kind and format, newest first, without damaged ones."""
    for path in reversed(_by_age(workspace, kind)):
        with suppress(ArtifactError):
            if (manifest := read_manifest(path)).format == format:
                yield Artifact(kind, path.name, path), manifest


def materialise(workspace: Path, request: Request, build: Builder, parts: str | None = None) -> Artifact:
    """Return the artifact of a request. Build it if it does not exist; a build that a kill interrupted is continued.

    `build` gets the directory, writes its files and returns the summary; what it raises is raised, and the directory stays
    unfinished. Before a finished artifact is reused its small files are hashed, of large ones the sizes are compared; where
    a reader found damage, every file is hashed. What another artifact has a whole copy of is taken from there, not built.
    Otherwise the artifact is built again, with what is left of it in `WorkDir.before`; its intact files that fit `parts` (a
    pattern of names) are there already, as finished parts.
    """
    path = workspace / request.kind / request.fingerprint
    take_lease(workspace, request.name)
    with locked(workspace, artifact_lock(request.name)) as lock_fd:
        existing = find(workspace, request)
        if existing is not None:
            damage = list(damaged_parts(existing))
            if damage and mend(existing.folder):
                damage = list(damaged_parts(existing))
            if not damage:
                unmark(path)
                drop_working_state(path)
                if not is_held(path):
                    push(path)
                log.info("%s %s: reused", request.kind, request.fingerprint)
                return replace(existing, reused=True)
            log.warning("%s %s: rebuilt because %s", request.kind, request.fingerprint, "; ".join(damage))
            set_aside(path, parts)
        elif (path / REQUEST).exists():
            log.info("%s %s: continued, an earlier run was stopped", request.kind, request.fingerprint)
        else:
            _log_why(workspace, request)
            _log_left(workspace, request)
        make_folder(path)
        write_sealed(path / REQUEST, request.record)
        started = datetime.now(UTC)
        with sent_meanwhile(path):
            summary = build(WorkDir(path, lock_fd))
        return commit(path, request, summary, started)


def commit(path: Path, request: Request, summary: Summary, started: datetime) -> Artifact:
    """Hash and fsync every file, write the manifest, and then drop the working state: a kill or a full disk before the
    manifest is on the disk costs no step of a training.
    """
    files = sorted(file for file in own_paths(path) if file.is_file())
    entries = []
    for file in files:
        fsync_path(file)
        name, digest = str(file.relative_to(path)), recorded_hash(file) or sha256_file(file)
        entries.append(FileEntry(path=name, bytes=file.stat().st_size, sha256=digest))
    for folder in {file.parent for file in files} | {path}:
        fsync_path(folder)
    manifest = Manifest(
        kind=request.kind, format=request.format, fingerprint=request.fingerprint, spec=request.spec,
        inputs=request.inputs, files=tuple(entries), summary=summary.record, provenance=provenance(started),
    )  # fmt: skip
    write_sealed(path / MANIFEST, manifest.model_dump(mode="json"))
    drop_working_state(path)
    push(path)
    drop_state(path)
    drop_record(workspace_of(path), record_file(workspace_of(path), request.name))  # it was collected once
    took = duration(manifest.provenance.seconds)
    log.info("%s %s: built, %s, in %s", request.kind, request.fingerprint, many(len(files), "file"), took)
    return Artifact(request.kind, request.fingerprint, path)


def all_artifacts(workspace: Path) -> Iterator[Artifact]:
    """Every finished artifact of a workspace, kind by kind as the first of each was made, oldest first."""
    kinds: dict[str, list[Path]] = {}
    for path in _by_age(workspace, "*"):
        kinds.setdefault(path.parent.name, []).append(path)
    for kind, paths in kinds.items():
        for path in paths:
            yield Artifact(kind, path.name, path)


def missing_parts(artifact: Artifact) -> Iterator[str]:
    """One line for each file that is missing or has another size, or for an invalid manifest. Nothing is hashed. A file that
    is in the bucket of the workspace is not missing.

    Raises OSError where a disk fails: that says nothing of the artifact.
    """
    return faults_in(artifact.folder, FileEntry.misfit)


def damaged_parts(artifact: Artifact) -> Iterator[str]:
    """`missing_parts`, and one line for each small file with other bytes than its manifest says: before it enters a
    training, a sampling or a publication. Costs a hash of the small files (1.7 GB/s); of all where a reader found damage.

    What is damaged and is whole in the bucket of the workspace is taken from there.
    """
    fault = FileEntry.damage if is_marked(artifact.folder) else FileEntry.damage_if_small
    faults = list(faults_in(artifact.folder, fault))
    yield from faults_in(artifact.folder, fault) if faults and restore(artifact.folder, fault) else faults


def verify_artifact(artifact: Artifact) -> list[str]:
    """Hash one artifact again; one line for each fault, none when every byte is as written; an unreadable file is one."""
    try:
        record = artifact.manifest
    except ArtifactError as error:
        return [str(error)]
    except OSError as error:
        return [f"{artifact.folder / MANIFEST} cannot be read: {error.strerror}"]
    request = Request(record.kind, record.format, record.spec, record.inputs)
    right = request.name == artifact.name
    others = [] if right else [f"{artifact.folder} holds the manifest of {request.kind} {request.fingerprint}"]
    return others + all_faults(artifact.folder, record)


def _by_age(workspace: Path, kind: str) -> list[Path]:
    """The directories of a kind's finished artifacts, oldest first; of every kind with `*`."""
    return [file.parent for _, file in _dated(workspace.glob(f"{kind}/*/{MANIFEST}"))]


def _dated(files: Iterable[Path]) -> list[tuple[int, Path]]:
    """Those of files of artifacts that exist, with the time of their last change in ns, oldest first."""
    dated = []
    for file in files:
        with suppress(FileNotFoundError):  # collected just now
            if FINGERPRINT.fullmatch(file.parent.name):
                dated.append((file.stat().st_mtime_ns, file))
    return sorted(dated)


def newest_record(workspace: Path, request: Request) -> Json | None:
    """`record` of the newest other artifact of a request's kind; None: there is none. ArtifactError: it is damaged."""
    others = [path for path in _by_age(workspace, request.kind) if path.name != request.fingerprint]
    old = read_manifest(others[-1]) if others else None
    return Request(old.kind, old.format, old.spec, old.inputs).record if old else None


def _log_why(workspace: Path, request: Request) -> None:
    """Log the changes against the newest artifact of the same kind."""
    with suppress(ArtifactError):
        if before := newest_record(workspace, request):
            why = _changes(before, request)
            log.info("%s %s: %s: %s", request.kind, request.fingerprint, rebuilt(request.kind), why)


def _log_left(workspace: Path, request: Request) -> None:
    """Log the changes against the newest unfinished artifact of the same kind, which is therefore not continued."""
    folder = workspace / request.kind
    since = max((time for time, _ in _dated(folder.glob(f"*/{MANIFEST}"))), default=0)
    left = [
        file for time, file in _dated(folder.glob(f"*/{REQUEST}"))
        if time > since and not (file.parent / MANIFEST).exists()
        and not is_locked(workspace, artifact_lock(f"{request.kind}/{file.parent.name}"))
    ]  # fmt: skip
    newest = left[-1] if left else None
    try:
        old = read_sealed(newest, "It is written anew") if newest else None
    except (ArtifactError, OSError):  # damaged, finished or collected meanwhile
        return
    if newest and old:
        log.warning(
            "%s %s starts from the beginning; the unfinished %s is not resumed, because %s. Its own settings resume it",
            request.kind, request.fingerprint, newest.parent.name, _changes(old, request),
        )  # fmt: skip


def _changes(old: Json, request: Request) -> str:
    """How a record's format, spec and inputs differ from a request's."""
    return "; ".join(changes(request.kind, old, request.record))
