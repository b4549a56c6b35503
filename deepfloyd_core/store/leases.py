"""Leases: which artifacts of a workspace its running runs use, so that `gc` does not remove them.

A run keeps one file, `<workspace>/.leases/HOST-PID-HEX`, and holds its lock until it ends. Before it looks whether an
artifact exists, it appends the artifact's name. The kernel frees the lock of a killed run, so a lease ends with its run,
and no clock is read. `gc` reads the leases and renames an artifact away while no run can take another lease: either the
run sees no artifact, or `gc` sees its lease. A name costs one lock and one write.
"""

import fcntl
import os
import secrets
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import wraps
from pathlib import Path
from typing import IO, ParamSpec, TypeVar

from deepfloyd_core.store.file_faults import flock
from deepfloyd_core.store.locks import is_read_only, locked

FOLDER = ".leases"
_LOCK = "leases"  # held for milliseconds; who holds it waits for no other lock
_P = ParamSpec("_P")
_R = TypeVar("_R")


@dataclass(frozen=True)
class _Lease:
    """The lease of this run in one workspace."""

    file: IO[str]  # locked
    names: set[str] = field(default_factory=set)


_LEASES: "ContextVar[dict[Path, _Lease] | None]" = ContextVar("leases", default=None)


def leased(run: Callable[_P, _R]) -> Callable[_P, _R]:
    """A run's function: what it leases stays until it returns. A run inside of another one shares its leases."""

    @wraps(run)  # no `contextmanager`: Prefect pickles flows to send them to workers
    def body(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if _LEASES.get() is not None:
            return run(*args, **kwargs)
        leases: dict[Path, _Lease] = {}
        token = _LEASES.set(leases)
        try:
            return run(*args, **kwargs)
        finally:
            _LEASES.reset(token)
            for lease in leases.values():
                with suppress(OSError):  # its lock ends with it, and the next `gc` removes it
                    Path(lease.file.name).unlink(missing_ok=True)
                lease.file.close()

    return body


def take_lease(workspace: Path, name: str) -> None:
    """Keep an artifact, finished or not, from `gc` until the run ends. To be called before looking whether it exists.

    Does nothing outside of a `leased` function, and in a workspace that this user may only read.
    """
    leases = _LEASES.get()
    if leases is None or (workspace in leases and name in leases[workspace].names) or is_read_only(workspace):
        return
    with locked(workspace, _LOCK, quiet=True):
        if workspace not in leases:
            leases[workspace] = _begin(workspace)
        lease = leases[workspace]
        lease.file.write(f"{name}\n")
        lease.file.flush()
        lease.names.add(name)


@contextmanager
def no_new_leases(workspace: Path) -> Iterator[dict[str, str]]:
    """Yields the leased artifacts, and who has each. No run takes a lease before the block ends: it must be short, and
    wait for no lock.
    """
    with locked(workspace, _LOCK, quiet=True):
        yield running_leases(workspace)


def running_leases(workspace: Path) -> dict[str, str]:
    """The leased artifacts, and who has each: `process 4711 of HOST, since 2026-11-29 03:00 UTC`."""
    found: dict[str, str] = {}
    for path in sorted((workspace / FOLDER).glob("*")):
        with suppress(FileNotFoundError), path.open() as file:
            try:
                flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB, path)
            except BlockingIOError:
                holder, *names = file.read().splitlines() or [""]
                found |= dict.fromkeys(names, holder)
    return found


def drop_ended_leases(workspace: Path) -> None:
    """Remove the files of killed runs."""
    with locked(workspace, _LOCK, quiet=True):
        for path in (workspace / FOLDER).glob("*"):
            # Not there any more: its run ended; not allowed: it is another user's; locked: its run goes on.
            with suppress(FileNotFoundError, PermissionError, BlockingIOError), path.open("r+") as file:
                flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB, path)
                path.unlink()


def _begin(workspace: Path) -> _Lease:
    """A new lease. The caller holds the lock of leases, so nobody removes the file before it is locked. Who lists leases may
    hold it for a moment.
    """
    host, pid = socket.gethostname(), os.getpid()
    path = workspace / FOLDER / f"{host}-{pid}-{secrets.token_hex(4)}"
    path.parent.mkdir(exist_ok=True)
    file = path.open("x")
    flock(file, fcntl.LOCK_EX, path)
    file.write(f"process {pid} of {host}, since {datetime.now(UTC):%Y-%m-%d %H:%M} UTC\n")
    file.flush()
    return _Lease(file)
