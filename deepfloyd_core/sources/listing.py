"""A file in a source's listing, and the texts that lie with a picture."""

import math
from typing import Any, NamedTuple

from deepfloyd_core.files import text_lines
from deepfloyd_core.sources.names import Kind

FILE_BYTES = 1 << 30  # of a picture: more than one that decode_memory_mib allows by default
TEXT_BYTES = 1 << 20  # of a caption file: some thousand captions
PIECE = 16 << 20  # of an object or a tar member: bytes that are asked for at once
Raw = tuple[str, ...] | None  # texts as they were found; None: there are none, or they cannot be read

_BOMS = ((b"\xff\xfe\0\0", "utf-32"), (b"\0\0\xfe\xff", "utf-32"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"))


class Listed(NamedTuple):  # there are as many as files: a frozen dataclass takes three times as long to make
    """One file of a listing. A stamp changes when the bytes do; "" is never trusted."""

    source: str
    bytes: int = 0
    stamp: str = ""
    text_stamp: str = ""
    reason: str | None = None
    detail: str | None = None
    kind: Kind = "picture"  # or `unsure`: its bytes decide; `other`: it is no input


class Texts(NamedTuple):
    """The texts of a picture. `fault`: why existing texts cannot be read; `passing`: the next read may succeed."""

    raw: Raw = None
    fault: str | None = None
    passing: bool = False


def cell_text(cell: Any) -> str:
    """The text in a table's cell; empty where there is none: for bytes that are no UTF-8, a struct and infinity, too."""
    if cell is None or isinstance(cell, dict | tuple) or (isinstance(cell, float) and not math.isfinite(cell)):
        return ""  # NaN is how pandas writes "none"
    if isinstance(cell, bytes):
        try:
            return cell.decode("utf-8")
        except UnicodeDecodeError:
            return ""
    return str(cell).encode("utf-8", "replace").decode()  # JSON can hold half of a surrogate pair


def printable(source: str) -> str:
    """A name in which everything that is not UTF-8 is written as escapes."""
    if source.isascii():
        return source
    return source.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def text_encoding(data: bytes) -> str:
    """The encoding that the first bytes of a text show for sure; UTF-8 if they show none."""
    return next((encoding for mark, encoding in _BOMS if data.startswith(mark)), "utf-8-sig")


def large_text(name: str) -> Texts:
    """Of a caption file that is too large to be one."""
    return Texts(None, f"{name} is larger than {TEXT_BYTES >> 20} MiB; no caption is")


def read_text(data: bytes, name: str) -> Texts:
    """The text of a caption file. Encodings other than Unicode's cannot be recognised for sure, and are not guessed."""
    encoding = text_encoding(data)
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        title = "UTF-8" if encoding == "utf-8-sig" else encoding.upper()
        return Texts(None, f"{name} is no {title} text ({error.reason} at byte {error.start}); save it as UTF-8")
    if "\0" in text:
        return Texts(None, f"{name} is no UTF-8 text (it has zero bytes); save it as UTF-8")
    return Texts(("\n".join(text_lines(text)),))
