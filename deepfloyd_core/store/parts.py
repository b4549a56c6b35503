"""Finished files of an unfinished artifact: each has its sha256 recorded beside it, so that a resumed build can trust it.

The records are dot files, and are removed when the manifest is written.
"""

import os
import shutil
from pathlib import Path

from deepfloyd_core.errors import ArtifactError
from deepfloyd_core.files import read_sealed, sha256_file, write_sealed

_PIECE = 1 << 30  # bytes that the kernel copies at once


def finish_part(file: Path, sha256: str | None = None) -> None:
    """Record a finished file of an unfinished artifact, so that a resumed build can trust it by its hash, if known."""
    write_sealed(_record(file), {"bytes": file.stat().st_size, "sha256": sha256 or sha256_file(file)})


def part_is_whole(file: Path) -> bool:
    """Whether an earlier, interrupted build finished this file and its bytes are still the same."""
    return file.is_file() and recorded_hash(file) == sha256_file(file)


def take_part(old: Path, sha256: str, new: Path) -> None:
    """Link (or copy) a file of a finished artifact into an unfinished one, as a finished part of it.

    sha256: of the file as it is now. The caller has hashed it; the manifest only says what it was.
    """
    if recorded_hash(new) == sha256 and part_is_whole(new):
        return
    new.unlink(missing_ok=True)
    try:
        new.hardlink_to(old)
    except OSError:  # a file system without links
        shutil.copyfile(old, new)
    finish_part(new, sha256)


def copy_part(old: Path, sha256: str, new: Path) -> None:
    """`take_part` as a copy, so that no bit that flips in one file is in both. A file system with reflinks takes no room for
    it. Raises ArtifactError where the copy is not what the old file's manifest says.
    """
    if recorded_hash(new) == sha256 and part_is_whole(new):
        return
    new.unlink(missing_ok=True)
    copy_file(old, new)
    if sha256_file(new) != sha256:
        raise ArtifactError(
            f"{old} has other bytes than its manifest says. Move its artifact out of the workspace, and the next run "
            "makes it anew."
        )
    finish_part(new, sha256)


def copy_file(old: Path, new: Path) -> None:
    """Copy a file; inside the kernel where it can, which shares the blocks where the file system does."""
    try:
        with old.open("rb") as source, new.open("wb") as copy:
            while os.copy_file_range(source.fileno(), copy.fileno(), _PIECE):
                pass
    except (AttributeError, OSError):  # macOS; a kernel or a file system that does not
        shutil.copyfile(old, new)
    if new.stat().st_size != old.stat().st_size:
        shutil.copyfile(old, new)


def recorded_hash(file: Path) -> str | None:
    """The sha256 that `finish_part` recorded for a file."""
    try:
        return str(read_sealed(_record(file), "The part is made again")["sha256"])
    except (OSError, ArtifactError):
        return None


def _record(file: Path) -> Path:
    return file.with_name(f".part-{file.name}.json")
