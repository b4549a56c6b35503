"""WebDataset: tar files in a folder or a bucket. Each member is a picture; KEY.txt is the caption of KEY.jpg.

A member is read at its offset, without reading what lies before it. The headers of a tar are read once in each process
(20 us a member). Only plain .tar files can be read like this: compressed ones are rows of the ledger.
"""

import tarfile
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from deepfloyd_core.config.data_sets import ImageDataset
from deepfloyd_core.errors import ConfigError
from deepfloyd_core.sources.bucket import list_files, open_place, stamp
from deepfloyd_core.sources.listing import (
    FILE_BYTES,
    PIECE,
    TEXT_BYTES,
    Listed,
    Texts,
    large_text,
    printable,
    read_text,
)  # fmt: skip
from deepfloyd_core.sources.names import caption_file, caption_files, kind
from deepfloyd_core.store.bucket import failures

_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_OPEN_TARS = 16  # whose members a process remembers


class Tars:
    """`type = webdataset`. A picture's name is the tar's, then the member's: `00001.tar/000012.jpg`."""

    threads, lost = 0, "unreadable"

    def __init__(self, dataset: ImageDataset) -> None:
        self._fs, self._root = open_place(dataset)
        self.name = dataset.instance_data_dir
        if not self._fs.isdir(self._root):
            raise ConfigError(f"{dataset.id}: instance_data_dir is {self.name!r}, which is not a folder of .tar files.")
        self._members = lru_cache(_OPEN_TARS)(self._read_members)
        self._captions = lru_cache(_OPEN_TARS)(lambda tar: caption_files(self._members(tar)))

    def listing(self) -> Iterator[Listed]:
        """The members that may be pictures, other members, and tars that cannot be read."""
        self._members.cache_clear()
        self._captions.cache_clear()
        unreadable: tuple[type[Exception], ...] = (*failures(self._fs), tarfile.TarError)
        for tar, info in sorted(list_files(self._fs, self._root, self.name).items()):
            if tar.endswith(_COMPRESSED):
                yield Listed(printable(tar), info["size"], reason="unsupported")
            if not tar.endswith(".tar"):
                continue
            try:
                members = self._members(tar)
            except unreadable:
                yield Listed(printable(tar), info["size"], reason="unreadable")
                continue
            seen = stamp(info)
            for member, (_, size) in members.items():
                name, what = f"{tar}/{member}", kind(member)
                if what == "other" or printable(name) != name:
                    yield Listed(printable(name), reason="name_not_utf8", kind=what)
                elif what != "caption":
                    yield Listed(name, size, seen, seen, kind=what)

    def pieces(self, name: str) -> Iterator[bytes]:
        """The member's bytes, a piece at a time."""
        stem, _, member = name.partition(".tar/")
        tar = f"{stem}.tar"
        try:
            offset, size = self._members(tar)[member]
            if size > FILE_BYTES:
                raise OSError(f"larger than {FILE_BYTES >> 20:,} MiB")
            for start in range(offset, offset + size, PIECE):
                end = min(start + PIECE, offset + size)
                data = bytes(self._fs.cat_file(f"{self._root}/{tar}", start=start, end=end))
                if len(data) != end - start:
                    raise OSError("the tar ends inside it")
                yield data
        except (KeyError, tarfile.TarError):
            raise FileNotFoundError(f"{self.name}/{tar} has no member {member}") from None
        except failures(self._fs) as error:
            raise OSError(f"{self.name}/{tar}/{member}: {error}") from error

    def texts(self, names: list[str]) -> list[Texts]:
        """The caption member beside each picture, of the same tar."""
        return [self._text(name) for name in names]

    def _text(self, name: str) -> Texts:
        stem, _, member = name.partition(".tar/")
        try:
            text = caption_file(member, self._captions(f"{stem}.tar"))
            if text is None:
                return Texts()
            large = self._members(f"{stem}.tar")[text][1] > TEXT_BYTES
            return large_text(text) if large else read_text(b"".join(self.pieces(f"{stem}.tar/{text}")), text)
        except OSError as error:
            return Texts(None, str(error), passing=True)

    def _read_members(self, tar: str) -> dict[str, tuple[int, int]]:
        """Offset and size of each regular file of a tar; of two with the same name the last one, as tar does."""
        path = f"{self._root}/{tar}"
        with self._fs.open(path, "rb") as handle, tarfile.open(fileobj=handle, mode="r:") as archive:
            return {member.name: (member.offset_data, member.size) for member in archive if _plain(member)}


def _plain(member: Any) -> bool:
    return bool(member.isreg() and not member.issparse() and not member.name.rpartition("/")[2].startswith("."))
