"""A table of URLs with captions: each picture is downloaded once, into a folder that later runs read.

A download has limits (`downloads`), so a slow or endless answer costs only one ledger row. The next run retries failed
downloads.
"""

import os
from array import array
from collections.abc import Iterator
from hashlib import sha256
from importlib import metadata
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from deepfloyd_core.config.base import is_file
from deepfloyd_core.config.data_blocks import CaptionTable
from deepfloyd_core.config.data_sets import TABLES, ImageDataset
from deepfloyd_core.errors import ConfigError
from deepfloyd_core.files import file_pieces, sha256_bytes
from deepfloyd_core.sources.caption_tables import TableTexts, table_texts
from deepfloyd_core.sources.columns import LISTED, LISTED_BLOCK, TEXTS, in_blocks, lists_at, told
from deepfloyd_core.sources.downloads import AT_ONCE, download, download_client
from deepfloyd_core.sources.listing import FILE_BYTES, Listed, Texts
from deepfloyd_core.store.file_faults import written
from deepfloyd_core.store.provenance import DISTRIBUTION

_URL = "^[hH][tT][tT][pP][sS]?://"  # not (?i), which also takes a long s
_DIGEST, _BYTES = 32, pa.large_binary()  # bytes of a sha256


class Urls:
    """`type = csv` or `parquet`. A picture's name is its URL."""

    threads, lost = AT_ONCE, "download_failed"

    def __init__(self, dataset: ImageDataset) -> None:
        self._dataset, self._kept = dataset, Path(dataset.csv_cache_dir or "")
        self.name = str(dataset.csv_file)
        self._path = Path(self.name)
        if not is_file(self._path):
            raise ConfigError(f"{dataset.id}: csv_file is {self.name!r}, and there is no such file.")
        # Servers refuse the names of libraries.
        agent = dataset.csv_user_agent or f"{DISTRIBUTION}/{metadata.version(DISTRIBUTION)}"
        self._client = download_client(agent, dataset.csv_private_addresses)
        self._captions: TableTexts | None = None  # of each URL, known once it was listed

    def _read_table(self) -> TableTexts:
        own = self._dataset.caption_strategy in TABLES and self._dataset.parquet is None
        columns = {
            "filename_column": self._dataset.csv_url_column,
            "caption_column": self._dataset.csv_caption_column if own else (),
        }
        table = CaptionTable.model_validate({"path": self.name, **columns})
        return table_texts(table, self._path, self._dataset.type, f"{self._dataset.id}: {self.name}").by_name()

    def listing(self) -> Iterator[Listed]:
        """Every URL of the table once."""
        for block in self.listed().to_batches():
            yield from (Listed(**row) for row in block.to_pylist())

    def listed(self) -> pa.Table:
        """The same as LISTED. Files that were kept are looked up folder by folder: at random a million take three times as
        long.
        """
        self._captions = self._read_table()
        urls = self._captions.names
        is_url = pc.match_substring_regex(urls, _URL)
        sizes, stamps = self._kept_files(urls, is_url)
        reasons = pc.if_else(is_url, pa.scalar(None, pa.string()), "not_a_url")
        nothing, same = pa.nulls(len(urls), pa.string()), pa.repeat("", len(urls))
        return in_blocks([urls, sizes, stamps, same, reasons, nothing, pa.repeat("picture", len(urls))], LISTED)

    def _kept_files(self, urls: pa.Array, is_url: pa.Array) -> tuple[pa.Array, pa.Array]:
        """The size and the stamp of each URL's file; 0 and "" where there is none."""
        places, sizes, times, inodes = array("q"), array("q"), array("q"), array("Q")
        for place, file in self._files(urls, np.flatnonzero(is_url.to_numpy(zero_copy_only=False))):
            try:
                stat = os.stat(file)  # noqa: PTH116 - no Path for each of a million names
            except OSError:
                continue
            places.append(place)
            sizes.append(stat.st_size)
            times.append(stat.st_mtime_ns)
            inodes.append(stat.st_ino)
        number = np.full(len(urls), -1)
        number[np.asarray(places)] = np.arange(len(places))
        numbers = pa.array(number, mask=number < 0)
        facts = [pa.array(np.asarray(each)) for each in (sizes, times, inodes)]
        stamps = pc.binary_join_element_wise(*(each.cast(pa.string()) for each in facts), ":")
        return pc.fill_null(facts[0].take(numbers), 0), pc.fill_null(stamps.take(numbers), "")

    def _files(self, urls: pa.Array, chosen: np.ndarray) -> Iterator[tuple[int, str]]:
        """The places of some URLs and the names of their files, folder by folder, without folders that are not there."""
        if not self._kept.is_dir():
            return
        blocks = (chosen[start : start + LISTED_BLOCK] for start in range(0, len(chosen), LISTED_BLOCK))
        digests = b"".join(
            sha256(url).digest() for block in blocks for url in urls.take(pa.array(block)).cast(_BYTES).to_pylist()
        )
        folders = np.frombuffer(digests, np.uint8)[::_DIGEST]
        order = np.argsort(folders, kind="stable")
        ends = np.cumsum(np.bincount(folders, minlength=256))
        for number, (start, end) in enumerate(zip(np.append(0, ends[:-1]), ends, strict=True)):
            folder = self._kept / f"{number:02x}"
            if start < end and folder.is_dir():
                for place in order[start:end].tolist():
                    yield int(chosen[place]), f"{folder}/{digests[_DIGEST * place : _DIGEST * (place + 1)].hex()}"

    def pieces(self, name: str) -> Iterator[bytes]:
        """The bytes that an earlier run kept, else a download, a piece at a time."""
        file = Path(self._file(name))
        if not file.is_file():
            with written(file.parent):
                file.parent.mkdir(parents=True, exist_ok=True)
            download(self._client, name, file)
        yield from file_pieces(file, FILE_BYTES)

    def texts(self, names: list[str]) -> list[Texts]:
        """The captions beside the URL."""
        rows = self.told(pa.chunked_array([pa.array(names, pa.string())])).to_pylist()
        return [Texts(row["raw"] and tuple(row["raw"])) for row in rows]

    def told(self, names: pa.ChunkedArray) -> pa.Table:
        """The same as TOLD; null where there is none."""
        urls, texts = self._read_table() if self._captions is None else self._captions
        places = pc.index_in(names.cast(urls.type), value_set=urls)
        raw = lists_at(texts, places)
        return told(pc.if_else(pc.equal(pc.list_value_length(raw), 0), pa.scalar(None, TEXTS), raw))

    def _file(self, url: str) -> str:
        digest = sha256_bytes(url.encode())
        return f"{self._kept}/{digest[:2]}/{digest}"
