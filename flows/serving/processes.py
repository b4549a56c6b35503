"""The descendant processes of this process, and how they are ended."""

import signal
from collections.abc import Iterable
from contextlib import suppress

import psutil

_ROUNDS = 5  # of killing: what starts others may have done so meanwhile


def below() -> list[tuple[psutil.Process, bool]]:
    """All descendants of this process, and for each whether it belongs to a running job.

    Without servers: others may use them, and they end by themselves (`bound`).
    """
    servers, starters, jobs, found = set[int](), set[int](), set[int](), list[psutil.Process]()
    for process in psutil.Process().children(recursive=True):  # parents come first
        try:
            parent, command = process.ppid(), process.cmdline()
        except psutil.Error:  # gone, or another user's
            continue
        if parent in servers or "flows.serving.web_server" in command:
            servers.add(process.pid)
            continue
        found.append(process)
        if parent in starters | jobs:
            jobs |= {parent, process.pid}
        elif "deepfloyd_core.processes.job_worker" in command:
            starters.add(process.pid)
    return [(process, process.pid in jobs) for process in found]


def end_runs(patience_s: float) -> bool:
    """Ask all descendants to end, wait, then kill the rest except jobs: these may write a checkpoint, and end by themselves.

    Returns whether there was any.
    """
    asked = [process for process, _ in below()]
    _send(asked, signal.SIGTERM)
    psutil.wait_procs(asked, patience_s)
    kill_below(spare_jobs=True)
    return bool(asked)


def kill_below(spare_jobs: bool) -> bool:
    """Kill all descendants. Returns whether a job was spared."""
    spared = False
    for _ in range(_ROUNDS):
        found = below()
        spared = spare_jobs and any(is_job for _, is_job in found)
        doomed = [process for process, is_job in found if not (is_job and spare_jobs)]
        if not doomed:
            break
        _send(doomed, signal.SIGKILL)
        psutil.wait_procs(doomed, 0.2)
    return spared


def _send(processes: Iterable[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with suppress(psutil.Error):
            process.send_signal(number)
