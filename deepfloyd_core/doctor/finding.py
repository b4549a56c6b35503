"""One finding: what was looked at, whether it is well, and what mends it."""

import re
from dataclasses import dataclass
from typing import Literal

State = Literal["fine", "note", "fault"]
_INSTALL = re.compile(r" (?:Install the extra: )?(pip install '[^']+')\.?")

# With which the last sentence of a message begins where it says what to do.
_ADVICE = re.compile(
    r"^(?P<fault>.*)\. (?P<advice>(?:Accept|Add|Change|Choose|Connect|Correct|Create|Free|Give|Install|Lower|Make|Name|Put"
    r"|Raise|Remove|Run|Set|Start|Stop|Unset|Use|Write)\b.*)$",
    re.DOTALL,
)


@dataclass(frozen=True)
class Finding:
    """fine: nothing to do. note: worth knowing, no run fails of it. fault: a run fails of it, or does not begin."""

    name: str
    state: State
    text: str
    remedy: str | None = None  # a command, or what to set where


def told(name: str, error: Exception, state: State = "fault") -> Finding:
    """The finding for an error that is meant for the user: what to do, or a command `pip install`, becomes the remedy."""
    text = str(error)
    if found := _INSTALL.search(text):
        return Finding(name, state, (text[: found.start()] + text[found.end() :]).removesuffix("."), found[1])
    if found := _ADVICE.match(text):
        return Finding(name, state, found["fault"], found["advice"])
    return Finding(name, state, text)
