"""How much of a workspace in a bucket is kept on this machine.

Where it is more than `workspace_cache_gib`, the files of those artifacts go that were used longest ago; their manifests
stay. What a run uses stays, and what is not in the bucket. The bound is looked at after files were brought or sent: a run
that uses more than the bound at once goes beyond it.
"""

from contextlib import suppress
from pathlib import Path

from deepfloyd_core.errors import ArtifactError
from deepfloyd_core.store.leases import no_new_leases
from deepfloyd_core.store.locks import artifact_lock, locked_if_free
from deepfloyd_core.store.manifest import MANIFEST, read_manifest
from deepfloyd_core.store.mirror import FOLDER, Mirror

_LIMIT = "limit"  # a file of the mirror, so that jobs of a run know it as well
_GIB = 1 << 30


def set_limit(mirror: Mirror, gib: float | None) -> None:
    """Set how much may be kept; None: everything."""
    file = mirror.workspace / FOLDER / _LIMIT
    if gib is None:
        file.unlink(missing_ok=True)
    else:
        file.write_text(str(int(gib * _GIB)))


def trim(mirror: Mirror) -> None:
    """Remove files that are in the bucket, of artifacts that were used longest ago, until the rest is within the limit."""
    try:
        limit = int((mirror.workspace / FOLDER / _LIMIT).read_text())
    except (FileNotFoundError, ValueError):
        return
    sizes = {folder: _bytes_in(folder) for folder in _artifacts(mirror)}
    over = sum(sizes.values()) - limit
    used = {folder: _last_use(mirror, folder) for folder in sizes}
    for folder in sorted((each for each in sizes if used[each]), key=lambda each: used[each]):
        if over <= 0:
            break
        if sizes[folder] and _empty(mirror, folder):
            over -= sizes[folder]


def _artifacts(mirror: Mirror) -> list[Path]:
    return [file.parent for file in mirror.workspace.glob(f"*/*/{MANIFEST}") if not file.parent.name.startswith(".")]


def _bytes_in(folder: Path) -> int:
    """Of its files but the manifest; of one with several names a part for each, so that no byte counts twice."""
    found = 0.0
    for file in folder.rglob("*"):
        with suppress(FileNotFoundError):
            if file.is_file() and file.name != MANIFEST:
                found += file.stat().st_size / file.stat().st_nlink
    return int(found)


def _last_use(mirror: Mirror, folder: Path) -> int:
    """When its files were last brought or sent, ns; 0: it is not in the bucket."""
    try:
        return mirror.seen(f"{folder.parent.name}/{folder.name}/{MANIFEST}").stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _empty(mirror: Mirror, folder: Path) -> bool:
    """Remove the files of an artifact that no run uses, but for its manifest. Returns whether it did."""
    name = f"{folder.parent.name}/{folder.name}"
    with (
        no_new_leases(mirror.workspace) as leases,
        locked_if_free(mirror.workspace, artifact_lock(name)) as free,
        suppress(ArtifactError, FileNotFoundError),
    ):
        if free and name not in leases:
            for entry in read_manifest(folder).files:
                (folder / entry.path).unlink(missing_ok=True)
            return True
    return False
