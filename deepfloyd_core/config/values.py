"""Values as the parsers of TOML and JSON give them, within bounds: a file may have been made to break its reader."""

import re
import tomllib
from typing import Any

NEST_DEPTH = 32  # lists and tables within each other
_BITS = 4096  # of an integer; Python writes out 4,300 digits
TOO_DEEP = ValueError("it is nested too deeply")
_PART = r"""(?:[\w-]+|"[^"\n]*"|'[^'\n]*')"""
_DEEP_KEY = re.compile(rf"(?:^|[\[{{,])[ \t]*{_PART}(?:[ \t]*\.[ \t]*{_PART}){{{NEST_DEPTH},}}", re.MULTILINE)


def toml_values(text: str) -> Any:
    """The values of a text of TOML, checked. Raises ValueError, or RecursionError.

    A dotted key is a table in a table for each of its parts, and tomllib takes the square of their number: 32 s for 20,000.
    """
    if _DEEP_KEY.search(text):
        raise TOO_DEEP
    return checked_values(tomllib.loads(text))


def checked_values(values: Any) -> Any:
    """Values as a parser gave them. Raises ValueError for what no key can hold and much code fails at: a number that
    cannot be written out, a zero byte, tables in tables in tables.
    """
    level = [values]
    for _ in range(NEST_DEPTH):
        inner: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                inner += [*value.keys(), *value.values()]
            elif isinstance(value, list):
                inner += value
            elif isinstance(value, str) and "\0" in value:
                raise ValueError("a text in it has a zero byte")
            elif isinstance(value, int) and value.bit_length() > _BITS:
                raise ValueError("a number in it has thousands of digits")
        level = inner
    if level:
        raise TOO_DEEP
    return values
