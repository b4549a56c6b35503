"""One message for each refusal of the file system: which file, which operation, the reason, what is free, and the remedy.

Where the size of what is to be written is known, its room is looked at first (`need_room`): a disk that is full after an
hour of writing costs that hour.

Also takes locks, which some network file systems do not have. There is no substitute: only a lock that the kernel frees
distinguishes a running run from a killed one.
"""

import errno
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from deepfloyd_core.errors import StorageError
from deepfloyd_core.store.counts import size

FULL = (errno.ENOSPC, errno.EDQUOT)
REFUSES_ALL = (*FULL, errno.EROFS, errno.EIO, errno.ENODEV, errno.ENXIO, errno.ESTALE)  # of a disk, whatever is written
_FREE = "Free some space there, or choose a folder on another disk, and run the same command again"
_QUOTA = "Free some of your quota there, or choose a folder on another disk, and run the same command again"
_GONE = "Connect or repair that disk, and run the same command again; `deepfloyd verify` finds what was damaged"
_ELSEWHERE = "Choose a folder on another file system"
_REMEDIES = {
    errno.ENOSPC: _FREE,
    errno.EDQUOT: _QUOTA,
    errno.EROFS: "Choose a folder that can be written, or mount it so",
    errno.EACCES: "Change its permissions, or choose another folder",
    errno.EPERM: "Change its owner or permissions, or choose another folder",
    errno.ENAMETOOLONG: "Choose a folder with a shorter path",
    errno.ENOENT: "Create it, or correct the path",
    errno.ENOTDIR: "A part of the path is a file: correct it",
    errno.EISDIR: "A file was expected: correct the path",
    errno.EEXIST: "Remove what is there, or choose another path",
    errno.ELOOP: "Its links lead in a circle: correct them",
    errno.EMFILE: "Raise the limit of open files (`ulimit -n 4096`)",
    errno.EFBIG: _ELSEWHERE,
    errno.EINVAL: _ELSEWHERE,
    errno.ENOTSUP: _ELSEWHERE,
    errno.EOPNOTSUPP: _ELSEWHERE,
    errno.ENOSYS: _ELSEWHERE,
    **dict.fromkeys((errno.EIO, errno.ENODEV, errno.ENXIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT), _GONE),
}
_OF_NETWORKS = (errno.ETIMEDOUT, errno.ENOTCONN)  # unless they name a file
_NO_LOCKS = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL)
_OF_RUST = re.compile(r"\(os error (\d+)\)")  # safetensors' errors are none of the system's


def storage_error(error: OSError, act: str, path: Path | None = None) -> StorageError:
    """The message for an error. act: `written`, `read`, `used`; path: the file, if the error does not name one.

    An OSError that a library or the network raises keeps its own text.
    """
    named = error.filename2 or error.filename
    if path is not None and _is_bare(named):
        named = path
    ours = named is not None or (error.errno in _REMEDIES and error.errno not in _OF_NETWORKS)
    if error.errno is None or not ours:
        return StorageError(str(error))
    reason, place = os.strerror(error.errno), named or path
    where = _kind(place, error.errno in FULL)
    told = f"{place} cannot be {act}: {reason[:1].lower()}{reason[1:]}{where}." if place else f"{reason}."
    remedy = _REMEDIES.get(error.errno)
    return StorageError(f"{told} {remedy}." if remedy else told)


def need_room(folder: Path, needed: int, what: str, advice: str = _FREE) -> None:
    """Raise StorageError unless a folder's disk has so many bytes free. what: begins the sentence, with its verb, such as
    `The checkpoint of step 8 takes`; advice: a sentence without its full stop.
    """
    if needed > shutil.disk_usage(folder).free:
        raise StorageError(f"{what} {size(needed)}, and {folder} has less room{_kind(folder, True)}. {advice}.")


def system_error(text: str) -> OSError | None:
    """The system's error that the text of a library's error names; None for any other error."""
    number = _OF_RUST.search(text)
    return OSError(int(number[1]), os.strerror(int(number[1]))) if number else None


@contextmanager
def written(folder: Path) -> Iterator[None]:
    """In a block that writes to a folder and reads elsewhere, raise StorageError in place of OSError."""
    try:
        yield
    except OSError as error:
        named = error.filename2 or error.filename
        inside = named is None or _is_bare(named) or Path(str(named)).is_relative_to(folder)
        raise storage_error(error, "written" if inside else "read", folder) from error


def _is_bare(named: object) -> bool:
    """Whether an error names a file without its folder, as `shutil.rmtree` does."""
    return isinstance(named, str) and os.sep not in named


def flock(file: int | IO[str], operation: int, path: Path, remedy: str = _ELSEWHERE) -> None:
    """fcntl.flock. Raises BlockingIOError as it does, and StorageError if the file system has no locks."""
    try:
        fcntl.flock(file, operation)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise storage_error(error, "locked", path) from error
        raise StorageError(
            f"{path} cannot be locked: {os.strerror(error.errno).lower()}{_kind(path)}. Without locks two runs would spoil "
            f"each other's files. {remedy}."
        ) from error


def _kind(place: object, with_free: bool = False) -> str:
    """The file system of a path, for a person: ` (nfs4 at /mnt/x)`, or ` (nfs4 at /mnt/x, 1.20 MB free)`; empty where it is
    not known.
    """
    if not isinstance(place, str | Path):
        return ""
    import psutil  # 0.05 s, which a command that fails by its own words need not take

    folder = Path(place).absolute()
    mounts = {Path(each.mountpoint): each.fstype for each in psutil.disk_partitions(all=True)}
    at = next((parent for parent in (folder, *folder.parents) if parent in mounts), None)
    if at is None:
        return ""
    free = f", {size(shutil.disk_usage(at).free)} free" if with_free else ""
    return f" ({mounts[at]} at {at}{free})"
