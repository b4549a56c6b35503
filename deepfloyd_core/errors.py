"""Everything this package raises on purpose.

    DeepFloydError            one clear message for the user, no traceback needed
    |-- ConfigError           the run file, the data file or the command line is wrong (exit code 2)
    |-- DataError             the pictures or captions cannot make a data set (exit code 1)
    |-- ModelError            a model folder is missing, gated or unfit (exit code 1)
    |-- ArtifactError         a stored artifact is damaged or contradicts its manifest (exit code 1)
    |   `-- DamagedError      what was read of a file is not what was written; a run makes the file again
    |-- StorageError          a file system refuses what has to be done (exit code 1)
    |-- BusyError             another run is at work in the workspace (exit code 1)
    `-- JobError              a child process failed or was killed (exit code 1)
        `-- LostPeerError     a rank of a training has lost another one

A bad picture is none of these: it is a row of the ledger.

Checks that do not need each other are made with `attempt`, one after the other, and what they raised is raised as one error
by `raise_together`: a user reads all faults at once.
"""

from collections.abc import Callable, Iterable
from typing import ParamSpec, TypeVar

MOST_TOLD = 100  # faults in one message
_P = ParamSpec("_P")
_R = TypeVar("_R")


class DeepFloydError(Exception):
    """Base of all errors that are meant for the user."""

    exit_code = 1
    faults: "tuple[DeepFloydError, ...]" = ()  # where it tells several at once: each of them


class ConfigError(DeepFloydError):
    """A wrong key, value or path in a configuration."""

    exit_code = 2


class DataError(DeepFloydError):
    """The data set as a whole cannot be used."""


class ModelError(DeepFloydError):
    """Model weights are missing, gated or do not fit the request."""


class ArtifactError(DeepFloydError):
    """A stored artifact is damaged."""


class DamagedError(ArtifactError):
    """A reader found other bytes in a file of an artifact than were written; the artifact is marked, so that its next use
    makes the file again.
    """


class StorageError(DeepFloydError):
    """A disk is full, a folder cannot be written, a file system has no locks."""


class BusyError(DeepFloydError):
    """Another run is at work in the workspace, and this one may not wait for it."""


class JobError(DeepFloydError):
    """A child process ended badly; the message carries the end of its log."""


class LostPeerError(JobError):
    """A process of a job has lost another one, which is why the job ends."""


class Stop(Exception):
    """Raised inside a job's process when it was asked to end (SIGTERM); its parent raises JobError."""


def attempt(faults: list[DeepFloydError], step: Callable[_P, _R], *args: _P.args, **kwargs: _P.kwargs) -> _R | None:
    """Return the result of a step. If it raises errors that are meant for the user, add them to `faults` and return None."""
    try:
        return step(*args, **kwargs)
    except DeepFloydError as error:
        faults += error.faults or [error]
        return None


def raise_together(faults: Iterable[DeepFloydError]) -> None:
    """Raise the errors of several checks as one; do nothing if there are none.

    A single error is raised as it is. Several errors: each message once, on a line of its own, below their count, the
    first MOST_TOLD of them. The
    class is ConfigError if one of them is, otherwise the class of the first.
    """
    errors = list({str(error): error for error in reversed(list(faults))}.values())[::-1]
    if len(errors) == 1:
        raise errors[0]
    if errors:
        kind = next((type(error) for error in errors if isinstance(error, ConfigError)), type(errors[0]))
        lines = [f"- {error}" for error in errors[:MOST_TOLD]]
        more = [f"- and {len(errors) - MOST_TOLD:,} more"] if len(errors) > MOST_TOLD else []
        together = kind("\n".join([f"{len(errors):,} faults to correct:", *lines, *more]))
        together.faults = tuple(errors)
        raise together


def each_line(error: DeepFloydError) -> list[DeepFloydError]:
    """Split an error that has one fault per line into one error per line."""
    return [type(error)(line) for line in str(error).splitlines()]
