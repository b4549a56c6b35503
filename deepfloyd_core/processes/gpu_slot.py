"""The GPU of a machine: one run at a time has jobs on it, whichever workspace, command or deployment it belongs to; and the
GPUs of a worker of a cluster: one part at a time on each.

Two trainings that share a GPU run out of memory. A run takes the slot with its first job and keeps it until its block
ends. The slot is a lock on a file, which jobs inherit. So the slot of a killed run is free when its last job has ended.
"""

import fcntl
import logging
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

from deepfloyd_core.errors import StorageError
from deepfloyd_core.store.file_faults import flock, written
from deepfloyd_core.store.locks import holder_of, name_holder

log = logging.getLogger(__name__)

ASK_EVERY_S = 0.5
_ELSEWHERE = "Set TMPDIR to a folder on a local disk"
_SLOT: "ContextVar[GpuSlot | None]" = ContextVar("gpu_slot", default=None)


def slots_folder() -> Path:
    """The folder of this user's locks, on a disk of this machine. Raises StorageError when it belongs to somebody else."""
    folder = Path(tempfile.gettempdir()) / f"deepfloyd-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if folder.is_symlink() or status.st_uid != os.getuid():
        raise StorageError(f"{folder} belongs to another user. Remove it, or set TMPDIR to a folder of your own.")
    return folder


@contextmanager
def free_gpu(ids: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Wait for a GPU that no other part has. Yields its place in `ids` and the file descriptor of its lock, which a job
    inherits: a GPU is free when its last job has ended.
    """
    paths = [slots_folder() / f"gpu-{one}" for one in ids]
    fds = [os.open(path, os.O_RDWR | os.O_CREAT, 0o600) for path in paths]
    try:
        while True:
            for number, (path, fd) in enumerate(zip(paths, fds, strict=True)):
                with suppress(BlockingIOError):
                    flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, path, _ELSEWHERE)
                    yield number, fd
                    return
            time.sleep(ASK_EVERY_S)
    finally:
        for fd in fds:
            os.close(fd)


class GpuSlot:
    """A slot that is taken when it is first needed."""

    def __init__(self, path: Path, name: str) -> None:
        self._path, self._name = path, name
        self._fd: int | None = None

    def take(self) -> int:
        """Wait for the slot, and return the file descriptor of its lock."""
        if self._fd is None:
            with written(self._path.parent):
                self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                fd = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
            self._fd = fd
            self._wait(fd)
            name_holder(fd, self._name)
        return self._fd

    def leave(self) -> None:
        """Free the slot; it stays taken by jobs that have not ended."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _wait(self, fd: int) -> None:
        told = False
        while True:
            try:
                flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, self._path, _ELSEWHERE)
                return
            except BlockingIOError:
                if not told:
                    log.info("waiting for the GPU, which is used by %s", holder_of(fd))
                    told = True
            time.sleep(ASK_EVERY_S)


@contextmanager
def gpu_slot(path: Path, name: str) -> Iterator[None]:
    """The jobs of this block take the slot at a path first. name: of the run, for those that wait for it."""
    slot = GpuSlot(path, name)
    token = _SLOT.set(slot)
    try:
        yield
    finally:
        _SLOT.reset(token)
        slot.leave()


def slot_of_block() -> GpuSlot | None:
    """The slot that jobs take; None where they need none."""
    return _SLOT.get()
