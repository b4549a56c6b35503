"""How much of a caption is cleaned: far more than an encoder reads, and no more than can be cleaned in time.

The pipeline's cleaning takes time that grows with the square of the length of a word, and of some texts: half a minute for
80,000 characters. 512 tokens, the most that are read, have some 2,500 characters. At these bounds the worst known text takes
a quarter of a second.
"""

import re

CHARACTERS = 4096
WORD = 512  # characters in a row without a space, or of spaces

_LONG = re.compile(rf"(\S{{{WORD}}})\S+|(\s{{{WORD}}})\s+")


def bounded(caption: str) -> str:
    """The first CHARACTERS of a caption, and of each word in it the first WORD characters."""
    return _LONG.sub(r"\1\2", caption)[:CHARACTERS]
