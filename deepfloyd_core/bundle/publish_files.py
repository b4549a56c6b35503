"""A folder or a bucket as a place to publish to, through fsspec; and the record of what was published there."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from deepfloyd_core.errors import ConfigError, StorageError
from deepfloyd_core.files import TMP_PREFIX, canonical_json, fsync_path, parsed_json, sha256_file, write_bytes
from deepfloyd_core.store.bucket import S3_CONFIG, failures
from deepfloyd_core.store.file_faults import written
from deepfloyd_core.types import Report

SUMS = "SHA256SUMS"  # for people, as the tool of this name writes and checks it
RECORD = ".deepfloyd-publication.json"  # sha256 of each file that we have put there, by name; null while it is sent
OTHERS = "holds other files, and no publication of ours. Name an empty place, or a new one."
_PART = ".deepfloyd-part"  # a file that is being written, in a folder
_TRIES = 3
T = TypeVar("T")


@dataclass(frozen=True)
class PublishedFile:
    """A file of a version."""

    name: str  # its path in the publication
    path: Path
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Known:
    """What is at a place."""

    same: frozenset[str]  # of the files to publish those that are there, with the same bytes
    ours: frozenset[str]  # what publications have put there, and is there still
    is_whole: bool  # nothing is left to do for a publication of these files


class FilePlace:
    """A folder on this machine, or a prefix in a bucket (`s3://bucket/prefix`)."""

    def __init__(self, target: str) -> None:
        """Raises ConfigError when the library of the target's protocol is not installed."""
        options: dict[str, Any] = {}
        if target.startswith("s3://"):
            options = {"config_kwargs": S3_CONFIG, "use_listings_cache": False}
        try:
            self._fs, root = fsspec.core.url_to_fs(target, **options)
        except (ImportError, ValueError) as error:
            raise ConfigError(
                f"{target} cannot be published to: {error}. For S3: pip install 'deepfloyd-pipeline[s3]'."
            ) from None
        self._root, self._is_local = str(root).rstrip("/"), "file" in self._fs.protocol
        self.name = self._root if self._is_local else target.rstrip("/")

    def known(self, files: Sequence[PublishedFile]) -> Known:
        """See `Place`."""
        sizes = self._asked(self._sizes)
        record = self._record(sizes)
        if record is None and sizes:
            raise ConfigError(f"{self.name} {OTHERS}")
        record = record or {}
        same = {
            one.name
            for one in files
            if record.get(one.name) == one.sha256 and sizes.get(one.name) == one.bytes and self._holds(one)
        }
        names = {one.name for one in files}
        return Known(frozenset(same), frozenset(record.keys() & sizes.keys()), same == names == record.keys() - {SUMS})

    def send(
        self, files: Sequence[PublishedFile], removed: Sequence[str], digests: Mapping[str, str], title: str,
        report: Report,
    ) -> str:  # fmt: skip
        """See `Place`. The record says of a file that it is on its way before its first byte is written."""
        record: dict[str, str | None] = {**(self._record(self._asked(self._sizes)) or {}), SUMS: None}
        record |= dict.fromkeys(one.name for one in files)
        self._write(RECORD, canonical_json(record))
        total, sent = sum(one.bytes for one in files), 0
        for one in files:
            report(sent, total, f"bytes sent, {one.name}")
            self._asked(partial(self._put, one))
            sent += one.bytes
            record[one.name] = one.sha256
            self._write(RECORD, canonical_json(record))
        for name in removed:
            self._asked(partial(self._fs.rm_file, f"{self._root}/{name}"))
        self._write(SUMS, sums_text(digests))
        self._write(RECORD, whole_record(digests))
        report(total, total, "bytes sent")
        return self.name

    def _sizes(self) -> dict[str, int]:
        """The bytes of each file that is there, but of the record."""
        self._fs.invalidate_cache()
        if not self._fs.exists(self._root):
            return {}
        found = self._fs.find(self._root, detail=True)
        sizes = {path.removeprefix(f"{self._root}/"): int(info["size"] or 0) for path, info in found.items()}
        return {name: size for name, size in sizes.items() if name != _PART and not name.startswith(TMP_PREFIX)}

    def _record(self, sizes: Mapping[str, int]) -> dict[str, str | None] | None:
        """The record; None: there is none."""
        if RECORD not in sizes:
            return None
        return parsed_record(self._asked(partial(self._fs.cat_file, f"{self._root}/{RECORD}")), self.name)

    def _holds(self, one: PublishedFile) -> bool:
        """Whether a file in a folder has the bytes; a bucket's are not read again."""
        return not self._is_local or sha256_file(Path(self._root, one.name)) == one.sha256

    def _put(self, one: PublishedFile) -> None:
        to = f"{self._root}/{one.name}"
        if not self._is_local:
            self._fs.put_file(str(one.path), to)
            return
        Path(to).parent.mkdir(parents=True, exist_ok=True)
        part = Path(self._root, _PART)
        with written(part.parent):
            try:
                shutil.copyfile(one.path, part)
                fsync_path(part)
                part.replace(to)
            finally:
                part.unlink(missing_ok=True)

    def _write(self, name: str, text: str) -> None:
        if self._is_local:
            folder = Path(self._root)
            with written(folder):
                folder.mkdir(parents=True, exist_ok=True)
                for left in folder.glob(f"{TMP_PREFIX}*-{name}"):
                    left.unlink(missing_ok=True)  # of a publication that was killed
                write_bytes(folder / name, text.encode())
            return
        self._asked(partial(self._fs.pipe_file, f"{self._root}/{name}", text.encode()))

    def _asked(self, ask: Callable[[], T]) -> T:
        """What the place answers. Raises StorageError when it does not, several times."""
        for attempt in range(1, _TRIES + 1):
            try:
                return ask()
            except failures(self._fs) as error:
                if attempt == _TRIES:
                    credentials = (
                        "" if self._is_local else " Credentials come from the environment or the machine's role."
                    )
                    told = f"{type(error).__name__}: {error}"
                    raise StorageError(f"{self.name} cannot be published to: {told}.{credentials}") from None
        raise AssertionError


def need_empty(folder: Path) -> None:
    """Raise ConfigError for a folder with files in it, and for what is none."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        fault = "holds files" if folder.is_dir() else "is no folder"
        raise ConfigError(f"{folder} {fault}. Name an empty folder, or a new one.")


def sums_text(digests: Mapping[str, str]) -> str:
    """The text of SHA256SUMS. digests: sha256 of each file, by its name."""
    return "".join(f"{digest}  {name}\n" for name, digest in digests.items())


def whole_record(digests: Mapping[str, str]) -> str:
    """The text of the record when all is sent."""
    return canonical_json({**digests, SUMS: ""})


def parsed_record(data: bytes, place: str) -> dict[str, str | None]:
    """The record of a place. Raises ConfigError when it is none."""
    try:
        found = parsed_json(data)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ConfigError(
            f"{RECORD} of {place} is damaged, so it is not known what was published there. Name a new place."
        )
    return found
