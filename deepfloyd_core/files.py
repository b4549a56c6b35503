"""Writes small files durably, hashes and seals files, and reads those of others within limits.

What is read back decides results, so it carries its own sha256: a record that must not be lost is a sealed record, and what
can be made anew is a note, with the seal behind its bytes.

A name appears only when its bytes are on the disk.
Costs one fsync a file and one a directory. A kill leaves at most a `.tmp-` file, never half of a real one.
"""

import errno
import hashlib
import json
import logging
import mmap
import os
import re
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from deepfloyd_core.errors import ArtifactError
from deepfloyd_core.types import Json

log = logging.getLogger(__name__)

TMP_PREFIX = ".tmp-"
_SEAL_BYTES = len("\nsha256 \n") + 64
_PIECE = 1 << 20  # bytes of a read
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


def make_folder(path: Path, mode: int = 0o777) -> None:
    """Create a folder that may be there, and its parents, durably: what is flushed in it is then found after a power loss.

    mode: of the folder itself, if it is new.
    """
    missing = [each for each in (path, *path.parents) if not each.exists()]
    path.mkdir(mode, parents=True, exist_ok=True)
    for each in reversed(missing):
        fsync_path(each.parent)


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
        if error.filename is None or str(error.filename) == str(
            tmp
        ):  # a write names no file; the temporary one is nobody's
            raise OSError(error.errno, error.strerror or str(error), str(path)) from error
        raise
    finally:
        with suppress(OSError):  # a disk that refuses this as well: the first refusal is told
            tmp.unlink(missing_ok=True)


def read_bytes(path: Path) -> bytes:
    """Read a whole file. Raises OSError that names it; Python's names none where the disk fails while it is read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def file_pieces(path: Path, most: int) -> Iterator[bytes]:
    """The bytes of a file that others may have made, 1 MiB at a time. Raises OSError for a pipe, a device and more than
    `most` bytes: sizes are checked first, but may be wrong by the time of the read.
    """
    with open(path, "rb", buffering=0, opener=_at_once) as handle:
        found = os.fstat(handle.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise OSError(f"{path} is no regular file")
        left = most
        if found.st_size > left:
            raise _too_large(path, most)
        while piece := handle.read(_PIECE):
            left -= len(piece)
            if left < 0:
                raise _too_large(path, most)
            yield piece


def read_file(path: Path, most: int) -> bytes:
    """The bytes of a file that others may have made. Raises OSError as `file_pieces`."""
    return b"".join(file_pieces(path, most))


def _at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a pipe without a writer would let it wait for ever


def _too_large(path: Path, most: int) -> OSError:
    return OSError(f"{path} is larger than {most / 2**20:,.10g} MiB")


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
    write_bytes(path, sealed_bytes(record))


def sealed_bytes(record: Json) -> bytes:
    """The bytes that `write_sealed` writes."""
    seal = sha256_bytes(canonical_json(record).encode())
    return _sealed_text({**record, "seal": seal}).encode()


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


def write_note(path: Path, data: bytes) -> None:
    """Write a note durably: see `read_note`."""
    with atomic_path(path) as tmp:
        tmp.write_bytes(data)
        seal_note(tmp)


def seal_note(path: Path) -> None:
    """Append the seal to the bytes of a note, before it gets its name."""
    seal = _seal(sha256_file(path))
    with path.open("ab") as file:
        file.write(seal)


def read_note(path: Path) -> memoryview | None:
    """The bytes of a note, mapped. None where there is none, and where its seal does not fit, which is logged: then the
    caller makes it anew. Costs a hash of the bytes (1.7 GB/s).
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size - _SEAL_BYTES
            if size > 0 and _digest_of(file, size) == file.read():
                return memoryview(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))[:size]
        log.warning("%s has no seal that fits its bytes: it is made anew", path)
    except FileNotFoundError:
        pass
    except OSError as error:
        log.warning("%s cannot be read, so it is made anew: %s", path, error.strerror)
    return None


def _digest_of(file: BinaryIO, size: int) -> bytes:
    """The seal of the next bytes of a file."""
    digest = hashlib.sha256()
    while size and (piece := file.read(min(size, _PIECE))):
        digest.update(piece)
        size -= len(piece)
    return _seal(digest.hexdigest())


def _seal(sha256: str) -> bytes:
    return f"\nsha256 {sha256}\n".encode()


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


def parsed_json(data: bytes | str, as_object: Callable[[list[tuple[str, Any]]], Json] | None = None) -> Any:
    """A value of JSON that others wrote. Raises ValueError, also where it is nested too deeply. as_object: makes an object
    of its pairs.
    """
    try:
        return json.loads(data, object_pairs_hook=as_object)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def each_once(pairs: list[tuple[str, Any]]) -> Json:
    """For `parsed_json`. Raises ValueError where a key is there twice: Python keeps the last one, and others none."""
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a key that is there twice")
    return found


def text_lines(text: str) -> list[str]:
    """The lines of a text. Not `str.splitlines`, which also cuts at U+2028, U+0085 and form feeds, inside a caption."""
    return re.split("\r\n?|\n", text)
