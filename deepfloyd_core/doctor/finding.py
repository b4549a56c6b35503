"""One finding: what was looked at, whether it is well, and what mends it."""

import re
from dataclasses import dataclass
from typing import Literal

State = Literal["fine", "note", "fault"]
_INSTALL = re.compile(r" (?:Install the extra: )?(pip install '[^']+')\.?")


@dataclass(frozen=True)
class Finding:
    """fine: nothing to do. note: worth knowing, no run fails of it. fault: a run fails of it, or does not begin."""

    name: str
    state: State
    text: str
    remedy: str | None = None  # a command, or what to set where


def told(name: str, error: Exception, state: State = "fault") -> Finding:
    """The finding for an error that is meant for the user; a command `pip install` in its text becomes the remedy."""
    text = str(error)
    if found := _INSTALL.search(text):
        return Finding(name, state, text[: found.start()] + text[found.end() :], found[1])
    return Finding(name, state, text)
