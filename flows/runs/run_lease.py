"""What a flow run holds: its lease, and its workspace.

The lease is a locked file, `<PREFECT_HOME>/runs/ID`, until the process of the run has ended. The kernel frees the lock
however the process ends. So a lease whose lock is free belongs to a run that is over, whatever state the server has
recorded: a killed run leaves "Running" there, and so does one that ended while the server was away. `flows.runs.dead_runs`
reads these leases, and removes them.

One run at a time makes artifacts in a workspace. Others wait for it, and say so; a run that its schedule has started
does not wait, because the next one comes by itself: it ends as Skipped.
"""

import fcntl
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar, cast
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext
from prefect.settings import PREFECT_HOME
from prefect.states import Cancelled

from deepfloyd_core.config.run import Run
from deepfloyd_core.errors import BusyError
from deepfloyd_core.store.bucket_turn import bucket_turn
from deepfloyd_core.store.file_faults import flock
from deepfloyd_core.store.locks import only_run
from flows.runs.gpu import gpu_shared
from tasks.outbox import show

F = TypeVar("F", bound=Callable[..., Any])

FOLDER = "runs"
SKIPPED = "Skipped"
_NAMED = re.compile("[a-z]+-[a-z]+")  # by Prefect
_held: dict[int, int] = {}  # by process, for a fork does not own its parent's run: the open lease


def with_run_lease(flow_body: F) -> F:
    """A flow's function that takes the lease of its run first. It keeps it until the process ends, or runs another flow.

    A run that may not wait for its workspace ends as Skipped.
    """

    @wraps(flow_body)  # no `contextmanager`: Prefect pickles flows to send them to workers
    def body(*arguments: Any, **named: Any) -> Any:
        context = FlowRunContext.get()
        if context is not None and context.flow_run is not None:
            take_lease(Path(PREFECT_HOME.value()), context.flow_run.id)
        try:
            return flow_body(*arguments, **named)
        except BusyError as error:
            return Cancelled(name=SKIPPED, message=str(error))

    return cast(F, body)


@contextmanager
def sole_run(run: Run) -> Iterator[None]:
    """In this block no other run makes artifacts in the workspace, nor has jobs on a GPU of this machine.

    Waits for the workspace, or raises BusyError in a scheduled run; waits for the GPU in any run.
    """
    context = FlowRunContext.get()
    scheduled = context is not None and context.flow_run is not None and context.flow_run.auto_scheduled
    rename_run(run.workspace)
    name, wait = _name(context), not scheduled
    with only_run(run.workspace, name, wait=wait), bucket_turn(run.workspace, name, wait=wait), gpu_of(run):
        yield


def rename_run(workspace: Path, version: int | None = None) -> None:
    """Name the flow run after its flow, its workspace, and the version that it has published: `retrain birds v7`. A name
    that a person gave stays.
    """
    context = FlowRunContext.get()
    if (
        context is None
        or context.flow_run is None
        or context.flow is None
        or not _NAMED.fullmatch(context.flow_run.name)
    ):
        return
    name = f"{context.flow.name} {workspace.name}" + (f" v{version}" if version else "")
    show(_rename, context.flow_run.id, name)


def _rename(flow_run: UUID, name: str) -> None:
    with get_client(sync_client=True) as client:
        client.update_flow_run(flow_run, name=name)


@contextmanager
def gpu_of(run: Run) -> Iterator[None]:
    """In this block no other run has jobs on the GPU of this machine, if this run may use one. Waits for it."""
    with gpu_shared(run.config, _name(FlowRunContext.get())):
        yield


def _name(context: FlowRunContext | None) -> str:
    """A run, as those that wait for it are told."""
    flow = context.flow.name if context and context.flow else "a run"
    flow_run = context.flow_run.name if context and context.flow_run else ""
    return f"{flow} {flow_run}".rstrip() + f" (process {os.getpid()}, since {time.strftime('%H:%M')})"


def leases(home: Path) -> list[Path]:
    """The leases of a home, held or free, the oldest first."""
    found = []
    for path in (home / FOLDER).glob("*"):
        with suppress(FileNotFoundError):  # another command has settled it
            found += [(path.stat().st_mtime_ns, path)] if _run_of(path) else []
    return [path for _, path in sorted(found)]


@contextmanager
def free_lease(path: Path) -> Iterator[UUID | None]:
    """In this block, hold a lease whose process has ended: yields its run. None for a lease that is held, or gone."""
    try:
        fd = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        yield None
        return
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
        else:
            yield _run_of(path)
    finally:
        os.close(fd)


def has_lease(home: Path, run: UUID) -> bool:
    """Whether a run has begun on this machine, and was not settled since."""
    return lease_of(home, run).exists()


def lease_of(home: Path, run: UUID) -> Path:
    """Where the lease of a run is, or would be."""
    return home / FOLDER / str(run)


def take_lease(home: Path, run: UUID) -> None:
    """Take the lease of a run for this process, which leaves the one that it had."""
    folder, process = home / FOLDER, os.getpid()
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / f".{run}"
    fd = os.open(beside, os.O_RDWR | os.O_CREAT, 0o600)
    flock(fd, fcntl.LOCK_EX, beside, "Set PREFECT_HOME to a folder on a local disk")
    beside.replace(folder / str(run))  # who sees it sees it locked
    if process in _held:
        os.close(_held[process])
    _held[process] = fd


def _run_of(path: Path) -> UUID | None:
    try:
        return UUID(path.name)
    except ValueError:  # not a lease, or one that is not locked yet
        return None
