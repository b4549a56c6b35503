"""Damage that a reader finds in a file of an artifact: other bytes than were written.

Large files of rows are too large to be hashed before each use of their artifact, so their readers check what they read:
each row, or the file. What a reader finds is remembered beside the manifest: whoever needs the artifact next hashes it
whole, and makes again what is damaged.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

import pyarrow as pa

from deepfloyd_core.errors import ArtifactError, DamagedError
from deepfloyd_core.store.manifest import MANIFEST, FileEntry, read_manifest

MARK = ".damaged"  # an empty file in an artifact's directory
# What pyarrow and NumPy raise where a file's structure is damaged; OSError as well, then without a number.
_OF_STRUCTURE = (pa.ArrowException, ValueError, LookupError, TypeError, AttributeError, OverflowError)


def damaged(file: Path, found: str) -> DamagedError:
    """The error of a reader of a file at the top of an artifact; marks the artifact. found: a clause, such as `row 3 has
    other bytes than were written`.
    """
    with suppress(OSError):  # a workspace that may only be read: the error tells as much
        (file.parent / MARK).touch()
    return DamagedError(f"{file} is damaged: {found}. The next run that needs it makes it again.")


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """In this block a library reads a file whose structure may be damaged: then DamagedError is raised. Raises OSError where
    a disk fails.
    """
    try:
        yield
    except OSError as error:
        if error.errno:
            raise
        raise damaged(file, _first_line(error)) from None
    except _OF_STRUCTURE as error:
        raise damaged(file, _first_line(error)) from None


def whole(file: Path) -> Path:
    """A file at the top of an artifact, which a library is about to parse. Raises DamagedError where the artifact is
    finished and the file is not as its manifest says. A process hashes it once, at 1.7 GB/s, and again after it has changed.
    """
    if entry := _entries(file.parent, _change(file.parent / MANIFEST)).get(file.name):
        try:
            _check(entry, file.parent, _change(file))
        except ArtifactError as error:
            raise damaged(file, str(error).removeprefix(f"{file} ")) from None
    return file


_Change = tuple[int, int, int] | None


def _change(file: Path) -> _Change:
    """What differs after a file was written again; None: it is not there."""
    try:
        found = file.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


@lru_cache(maxsize=64)
def _entries(folder: Path, manifest: _Change) -> dict[str, FileEntry]:
    return {entry.path: entry for entry in read_manifest(folder).files} if manifest else {}


@lru_cache(maxsize=1 << 16)
def _check(entry: FileEntry, folder: Path, file: _Change) -> None:
    """Raises ArtifactError, which is not remembered."""
    if damage := entry.damage(folder):
        raise ArtifactError(damage)


def is_marked(folder: Path) -> bool:
    """Whether a reader found damage in an artifact's directory."""
    return (folder / MARK).exists()


def unmark(folder: Path) -> None:
    """Forget what a reader found: every file is whole."""
    with suppress(OSError):  # the next use hashes it once more
        (folder / MARK).unlink(missing_ok=True)


def _first_line(error: Exception) -> str:
    """Of its message, or its kind."""
    return (str(error).splitlines() or [""])[0].rstrip(".") or type(error).__name__
