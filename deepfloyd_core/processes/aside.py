"""A question to a module in a process of its own, which prints the answer: what needs torch stays out of the caller."""

import signal
import subprocess
import sys

from deepfloyd_core.errors import JobError

PATIENCE_S = 120.0  # a cold disk takes half a minute to give torch


def ask(what: str, module: str, question: str = "", patience_s: float = PATIENCE_S) -> str:
    """The last line that `python -m MODULE QUESTION` prints: before it may be a library's own. what: how messages name it.

    Raises JobError where it fails, crashes, or does not end in time.
    """
    command = [sys.executable, "-P", "-m", module, *([question] if question else [])]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=patience_s)
    except subprocess.TimeoutExpired:
        raise JobError(
            f"{what} has not answered in {patience_s:g} s; a driver of the GPU, or the disk, may hang"
        ) from None
    if done.returncode < 0:
        raise JobError(f"{what} was ended by {signal.Signals(-done.returncode).name}")
    if done.returncode:
        raise JobError(f"{what} failed: {(done.stderr.strip() or 'it said nothing').splitlines()[-1]}")
    return (done.stdout.strip().splitlines() or [""])[-1]
