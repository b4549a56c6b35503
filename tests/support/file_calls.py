"""Watches what a process does to the files of one folder, call by call, and lets it end or fail at any of them.

`file_calls.c` is preloaded into the process, so its calls from C++, Rust and C count as well as Python's.
"""

import ctypes
import os
import struct
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".c")
LIBRARY = "FILE_CALLS_LIBRARY"  # in the environment of a watched process: where the preloaded library is
_HEAD = struct.Struct("<iii4xqq")


class How(IntEnum):
    """What happens at a call, as the library numbers it."""

    RECORD = 0  # nothing
    KILL = 1  # SIGKILL before it
    FAIL = 2  # it fails, alone
    FULL = 3  # it and each later one that takes room fail
    SHORT = 4  # a write is cut in half, and each later one that takes room fails


@dataclass(frozen=True)
class Call:
    """A call that succeeded. kind: a letter, see `file_calls.c`; offset: of a write, or the size of a truncated file."""

    kind: str
    path: str
    other: str  # the second path of a rename and a link
    offset: int
    data: bytes


@dataclass(frozen=True)
class End:
    """How watched work ended: by a signal, by an error, or well."""

    signal: int
    error: str  # CLASS: MESSAGE; empty: none
    calls: int


def compile_library(folder: Path) -> Path:
    """Compile the library into a folder."""
    library = folder / "file_calls.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", library, SOURCE, "-ldl"], check=True)
    return library


def watched_environment(library: Path) -> dict[str, str]:
    """The environment of a process that is to be watched."""
    return {**os.environ, "LD_PRELOAD": str(library), LIBRARY: str(library)}


class Watcher:
    """The library, in a process that has it preloaded."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(os.environ[LIBRARY])
        self._library.calls.restype = ctypes.c_long
        self._library.watch.argtypes = [
            ctypes.c_char_p, ctypes.c_long, ctypes.c_int, ctypes.c_int, ctypes.c_int
        ]  # fmt: skip

    def record(self, folder: Path, work: Callable[[], object], log: Path) -> list[Call]:
        """Do the work, and list its calls that changed, opened or flushed a file of the folder. log: a scratch file."""
        fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        try:
            self._library.watch(str(folder).encode(), -1, How.RECORD, 0, fd)
            work()
        finally:
            self._library.watch(b"", -1, How.RECORD, 0, -1)
            os.close(fd)
        return list(_calls(log.read_bytes()))

    def count(self, folder: Path, work: Callable[[], object]) -> int:
        """How many calls the work makes in a folder, reads among them. It is done in a fork."""
        return self.end(folder, work, How.RECORD, -1, 0).calls

    def end(self, folder: Path, work: Callable[[], object], how: How, at: int, number: int) -> End:
        """Do the work in a fork, where something happens at call `at`, from 0. number: the error's."""
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reader)
            self._library.watch(str(folder).encode(), at, how, number, -1)
            error = ""
            try:
                work()
            except BaseException as raised:  # the parent judges it
                error = f"{type(raised).__name__}: {raised}"
            calls = self._library.calls()
            self._library.watch(b"", -1, How.RECORD, 0, -1)
            os.write(writer, f"{calls}\n{error}"[:60_000].encode(errors="replace"))
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            calls, _, error = pipe.read().decode().partition("\n")
        status = os.waitpid(pid, 0)[1]
        return End(os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0, error, int(calls or 0))


def _calls(data: bytes) -> Iterator[Call]:
    at = 0
    while at < len(data):
        kind, path_bytes, other_bytes, offset, count = _HEAD.unpack_from(data, at)
        at += _HEAD.size
        path, other = data[at : at + path_bytes], data[at + path_bytes : at + path_bytes + other_bytes]
        at += path_bytes + other_bytes
        written = data[at : at + count] if chr(kind) == "w" else b""
        at += len(written)
        yield Call(chr(kind), path.decode(), other.decode(), offset, written)
