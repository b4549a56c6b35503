"""Pictures in a bucket, listed by prefix, through fsspec.

A key's ETag tells whether the file changed. So an unchanged bucket costs only its listing (1,000 keys a request; all
keys are in memory meanwhile, 1 kB each). s3fs repeats requests that a server refuses (503) or cuts short; a request
that still fails is a ledger row.
"""

import time
from collections.abc import Iterator
from typing import Any

import fsspec

from deepfloyd_core.config.data_sets import ImageDataset
from deepfloyd_core.errors import ConfigError, DataError
from deepfloyd_core.sources.folder import RACY_NS
from deepfloyd_core.sources.listing import PIECE, TEXT_BYTES, Listed, Texts, large_text, printable, read_text
from deepfloyd_core.sources.names import caption_file, caption_files, kind
from deepfloyd_core.store.bucket import S3_CONFIG, failures

TEXTS_AT_ONCE = 1000


class Bucket:
    """`type = aws`."""

    threads, lost = 32, "unreadable"

    def __init__(self, dataset: ImageDataset) -> None:
        self._fs, self._root = open_place(dataset)
        self.name = f"s3://{self._root}"
        self._captions: dict[str, str] = {}  # known once it was listed
        self._sizes: dict[str, int] = {}  # of large pictures and captions, in bytes

    def listing(self) -> Iterator[Listed]:
        """The keys below the prefix that may be pictures, and the others."""
        found = list_files(self._fs, self._root, self.name)
        self._captions = caption_files(found)
        self._sizes = {name: info["size"] for name, info in found.items() if info["size"] > TEXT_BYTES}
        for name, info in found.items():
            what = kind(name)
            if what == "other" or printable(name) != name:
                yield Listed(printable(name), reason="name_not_utf8", kind=what)
            elif what != "caption":
                text = caption_file(name, self._captions)
                yield Listed(name, info["size"], stamp(info), stamp(found[text]) if text else "none", kind=what)

    def pieces(self, name: str) -> Iterator[bytes]:
        """The object's bytes, a piece at a time: those of an object that changes meanwhile do not have its hash."""
        path, size = f"{self._root}/{name}", self._sizes.get(name, 0)
        try:
            if size <= PIECE:
                yield bytes(self._fs.cat_file(path))
            for start in range(0, size, PIECE) if size > PIECE else ():
                yield bytes(self._fs.cat_file(path, start=start, end=min(start + PIECE, size)))
        except FileNotFoundError:
            raise
        except failures(self._fs) as error:
            raise OSError(f"{self.name}/{name}: {error}") from error

    def texts(self, names: list[str]) -> list[Texts]:
        """The caption object beside each picture."""
        wanted = [caption_file(name, self._captions) for name in names]
        found: dict[str | None, Texts] = {None: Texts()}
        found |= {name: large_text(name) for name in wanted if name is not None and name in self._sizes}
        keys = {f"{self._root}/{name}": name for name in wanted if name is not None and name not in found}
        for start in range(0, len(keys), TEXTS_AT_ONCE):
            data = self._fs.cat(list(keys)[start : start + TEXTS_AT_ONCE], on_error="omit")
            found |= {keys[path]: read_text(text, keys[path]) for path, text in data.items()}
        return [found.get(name) or Texts(None, f"{name} cannot be read", passing=True) for name in wanted]


def open_place(dataset: ImageDataset) -> tuple[Any, str]:
    """The file system of a data set's place, and the path in it. Raises ConfigError when its library is not installed."""
    url = dataset.instance_data_dir
    if dataset.aws_bucket_name:
        url = f"s3://{dataset.aws_bucket_name}/{dataset.aws_data_prefix or ''}"
    options: dict[str, Any] = {}
    if url.startswith("s3://"):
        key, secret = dataset.aws_access_key_id, dataset.aws_secret_access_key
        options = {
            "key": key.get_secret_value() if key else None, "secret": secret.get_secret_value() if secret else None,
            "endpoint_url": dataset.aws_endpoint_url, "client_kwargs": {"region_name": dataset.aws_region_name},
            "config_kwargs": S3_CONFIG, "use_listings_cache": False, "max_concurrency": 1,
        }  # fmt: skip
    try:
        fs, path = fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        raise ConfigError(
            f"{dataset.id}: {url} needs a package that is not installed ({error}). For S3: pip install "
            "'deepfloyd-pipeline[s3]'."
        ) from None
    return fs, str(path).rstrip("/")


def list_files(fs: Any, root: str, where: str) -> dict[str, dict[str, Any]]:
    """fsspec's record of each file below a place, by its name there. Raises DataError."""
    try:
        found = fs.find(root, detail=True)
    except failures(fs) as error:
        raise DataError(
            f"{where} cannot be listed: {type(error).__name__}: {error}. Credentials come from the environment "
            "(AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY) or the machine's role; check aws_bucket_name, "
            "aws_data_prefix and aws_endpoint_url."
        ) from None
    names = {path.removeprefix(f"{root}/"): info for path, info in found.items() if info["type"] == "file"}
    return {name: info for name, info in names.items() if not any(part.startswith(".") for part in name.split("/"))}


def stamp(info: dict[str, Any]) -> str:
    """A value that changes when the file does: the ETag, or a local file's size and times."""
    if max(info.get("mtime") or 0, info.get("created") or 0 if "mtime" in info else 0) * 1e9 > time.time_ns() - RACY_NS:
        return ""
    return ":".join(str(info.get(key)) for key in ("size", "ETag", "LastModified", "mtime", "created", "ino"))
