"""A folder or a bucket as a place to publish to, through fsspec."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from deepfloyd_core.errors import ConfigError, StorageError
from deepfloyd_core.sources.bucket import S3_CONFIG, failures
from deepfloyd_core.types import Report

SUMS = "SHA256SUMS"  # as the tool of this name writes and checks it
PROGRESS = ".publishing"  # the same of what is sent so far, while a publication is under way
_TRIES = 3
T = TypeVar("T")


@dataclass(frozen=True)
class PublishedFile:
    """A file of a version."""

    name: str  # its path in the publication
    path: Path
    bytes: int
    sha256: str


class FilePlace:
    """A folder on this machine, or a prefix in a bucket (`s3://bucket/prefix`)."""

    def __init__(self, target: str) -> None:
        """Raises ConfigError when the library of the target's protocol is not installed, or there is none."""
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

    def known(self, files: Sequence[PublishedFile]) -> tuple[set[str], set[str]]:
        """See `Place`."""
        sizes = self._asked(self._sizes)
        sums = {**self._sums(SUMS, sizes), **self._sums(PROGRESS, sizes)}
        if sizes and SUMS not in sizes and PROGRESS not in sizes:
            raise ConfigError(
                f"{self.name} holds other files and no {SUMS} of a publication. Name an empty place, or a new one."
            )
        there = {name for name in sums if name in sizes}
        same = {one.name for one in files if sums.get(one.name) == one.sha256 and sizes.get(one.name) == one.bytes}
        return same, there

    def send(
        self, files: Sequence[PublishedFile], removed: Sequence[str], sums: str, title: str, report: Report
    ) -> str:
        """See `Place`."""
        sizes = self._asked(self._sizes)
        if not files and not removed and self._text(SUMS, sizes) == sums:
            return self.name
        done = {**self._sums(SUMS, sizes), **self._sums(PROGRESS, sizes)}
        total = sum(one.bytes for one in files)
        sent = 0
        for one in files:
            report(sent, total, f"bytes sent, {one.name}")
            self._asked(partial(self._put, one))
            sent += one.bytes
            done[one.name] = one.sha256
            self._write(PROGRESS, _lines(done))
        for name in removed:
            self._asked(partial(self._fs.rm_file, f"{self._root}/{name}"))
        self._write(SUMS, sums)
        if PROGRESS in self._asked(self._sizes):
            self._asked(lambda: self._fs.rm_file(f"{self._root}/{PROGRESS}"))
        report(total, total, "bytes sent")
        return self.name

    def _sizes(self) -> dict[str, int]:
        """The bytes of each file that is there."""
        self._fs.invalidate_cache()
        if not self._fs.exists(self._root):
            return {}
        found = self._fs.find(self._root, detail=True)
        return {path.removeprefix(f"{self._root}/"): int(info["size"] or 0) for path, info in found.items()}

    def _text(self, name: str, sizes: dict[str, int]) -> str:
        if name not in sizes:
            return ""
        return self._asked(lambda: bytes(self._fs.cat_file(f"{self._root}/{name}"))).decode("utf-8", "replace")

    def _sums(self, name: str, sizes: dict[str, int]) -> dict[str, str]:
        return {
            file: digest for digest, _, file in (line.partition("  ") for line in self._text(name, sizes).splitlines())
        }

    def _put(self, one: PublishedFile) -> None:
        to = f"{self._root}/{one.name}"
        if not self._is_local:
            self._fs.put_file(str(one.path), to)
            return
        Path(to).parent.mkdir(parents=True, exist_ok=True)
        part = Path(f"{to}.part")
        self._fs.put_file(str(one.path), str(part))
        part.replace(to)

    def _write(self, name: str, text: str) -> None:
        if self._is_local:
            Path(self._root).mkdir(parents=True, exist_ok=True)
        self._asked(lambda: self._fs.pipe_file(f"{self._root}/{name}", text.encode()))

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


def _lines(sums: dict[str, str]) -> str:
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))
