"""A table of URLs with captions: each picture is downloaded once, into a folder that later runs read.

A download has a limit on its total time, not only between bytes, and a size limit: so a slow or endless answer costs
only one ledger row. The next run retries failed downloads.
"""

import os
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import httpx

from deepfloyd_core.config.data_blocks import CaptionTable
from deepfloyd_core.config.data_sets import TABLES, ImageDataset
from deepfloyd_core.errors import ConfigError
from deepfloyd_core.files import sha256_bytes, write_bytes
from deepfloyd_core.sources.listing import Listed, Texts
from deepfloyd_core.sources.tables import table_texts
from deepfloyd_core.store.provenance import DISTRIBUTION

TRIES = 3
TIMEOUT = httpx.Timeout(20.0, connect=10.0)  # seconds without a byte
WHOLE_S = 120.0
MAX_BYTES = 256 << 20
_AGAIN = (408, 429, 500, 502, 503, 504)  # statuses that may heal
_LONGEST_WAIT_S = 30.0


class Urls:
    """`type = csv` or `parquet`. A picture's name is its URL."""

    threads, lost = 32, "download_failed"

    def __init__(self, dataset: ImageDataset) -> None:
        self._dataset, self._kept = dataset, Path(dataset.csv_cache_dir or "")
        self.name = str(dataset.csv_file)
        self._path = Path(self.name)
        if not self._path.is_file():
            raise ConfigError(f"{dataset.id}: csv_file is {self.name!r}, and there is no such file.")
        # Servers refuse the names of libraries.
        agent = dataset.csv_user_agent or f"{DISTRIBUTION}/{metadata.version(DISTRIBUTION)}"
        self._client = httpx.Client(
            headers={"User-Agent": agent}, follow_redirects=True, timeout=TIMEOUT,
            limits=httpx.Limits(max_connections=32),
        )  # fmt: skip
        self._captions: dict[str, list[str]] | None = None  # of each URL, known once it was listed

    def _read_table(self) -> dict[str, list[str]]:
        own = self._dataset.caption_strategy in TABLES and self._dataset.parquet is None
        columns = {
            "filename_column": self._dataset.csv_url_column,
            "caption_column": self._dataset.csv_caption_column if own else (),
        }
        table = CaptionTable.model_validate({"path": self.name, **columns})
        found: dict[str, list[str]] = {}
        for url, texts in table_texts(table, self._path, self._dataset.type, f"{self._dataset.id}: {self.name}"):
            found.setdefault(url.strip(), []).extend(texts)
        return found

    def listing(self) -> Iterator[Listed]:
        """Every URL of the table once."""
        self._captions = self._read_table()
        for url in self._captions:
            if not url.lower().startswith(("http://", "https://")):
                yield Listed(url, reason="not_a_url")
                continue
            try:
                stat = os.stat(self._file(url))  # noqa: PTH116 - no Path for each of a million names
            except OSError:
                yield Listed(url)
            else:
                yield Listed(url, stat.st_size, f"{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ino}")

    def read(self, name: str) -> bytes:
        """The bytes that an earlier run kept, else a download."""
        file = Path(self._file(name))
        if file.is_file():
            return file.read_bytes()
        data = self._download(name)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(file, data)
        return data

    def texts(self, names: list[str]) -> list[Texts]:
        """The captions beside the URL."""
        captions = self._read_table() if self._captions is None else self._captions
        return [Texts(tuple(captions[name]) or None) for name in names]

    def _file(self, url: str) -> str:
        digest = sha256_bytes(url.encode())
        return f"{self._kept}/{digest[:2]}/{digest}"

    def _download(self, url: str) -> bytes:
        for attempt in range(1, TRIES + 1):
            wait_s = 0.5 * 2**attempt
            try:
                with self._client.stream("GET", url) as answer:
                    if answer.status_code == 200:
                        return _body(answer, url)
                    error = OSError(f"{url}: HTTP {answer.status_code} {answer.reason_phrase}".rstrip())
                    if answer.status_code not in _AGAIN:
                        raise error
                    wait_s = _asked_wait_s(answer, wait_s)
            except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as failure:
                error = OSError(f"{url}: {str(failure) or type(failure).__name__}")
                if isinstance(failure, (httpx.InvalidURL, httpx.UnsupportedProtocol, httpx.TooManyRedirects)):
                    raise error from failure
            if attempt < TRIES:
                time.sleep(wait_s)
        raise error


def _body(answer: httpx.Response, url: str) -> bytes:
    data, end = bytearray(), time.monotonic() + WHOLE_S
    for piece in answer.iter_bytes():
        data += piece
        if len(data) > MAX_BYTES:
            raise OSError(f"{url}: more than {MAX_BYTES >> 20} MiB")
        if time.monotonic() > end:
            raise OSError(f"{url}: not done after {WHOLE_S:g} s")
    return bytes(data)


def _asked_wait_s(answer: httpx.Response, default_s: float) -> float:
    asked = answer.headers.get("retry-after", "")
    return min(float(asked), _LONGEST_WAIT_S) if asked.isdigit() else default_s
