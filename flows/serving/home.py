"""The home of a Prefect server (PREFECT_HOME): private to its user, with the password of the server.

Whoever reaches a Prefect API can run code as the user of its worker. So each home has a password, created once, that its
server requires and our commands know; and nobody else can read the home, which also holds the history of all runs.
"""

import os
import pwd
import secrets
import stat
from base64 import b64encode
from contextlib import suppress
from functools import partial
from pathlib import Path

from deepfloyd_core.errors import ConfigError

PRIVATE = partial(os.open, mode=0o600)  # an opener: what it creates is this user's alone
PASSWORD = "auth"
ENTER = "/enter"  # the page of the server that logs a browser in, as its address after the `#` says
PROFILE = "deepfloyd"
_REMEDY = "Set PREFECT_HOME to a folder of your own on a local disk."
# What an earlier Prefect or an editor may have left readable.
_FILES = ("prefect.db", "prefect.db-wal", "prefect.db-shm", "profiles.toml", "server.log", "worker.log")


def default_home() -> Path:
    """PREFECT_HOME, or `.prefect` in the current directory, so that every command here sees the same history."""
    return Path(os.environ.get("PREFECT_HOME", ".prefect")).absolute()


def open_home(home: Path) -> None:
    """Create a home with mode 0700, or make an existing one private.

    Raises ConfigError when it belongs to another user, who could replace the password.
    """
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    owner = home.stat().st_uid
    if owner != os.getuid():
        raise ConfigError(f"The home of Prefect, {home}, belongs to {_user(owner)}. {_REMEDY}")
    for path in (home, *(home / name for name in _FILES)):
        with suppress(FileNotFoundError, PermissionError):  # a file of another user, whose server cannot use it either
            mode = stat.S_IMODE(path.stat().st_mode)
            if mode & 0o077:
                path.chmod(mode & 0o700)


def password(home: Path) -> str:
    """The `user:password` of a home's server; created by the first call. Callers hold the lock of the home.

    Raises ConfigError when the file of it is another user's, can be read by others, or is empty.
    """
    path = home / PASSWORD
    if not path.exists():
        _create(path)
    with path.open(encoding="utf-8") as file:
        found, text = os.fstat(file.fileno()), file.read().strip()
    if found.st_uid != os.getuid():
        raise ConfigError(f"{path} belongs to {_user(found.st_uid)}. {_REMEDY}")
    if stat.S_IMODE(found.st_mode) & 0o077:
        raise ConfigError(
            f"Others can read {path}, the password of the Prefect server. Stop all commands of this home and remove the "
            f"file: another password is created. If that does not help: {_REMEDY}"
        )
    if ":" not in text or not text.isprintable():
        raise ConfigError(f"{path} holds no line user:password. Remove it: another one is created.")
    return text


def _create(path: Path) -> None:
    """Write a new password; all of it or nothing is at the path, also when this process is killed."""
    beside = path.with_name(f"{path.name}.new")
    beside.unlink(missing_ok=True)
    with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(f"deepfloyd:{secrets.token_urlsafe(32)}\n")
    beside.rename(path)


def _user(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return f"user {number}"


def login_link(page: str, home: Path) -> str:
    """The address that opens the UI of a home's server, and logs the browser in. Whoever has it can do the same."""
    return f"{page}{ENTER}#{b64encode(password(home).encode()).decode()}"
