"""A table of URLs with captions: each picture is downloaded once, into a folder that later runs read.

A download has limits (`downloads`), so a slow or endless answer costs only one ledger row. The next run retries failed
downloads.
"""

import os
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from deepfloyd_core.config.data_blocks import CaptionTable
from deepfloyd_core.config.data_sets import TABLES, ImageDataset
from deepfloyd_core.errors import ConfigError
from deepfloyd_core.files import sha256_bytes
from deepfloyd_core.sources.downloads import AT_ONCE, download, download_client
from deepfloyd_core.sources.listing import Listed, Texts
from deepfloyd_core.sources.tables import table_texts
from deepfloyd_core.store.provenance import DISTRIBUTION


class Urls:
    """`type = csv` or `parquet`. A picture's name is its URL."""

    threads, lost = AT_ONCE, "download_failed"

    def __init__(self, dataset: ImageDataset) -> None:
        self._dataset, self._kept = dataset, Path(dataset.csv_cache_dir or "")
        self.name = str(dataset.csv_file)
        self._path = Path(self.name)
        if not self._path.is_file():
            raise ConfigError(f"{dataset.id}: csv_file is {self.name!r}, and there is no such file.")
        # Servers refuse the names of libraries.
        agent = dataset.csv_user_agent or f"{DISTRIBUTION}/{metadata.version(DISTRIBUTION)}"
        self._client = download_client(agent, dataset.csv_private_addresses)
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
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            download(self._client, name, file)
        return file.read_bytes()

    def texts(self, names: list[str]) -> list[Texts]:
        """The captions beside the URL."""
        captions = self._read_table() if self._captions is None else self._captions
        return [Texts(tuple(captions[name]) or None) for name in names]

    def _file(self, url: str) -> str:
        digest = sha256_bytes(url.encode())
        return f"{self._kept}/{digest[:2]}/{digest}"
