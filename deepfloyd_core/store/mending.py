"""Mends a damaged file of an artifact from a copy in another artifact of the workspace: the weights of a bundle are those
of its training, and one flipped bit shall cost no training.

Reads every manifest of the workspace, but only where there is damage.
"""

import logging
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from deepfloyd_core.errors import ArtifactError
from deepfloyd_core.files import atomic_path, sha256_file
from deepfloyd_core.store.damage import is_marked
from deepfloyd_core.store.manifest import MANIFEST, FileEntry, read_manifest
from deepfloyd_core.store.parts import copy_file

log = logging.getLogger(__name__)


def mend(folder: Path) -> bool:
    """Replace the damaged files of an artifact's directory by whole copies: small ones, of a marked artifact large ones as
    well. Returns whether any was.
    """
    damage = FileEntry.damage if is_marked(folder) else FileEntry.damage_if_small
    try:
        damaged = [entry for entry in read_manifest(folder).files if damage(entry, folder)]
    except ArtifactError:
        return False
    return sum(_taken(entry, folder) for entry in damaged) > 0


def _taken(entry: FileEntry, folder: Path) -> bool:
    """Whether another artifact has the file, and it is whole."""
    file = folder / entry.path
    for twin in _twins(entry, folder):
        file.parent.mkdir(parents=True, exist_ok=True)
        with suppress(ArtifactError), atomic_path(file) as tmp:
            copy_file(twin, tmp)
            if sha256_file(tmp) != entry.sha256:
                raise ArtifactError(f"{twin} is damaged as well")
            log.warning("%s was damaged: it is taken from %s, which has the same bytes", file, twin)
            return True
    return False


def _twins(entry: FileEntry, folder: Path) -> Iterator[Path]:
    """The files of other artifacts whose manifests give the same bytes."""
    for manifest in folder.parent.parent.glob(f"*/*/{MANIFEST}"):
        if manifest.parent != folder and not manifest.parent.name.startswith("."):
            with suppress(ArtifactError, OSError):
                for other in read_manifest(manifest.parent).files:
                    if other.sha256 == entry.sha256 and not other.misfit(manifest.parent):
                        yield manifest.parent / other.path
