"""Writes small files durably, and hashes files: a name appears only when its bytes are on the disk.

Costs one fsync a file and one a directory. A kill leaves at most a `.tmp-` file, never half of a real one.
"""

import errno
import hashlib
import json
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deepfloyd_core.errors import ArtifactError
from deepfloyd_core.types import Json

TMP_PREFIX = ".tmp-"
_UNSUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF)


def sha256_bytes(data: bytes) -> str:
    """Hex sha256 of bytes."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file, read in pieces (1.7 GB/s)."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def fsync_path(path: Path) -> None:
    """Flush a file or a directory entry to the disk.

    Some network file systems refuse it for directories, and keep their entries without it: that refusal is no error.
    """
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _UNSUPPORTED or not path.is_dir():
            raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(fd)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is fsynced and renamed over `path`."""
    # The host too: in containers the workers of a cluster have the same few process ids.
    tmp = path.with_name(f"{TMP_PREFIX}{socket.gethostname()}-{os.getpid()}-{path.name}")
    try:
        yield tmp
        fsync_path(tmp)
        tmp.replace(path)
        fsync_path(path.parent)
    except OSError as error:
        if error.filename in (None, str(tmp)):  # a write names no file; the temporary one is nobody's
            raise OSError(error.errno, error.strerror or str(error), str(path)) from error
        raise
    finally:
        tmp.unlink(missing_ok=True)


def read_bytes(path: Path) -> bytes:
    """Read a whole file. Raises OSError that names it; Python's names none where the disk fails while it is read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def write_bytes(path: Path, data: bytes) -> None:
    """Write a whole file durably."""
    with atomic_path(path) as tmp:
        tmp.write_bytes(data)


def canonical_json(value: Any) -> str:
    """JSON with one spelling for each value: sorted keys, no spaces, no NaN. Fingerprints are taken over this."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _sealed_text(record: Json) -> str:
    return json.dumps(record, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_sealed(path: Path, record: Json) -> None:
    """Write a JSON record that contains its own sha256, so that a flipped byte in it is detected."""
    seal = sha256_bytes(canonical_json(record).encode())
    write_bytes(path, _sealed_text({**record, "seal": seal}).encode())


def read_sealed(path: Path, remedy: str) -> Json:
    """Read a sealed record. Raises ArtifactError, whose message ends with the remedy, when any byte has changed, and
    OSError that names the file.

    remedy: a sentence without its full stop. What lies beside a damaged record may be all that is left of a version or a
    training, so no remedy removes a directory.
    """
    data = read_bytes(path)
    try:
        record: Json = json.loads(data)
        seal = record.pop("seal")
        whole = _sealed_text({**record, "seal": seal}).encode() == data
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ArtifactError(f"{path} is not a sealed record ({error}). {remedy}.") from None
    if not whole or seal != sha256_bytes(canonical_json(record).encode()):
        raise ArtifactError(f"{path} was changed after it was written. {remedy}.")
    return record


def record_diff(old: Json, new: Json, prefix: str = "") -> list[str]:
    """Field-level differences of two nested dicts, e.g. `spec.learning_rate: 4e-05 -> 0.0001`."""
    lines = []
    for key in sorted(set(old) | set(new)):
        before, after, name = old.get(key), new.get(key), f"{prefix}{key}"
        if isinstance(before, dict) and isinstance(after, dict):
            lines += record_diff(before, after, f"{name}.")
        elif before != after:
            lines.append(f"{name}: {before!r} -> {after!r}")
    return lines


def text_lines(text: str) -> list[str]:
    """The lines of a text. Not `str.splitlines`, which also cuts at U+2028, U+0085 and form feeds, inside a caption."""
    return re.split("\r\n?|\n", text)
