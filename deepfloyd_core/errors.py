"""Everything this package raises on purpose.

    DeepFloydError            one clear message for the user, no traceback needed
    |-- ConfigError           the run file, the data file or the command line is wrong (exit code 2)
    |-- DataError             the pictures or captions cannot make a data set (exit code 1)
    |-- ModelError            a model folder is missing, gated or unfit (exit code 1)
    |-- ArtifactError         a stored artifact is damaged or contradicts its manifest (exit code 1)
    |-- StorageError          a file system refuses what has to be done (exit code 1)
    `-- JobError              a child process failed or was killed (exit code 1)

A bad picture is none of these: it is a row of the ledger.
"""


class DeepFloydError(Exception):
    """Base of all errors that are meant for the user."""

    exit_code = 1


class ConfigError(DeepFloydError):
    """A wrong key, value or path in a configuration."""

    exit_code = 2


class DataError(DeepFloydError):
    """The data set as a whole cannot be used."""


class ModelError(DeepFloydError):
    """Model weights are missing, gated or do not fit the request."""


class ArtifactError(DeepFloydError):
    """A stored artifact is damaged."""


class StorageError(DeepFloydError):
    """A disk is full, a folder cannot be written, a file system has no locks."""


class JobError(DeepFloydError):
    """A child process ended badly; the message carries the end of its log."""


class Stop(Exception):
    """Raised inside a job's process when it was asked to end (SIGTERM); its parent raises JobError."""
