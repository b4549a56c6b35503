"""Where pictures lie: a folder, a bucket, a table of URLs, a saved data set or tar files, all with the same interface.

Later code knows a picture only by its data set and its name there, and asks for its bytes. A source is opened once in
each process that needs it, so child processes and other machines open their own.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol

from deepfloyd_core.files import sha256_bytes
from deepfloyd_core.sources.listing import Listed, Raw, Texts

if TYPE_CHECKING:
    from deepfloyd_core.config.data_sets import ImageDataset

__all__ = ["Listed", "Raw", "Source", "Texts", "open_source", "read_again"]


class Source(Protocol):
    """A place with pictures."""

    name: str  # the place, in words: a path or a URL
    threads: int  # reads that wait on each other at once; 0: as many as the run has workers
    lost: str  # the ledger's word for a picture that cannot be read

    def listing(self) -> Iterator[Listed]:
        """Every file, in any order, also those that are no input. Raises DataError when nothing can be listed."""

    def pieces(self, name: str) -> Iterator[bytes]:
        """A picture's bytes, a piece at a time: a scan hashes many at once, and need not hold them. Raises OSError when they
        cannot be read, or are more than FILE_BYTES.
        """

    def texts(self, names: list[str]) -> list[Texts]:
        """The captions that lie with the pictures; called after `listing`."""


@lru_cache(maxsize=64)
def open_source(dataset: "ImageDataset") -> Source:
    """The source of a data set. Raises ConfigError when the source does not exist or its library is not installed."""
    return SOURCES[dataset.type](dataset)


# Each imports its module when it is called: some load a library, and configuration errors answer in under a second.
def _folder(dataset: "ImageDataset") -> Source:
    from deepfloyd_core.sources.folder import Folder

    return Folder(dataset)


def _bucket(dataset: "ImageDataset") -> Source:
    from deepfloyd_core.sources.bucket import Bucket

    return Bucket(dataset)


def _tars(dataset: "ImageDataset") -> Source:
    from deepfloyd_core.sources.tars import Tars

    return Tars(dataset)


def _huggingface(dataset: "ImageDataset") -> Source:
    from deepfloyd_core.sources.huggingface import Saved

    return Saved(dataset)


def _urls(dataset: "ImageDataset") -> Source:
    from deepfloyd_core.sources.urls import Urls

    return Urls(dataset)


# By the value of `type`.
SOURCES: dict[str, Callable[["ImageDataset"], Source]] = {
    "local": _folder, "aws": _bucket, "webdataset": _tars, "huggingface": _huggingface, "csv": _urls, "parquet": _urls,
}  # fmt: skip


def read_again(dataset: "ImageDataset", name: str, sha256: str | None) -> bytes | None:
    """A picture's bytes; None when it was removed or is no longer the one that the scan saw. Raises OSError."""
    try:
        data = b"".join(open_source(dataset).pieces(name))
    except FileNotFoundError:
        return None
    return data if sha256_bytes(data) == sha256 else None
