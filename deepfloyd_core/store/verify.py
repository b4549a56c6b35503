"""Whether what a workspace holds is whole: every artifact against its manifest."""

from collections.abc import Iterator
from pathlib import Path

from deepfloyd_core.errors import ArtifactError
from deepfloyd_core.files import sha256_file
from deepfloyd_core.store.artifacts import FINGERPRINT, LOCKS, MANIFEST, Artifact, Request, by_age


def is_workspace(path: Path) -> bool:
    """Whether a folder holds artifacts, finished or not."""
    return (path / LOCKS).is_dir() or any(FINGERPRINT.fullmatch(child.name) for child in path.glob("*/*"))


def all_artifacts(workspace: Path) -> Iterator[Artifact]:
    """Every finished artifact of a workspace, kind by kind as the first of each was made, oldest first."""
    kinds: dict[str, list[Path]] = {}
    for path in by_age(workspace, "*"):
        kinds.setdefault(path.parent.name, []).append(path)
    for kind, paths in kinds.items():
        for path in paths:
            yield Artifact(kind, path.name, path)


def missing_parts(artifact: Artifact) -> Iterator[str]:
    """A line for each file that is absent or has another size, or for a manifest that is no record; nothing is hashed."""
    try:
        files = {entry["path"]: entry["bytes"] for entry in artifact.manifest["files"]}
    except ArtifactError as error:
        yield str(error)
        return
    except OSError as error:
        yield f"{artifact.path / MANIFEST} cannot be read: {error.strerror}"
        return
    for name, size in files.items():
        file = artifact.path / name
        if not file.is_file():
            yield f"{file} is missing"
        elif file.stat().st_size != size:
            yield f"{file} has {file.stat().st_size} bytes, its manifest says {size}"


def verify_artifact(artifact: Artifact) -> list[str]:
    """Re-hash one artifact; one line for each thing that is wrong, none when every byte is as written."""
    damage = list(missing_parts(artifact))
    try:
        record = artifact.manifest
    except (ArtifactError, OSError):
        return damage
    request = Request(record["kind"], record["format"], record["spec"], record["inputs"])
    if request.name != artifact.name:
        damage.append(f"{artifact.path} holds the manifest of {request.kind} {request.fingerprint}")
    for entry in record["files"]:
        file = artifact.path / entry["path"]
        try:
            if file.is_file() and file.stat().st_size == entry["bytes"] and sha256_file(file) != entry["sha256"]:
                damage.append(f"{file} has other bytes than its manifest says")
        except OSError as error:  # a disk that fails, or a file that may not be read
            damage.append(f"{file} cannot be read: {error.strerror}")
    known = {entry["path"] for entry in record["files"]} | {MANIFEST}
    present = {str(file.relative_to(artifact.path)) for file in artifact.path.rglob("*") if file.is_file()}
    return damage + [f"{artifact.path / extra} is not in the manifest" for extra in sorted(present - known)]
