"""One input as a source lists it."""

import re
from typing import NamedTuple

Raw = tuple[str, ...] | None  # texts as they were found; None: there are none, or they cannot be read


class Listed(NamedTuple):  # there are as many as files: a frozen dataclass takes three times as long to make
    """One input of a listing. A stamp changes when the bytes do; "" is never trusted."""

    source: str
    bytes: int = 0
    stamp: str = ""
    text_stamp: str = ""
    reason: str | None = None


def text_name(name: str) -> str:
    """What pathlib's `with_suffix(".txt")` makes of a name."""
    folder, slash, last = name.rpartition("/")
    dot = last.rfind(".")
    return f"{folder}{slash}{last[:dot] if 0 < dot < len(last) - 1 else last}.txt"


def printable(source: str) -> str:
    """A name with what is not UTF-8 written as escapes."""
    if source.isascii():
        return source
    return source.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def decoded(data: bytes | None) -> Raw:
    """The text of a caption file."""
    try:
        return None if data is None else ("\n".join(re.split("\r\n?", data.decode("utf-8-sig"))),)
    except UnicodeDecodeError:
        return None
