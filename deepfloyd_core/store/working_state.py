"""Working state of a build: the dot files of an artifact's directory, such as checkpoints, logs and records of parts.

It is dropped once the manifest is on the disk, the request last, also on the disk. So a request beside a manifest says
that a kill or a power loss came in between, and whoever finds it drops the rest: a look at one file, where nothing is left.
"""

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

from deepfloyd_core.files import fsync_path

REQUEST = ".request.json"  # of an unfinished artifact
log = logging.getLogger(__name__)


def own_paths(folder: Path) -> Iterator[Path]:
    """All that lies in an artifact's directory, in no order; beside a request without the working state."""
    is_being_built = (folder / REQUEST).exists()
    for file in folder.rglob("*"):
        if not is_being_built or not any(part.startswith(".") for part in file.relative_to(folder).parts):
            yield file


def drop_working_state(folder: Path) -> None:
    """Remove the working state of a finished artifact. What cannot be removed is logged: the artifact is whole with it."""
    request = folder / REQUEST
    try:
        if request.exists():
            state = [entry for entry in folder.rglob(".*") if entry != request]
            left = {entry.parent for entry in state if not any(parent in state for parent in entry.parents)}
            for entry in state:
                if entry.is_dir():
                    shutil.rmtree(entry)
                else:
                    entry.unlink(missing_ok=True)
            for changed in left:
                fsync_path(changed)
            request.unlink()
    except OSError as error:
        log.warning("%s is finished, and its working state cannot be removed: %s", folder, error)
