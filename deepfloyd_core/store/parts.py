"""Finished files of an unfinished artifact: each has its sha256 recorded beside it, so that a resumed build can trust it.

The records are dot files, and are removed when the manifest is written.
"""

import shutil
from pathlib import Path

from deepfloyd_core.errors import ArtifactError
from deepfloyd_core.files import read_sealed, sha256_file, write_sealed


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


def recorded_hash(file: Path) -> str | None:
    """The sha256 that `finish_part` recorded for a file."""
    try:
        return str(read_sealed(_record(file), "The part is made again")["sha256"])
    except (OSError, ArtifactError):
        return None


def _record(file: Path) -> Path:
    return file.with_name(f".part-{file.name}.json")
