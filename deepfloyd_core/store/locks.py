"""One lock for each artifact of a workspace; the kernel frees the lock of a killed run."""

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deepfloyd_core.store.file_faults import flock, written

log = logging.getLogger(__name__)

LOCKS = ".locks"  # folder of a workspace
_ELSEWHERE = "Set `workspace` to a folder on a local disk"


def create_workspace(workspace: Path) -> None:
    """Create a workspace with mode 0700: it may hold private pictures. An existing one keeps its mode."""
    workspace.mkdir(mode=0o700, parents=True, exist_ok=True)


@contextmanager
def locked(workspace: Path, name: str, *, quiet: bool = False) -> Iterator[int]:
    """Hold a workspace's lock `name`, and wait for it if necessary; yields its file descriptor for child processes.

    quiet: do not log a wait. Raises StorageError in place of any OSError of the block.
    """
    path = workspace / LOCKS / name
    with written(workspace):
        create_workspace(workspace)
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, path, _ELSEWHERE)
            except BlockingIOError:
                if not quiet:
                    log.info("%s: another run holds it; waiting", name)
                flock(fd, fcntl.LOCK_EX, path)
            yield fd
        finally:
            os.close(fd)
