"""Packages that only some runs need: the message when one is missing. Imports none of them, which would take seconds."""

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

_ALL_HERE: "ContextVar[bool]" = ContextVar("extras_are_all_here", default=False)


@contextmanager
def every_extra() -> Iterator[None]:
    """In this block no package counts as missing: to look at what else a configuration needs."""
    token = _ALL_HERE.set(True)
    try:
        yield
    finally:
        _ALL_HERE.reset(token)


def missing_extra(packages: Sequence[str], extra: str) -> str:
    """Which packages cannot be imported, and how to install them, as the end of a sentence; empty when all are installed."""
    if _ALL_HERE.get():
        return ""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if not missing:
        return ""
    install = f"pip install 'deepfloyd-pipeline[{extra}]'"
    return f"{' and '.join(missing)} cannot be imported. Install the extra: {install}"


Quantization = Literal["none", "int8", "nf4"]


def quantization_fault(key: str, quantization: Quantization) -> str:
    """Why weights cannot be quantised on this machine; empty when they can. Imports nothing."""
    missing = "" if quantization == "none" else missing_extra(["torchao"], "quantization")
    return f"{key} is {quantization!r}, and {missing}" if missing else ""
