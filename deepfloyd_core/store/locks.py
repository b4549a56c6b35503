"""One lock for each artifact of a workspace, and one for its runs; the kernel frees the lock of a killed run.

In a workspace that this user may only read nothing is locked: what is finished there can be used, and the first write
says that there is none.
"""

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deepfloyd_core.config.base import is_there
from deepfloyd_core.errors import BusyError
from deepfloyd_core.files import make_folder
from deepfloyd_core.store.file_faults import flock, written

log = logging.getLogger(__name__)

LOCKS = ".locks"  # folder of a workspace
_LONGEST_NAME = 500  # bytes
ELSEWHERE = "Set `workspace` to a folder on a local disk"


def create_workspace(workspace: Path) -> None:
    """Create a workspace with mode 0700: it may hold private pictures. An existing one keeps its mode."""
    make_folder(workspace, 0o700)


def artifact_lock(name: str) -> str:
    """The name of an artifact's lock. name: KIND/FINGERPRINT."""
    return name.replace("/", "-")


def is_read_only(workspace: Path) -> bool:
    """Whether a workspace exists and this user may not write there: what is finished can still be read."""
    return is_there(workspace) and not os.access(workspace, os.W_OK)


@contextmanager
def locked(workspace: Path, name: str, *, quiet: bool = False) -> Iterator[int]:
    """Hold a workspace's lock `name`, and wait for it if necessary; yields its file descriptor for child processes.

    quiet: do not log a wait. Raises StorageError in place of any OSError of the block.
    """
    with written(workspace):
        if is_read_only(workspace):
            path, fd = workspace, os.open(workspace, os.O_RDONLY)
        else:
            path, fd = _opened(workspace, name)
        try:
            if path != workspace:
                _take(fd, path, "" if quiet else name)
            yield fd
        finally:
            os.close(fd)


def _take(fd: int, path: Path, told: str) -> None:
    """told: how the log calls a lock that has to be waited for; empty: not at all."""
    try:
        flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, path, ELSEWHERE)
    except BlockingIOError:
        if told:
            log.info("%s: another run holds it; waiting", told)
        flock(fd, fcntl.LOCK_EX, path)


@contextmanager
def locked_if_free(workspace: Path, name: str) -> Iterator[bool]:
    """Hold a workspace's lock `name` if nobody else holds it; yields whether it is held. Never waits."""
    path = workspace / LOCKS / name
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, path)
    except BlockingIOError:
        yield False
    else:
        yield True
    finally:
        os.close(fd)


def is_locked(workspace: Path, name: str) -> bool:
    """Whether somebody holds a workspace's lock `name`. Writes nothing."""
    path = workspace / LOCKS / name
    try:
        with path.open() as file:
            flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB, path)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        pass
    return False


@contextmanager
def only_run(workspace: Path, name: str, *, wait: bool) -> Iterator[None]:
    """Let one run at a time make artifacts in a workspace. name: of this run, for those that wait for it.

    Raises BusyError, with the name of the run that holds it, unless this run may wait.
    """
    if is_read_only(workspace):
        yield
        return
    with written(workspace):
        path, fd = _opened(workspace, "run")
    try:
        try:
            flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, path, ELSEWHERE)
        except BlockingIOError:
            holder = holder_of(fd)
            if not wait:
                raise BusyError(f"{holder} is at work in {workspace}.") from None
            log.info("waiting for %s, which is at work in %s", holder, workspace)
            flock(fd, fcntl.LOCK_EX, path)
        with written(workspace):
            name_holder(fd, name)
        yield
    finally:
        os.close(fd)


def name_holder(fd: int, name: str) -> None:
    """Write who holds a lock into its file, for those that wait."""
    os.ftruncate(fd, 0)
    os.pwrite(fd, name.encode()[:_LONGEST_NAME], 0)


def holder_of(fd: int) -> str:
    """Who holds a lock, as its file says."""
    return os.pread(fd, _LONGEST_NAME, 0).decode(errors="replace") or "another run"


def _opened(workspace: Path, name: str) -> tuple[Path, int]:
    """The file of a lock in a workspace, which is created private if it is not there."""
    create_workspace(workspace)
    path = workspace / LOCKS / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path, os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
