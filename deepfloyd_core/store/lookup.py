"""Finds an artifact or a version of a workspace by what a person calls it: a number, `champion`, the first digits."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from deepfloyd_core.config.base import home_path
from deepfloyd_core.config.bucket_workspace import checked_url, is_url, mirror_folder
from deepfloyd_core.errors import ArtifactError, ConfigError
from deepfloyd_core.store.artifacts import FINGERPRINT, Request
from deepfloyd_core.store.collected import FOLDER as COLLECTED
from deepfloyd_core.store.collected import Collected, collected
from deepfloyd_core.store.events import SERVING
from deepfloyd_core.store.locks import LOCKS
from deepfloyd_core.store.manifest import MANIFEST, Manifest, read_manifest
from deepfloyd_core.store.mirror import has_records, mirror_of, open_mirror, refresh
from deepfloyd_core.store.unfinished import read_request
from deepfloyd_core.store.versions import Version, find_version, versions
from deepfloyd_core.store.working_state import REQUEST

_SHOWN = 5  # of the artifacts that a text names
_FEWEST = 4  # digits that may be the first ones of a fingerprint; fewer are a version's number
_VERSION = re.compile(rf"(?:v|version[: ]?)?(\d{{1,9}}|{'|'.join(SERVING)})", re.IGNORECASE)


@dataclass(frozen=True)
class Known:
    """What is known of an artifact."""

    name: str
    path: Path
    record: Manifest | Request  # a Request: it is unfinished
    collected: Collected | None = None  # it was removed by `gc`


def need_workspace(path: Path) -> None:
    """Raise ConfigError unless a folder holds artifacts, finished or not."""
    if not (path / LOCKS).is_dir() and not any(FINGERPRINT.fullmatch(child.name) for child in path.glob("*/*")):
        fault = "holds no artifacts" if path.is_dir() else "is no folder" if path.exists() else "is not there"
        raise ConfigError(f"{path} {fault}. Give the folder that `workspace` of the run file names.")


def opened_workspace(text: str) -> Path:
    """The folder of a workspace that a person named: a folder, or the URL of one in a bucket, whose records are brought.

    Raises ConfigError unless it holds artifacts, StorageError where the bucket refuses.
    """
    if is_url(text):
        url = checked_url(text)
        mirror = open_mirror(url, mirror_folder(url))
        if not has_records(mirror):
            raise ConfigError(f"{url} holds no artifacts. Give the URL that `workspace` of the run file names.")
        return mirror.workspace
    path = home_path(Path(text))
    need_workspace(path)
    if mirrored := mirror_of(path):
        refresh(mirrored)
    return path


def version_named(workspace: Path, text: str) -> Version | None:
    """The version that `3`, `v3`, `version:3`, `latest` or `champion` names; None for another text, or for four digits or
    more that are no version's number. Raises ConfigError and ArtifactError as `find_version`.
    """
    match = _VERSION.fullmatch(text)
    if match is None:
        return None
    try:
        return find_version(workspace, match[1].lower().lstrip("0") or "0")
    except ConfigError:
        if match[1] != text or text in SERVING or len(text) < _FEWEST:
            raise
        return None  # the first digits of an artifact


def artifact_named(workspace: Path, text: str) -> Known:
    """The artifact whose fingerprint, or KIND/FINGERPRINT, begins so. Raises ConfigError unless there is exactly one."""
    names = sorted(name for name in _names(workspace) if any(part.startswith(text) for part in (name, name[-16:])))
    if not names or not text:
        raise ConfigError(
            f"{workspace} has no version and no artifact {text!r}. `deepfloyd ls {workspace} --all` lists them."
        )
    if len(names) > 1:
        no_version = f"There is no version {text}, and " if text.isdecimal() else ""
        listed = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
        raise ConfigError(
            f"{no_version}{text!r} begins the names of {len(names)} artifacts: {listed}. Give more digits, or the kind."
        )
    return known_artifact(workspace, names[0])


def known_artifact(workspace: Path, name: str) -> Known:
    """What is known of an artifact by its name. Raises ArtifactError when its record is damaged or there is none."""
    path = workspace / name
    if not (path / MANIFEST).exists():
        if (path / REQUEST).exists():
            return Known(name, path, read_request(path))
        if record := collected(workspace, name):
            return Known(name, path, record.manifest, record)
    try:
        return Known(name, path, read_manifest(path))
    except ArtifactError as error:
        raise ArtifactError(
            f"{str(error).removesuffix('.')}. `deepfloyd verify {workspace}` tells which versions need it."
        ) from None


def _names(workspace: Path) -> Iterator[str]:
    """The names of all artifacts, also of unfinished, collected and lost ones."""
    found = {f"{file.parents[1].name}/{file.parent.name}" for name in (MANIFEST, REQUEST)
             for file in workspace.glob(f"*/*/{name}")}  # fmt: skip
    found |= {"/".join(file.stem.rsplit("-", 1)) for file in (workspace / COLLECTED).glob("*.json")}
    found |= {name for version in versions(workspace) for name in version.lineage}
    return (name for name in found if re.fullmatch(r"\w+/[0-9a-f]{16}", name))
