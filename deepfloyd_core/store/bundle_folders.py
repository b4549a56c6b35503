"""A bundle outside of its workspace: a folder with its files and its manifest, as `deepfloyd publish` writes one."""

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from deepfloyd_core.config.stages import STAGES
from deepfloyd_core.errors import ArtifactError, ConfigError
from deepfloyd_core.files import sha256_file
from deepfloyd_core.store.artifacts import Artifact, Request
from deepfloyd_core.store.manifest import MANIFEST, Manifest, read_manifest

_KIND = "lora_bundle"
_TABLES = tuple(f"{stage.table}/" for stage in STAGES.values())
_AGAIN = "Publish it again, or take it from where it was published"


def bundle_in(folder: Path) -> Artifact:
    """The bundle in a folder, its weights and schedulers compared with their checksums: once a process until they change.

    Raises ConfigError for a folder that holds none, ArtifactError for one that is damaged.
    """
    if not (folder / MANIFEST).is_file():
        raise ConfigError(
            f"{folder} is no bundle: it has no {MANIFEST}. Give a folder that `deepfloyd publish` has written, or that of a "
            "version in a workspace. What an older `deepfloyd publish` has written lacks it: publish it again."
        )
    manifest = read_manifest(folder)
    request = Request(manifest.kind, manifest.format, manifest.spec, manifest.inputs)
    if manifest.kind != _KIND or request.fingerprint != manifest.fingerprint:
        raise ConfigError(f"{folder} is no bundle: its {MANIFEST} is that of {manifest.kind} {manifest.fingerprint}.")
    stamp = tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in _drawn_with(folder))
    if damage := _damage(folder, manifest.model_dump_json(), stamp):
        raise ArtifactError(f"The bundle cannot be drawn with: {damage}. {_AGAIN}.")
    return Artifact(manifest.kind, manifest.fingerprint, folder)


def is_whole(folder: Path) -> bool:
    """Whether the files that a bundle draws with are all there, whatever their bytes."""
    try:
        names = [one.path for one in read_manifest(folder).files]
    except ArtifactError:
        return (folder / MANIFEST).is_file()  # damaged: `bundle_in` tells it
    return all((folder / name).is_file() for name in names if name.startswith(_TABLES))


def _drawn_with(folder: Path) -> Iterator[Path]:
    """The files in the folders of stages, which are what a bundle draws with."""
    for stage in STAGES.values():
        yield from sorted(
            file for file in (folder / stage.table).rglob("*") if file.is_file() and not _is_of_system(file)
        )


def _is_of_system(file: Path) -> bool:
    """Whether a file manager or a version control put it there."""
    return file.name.startswith(".") or file.name in ("Thumbs.db", "desktop.ini")


@lru_cache(maxsize=64)
def _damage(folder: Path, manifest: str, stamp: tuple[tuple[str, int, int], ...]) -> str:
    """The first fault of these files; empty: there is none. stamp: of the files, with their sizes and times."""
    known = {one.path: one for one in Manifest.model_validate_json(manifest).files if one.path.startswith(_TABLES)}
    for entry in known.values():
        if fault := entry.misfit(folder):
            return fault
        if sha256_file(folder / entry.path) != entry.sha256:
            return f"{folder / entry.path} has other bytes than its manifest says"
    others = [path for path, _, _ in stamp if str(Path(path).relative_to(folder)) not in known]
    return f"{others[0]} is not in the manifest" if others else ""
