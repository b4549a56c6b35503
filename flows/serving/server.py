"""The Prefect server of a run: the one that is configured, or one that all runs with the same PREFECT_HOME share.

Prefect's ephemeral server is never used: it gives up after 20 s on a busy machine and loses task runs. The first run
starts a server on a free loopback port, later runs join it. Each run holds a shared lock, which the kernel frees
however the run dies; the server ends when nobody holds the lock (`bound`). The server itself holds the lock of
`server.json`: if that lock is free, no server is running.
"""

import fcntl
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

from deepfloyd_core.errors import ConfigError, DeepFloydError, JobError
from deepfloyd_core.store.file_faults import flock, need_room
from flows.serving.api import check_access, check_api, without_login
from flows.serving.background import meanwhile
from flows.serving.home import PASSWORD, PRIVATE, login_link, open_home, password
from flows.serving.hung_server import Hearing, end_server
from flows.serving.profile import write_profile
from flows.serving.proxies import without_loopback
from flows.serving.server_log import STARTED, LogReader, errors_told, put_aside
from tasks import LOGGERS
from tasks.health import ANSWER_S, healthy

log = logging.getLogger(__name__)

START_TIMEOUT_S = 180.0
DATABASE_BYTES = 6_000_000  # of a new database, while its tables are made
LEAST_BYTES = 1_000_000  # free, or a server can write nothing
_ROOM = "Free some space there, or set PREFECT_HOME to a folder on another disk"
STOP_TIMEOUT_S = 10.0  # then it is left to end by itself
LARGEST_LOG = 32 << 20  # bytes; a larger one is put aside when a server starts
LOOK_EVERY_S = 2.0  # is it alive
RESTARTS, RESTARTS_S = 5, 3600.0  # so many within this time, by each user of a server that ends by itself
# Quiet and offline, one real server; the console belongs to our own messages, Prefect's records go to the server.
SETTINGS = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_EPHEMERAL_ENABLED": "false",
    "PREFECT_LOGGING_EXTRA_LOGGERS": ",".join(LOGGERS),
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",  # the core also logs outside of flow runs
    "PREFECT_CLI_COLORS": "false",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Prefect keeps runs for ever, with the payloads of their artifacts, and repeats these in events.
    "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED": "events,flow_runs",
    "PREFECT_SERVER_SERVICES_DB_VACUUM_RETENTION_PERIOD": str(60 * 86_400),  # s, since the end of a run
    "PREFECT_SERVER_EVENTS_RETENTION_PERIOD": "P3D",  # of events; a plain number stops the server
}


@contextmanager
def prefect_server(
    home: Path,
    port: int | None = None,
    usual_port: int | None = None,
    while_it_starts: Callable[[], object] = lambda: None,
) -> Iterator[str]:
    """Set the environment for Prefect and yield the API's address. Import prefect inside, or in `while_it_starts`.

    port: of the server, also if one runs already; usual_port: of a server that is started now, otherwise a free one.
    while_it_starts: called if a server is started, beside its imports of 3 s.
    Raises ConfigError when PREFECT_API_URL is set to an address that no flow can use, or the server requires a password
    that we do not have; JobError when a server does not start.
    """
    os.environ.update({key: os.environ.get(key, value) for key, value in SETTINGS.items()})
    os.environ.update(without_loopback(os.environ))
    see_environment()
    given = os.environ.get("PREFECT_API_URL")
    if given and given.rstrip("/") != server_address(home):  # else it is that of the home, whose password we know
        if port is not None:
            raise ConfigError(
                f"PREFECT_API_URL is {without_login(given)}: that server has its own port. Remove --port, or unset it."
            )
        check_api(given)
        yield given
        return
    open_home(home)
    os.environ["PREFECT_HOME"] = str(home)
    gained, environ = LogReader(home / "server.log"), dict(os.environ)
    with _locked(home / "server.users") as users, _locked(home / "server.lock") as lock:
        flock(lock, fcntl.LOCK_EX, home / "server.lock", "Set PREFECT_HOME to a folder on a local disk")
        fcntl.flock(users, fcntl.LOCK_SH)  # waits for a server that is ending
        url = join_server(home, port) or start_server(home, port or usual_port, environ, while_it_starts)
        login = password(home)
        fcntl.flock(lock, fcntl.LOCK_UN)
        with _named(url, login):
            check_access(
                url,
                f"was started with another password than that in {home / PASSWORD}, which was changed or removed since. "
                "Stop all commands that use this server, and start again.",
            )
            write_profile(home, url, login)
            with errors_told(gained, log.warning), kept_up(home, url, environ):
                yield url
        _leave(home, users, lock)


def _locked(path: Path) -> IO[str]:
    """A file to lock."""
    return open(path, "a", opener=PRIVATE)


@contextmanager
def _named(url: str, login: str) -> Iterator[None]:
    """In this block the environment names a server and the login for it: of all that we start, jobs of clusters too."""
    named = {"PREFECT_API_URL": url, "PREFECT_API_AUTH_STRING": login}
    before = {key: os.environ.pop(key, None) for key in named}
    os.environ.update(named)
    see_environment()
    try:
        yield
    finally:
        for key, value in before.items():
            del os.environ[key]
            os.environ.update({} if value is None else {key: value})
        see_environment()


def see_environment() -> None:
    """Prefect, where it is imported, reads the environment again: it knows only that of its import."""
    if "prefect.context" in sys.modules:
        sys.modules["prefect.context"].refresh_global_settings_context()


def free_port() -> int:
    """A loopback port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def server_address(home: Path) -> str | None:
    """The address of the running server, whether it answers yet or not."""
    try:
        with (home / "server.json").open() as record:
            try:
                fcntl.flock(record, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return str(json.load(record)["url"])
    except FileNotFoundError:
        pass
    return None


def join_server(home: Path, port: int | None) -> str | None:
    """Wait until the running server answers, and return its address; None without one.

    Raises ConfigError when it has another port than the one that is asked for.
    """
    url = server_address(home)
    if url is None:
        return None
    if port is not None and f":{port}/" not in url:
        raise ConfigError(
            f"The server of {home} is already running at {url.removesuffix('/api')}, for another command. Remove "
            "--port to use it there, or wait until that command has ended."
        )
    _wait_until_healthy(home, url)
    return url


def start_server(
    home: Path, port: int | None, environ: dict[str, str], while_it_starts: Callable[[], object] = lambda: None
) -> str:
    """Start a server, wait until it answers, and return its address. port: None for any that is free.

    Raises ConfigError when the port is in use, JobError when the server does not start.
    """
    if port is None:
        port = free_port()
    elif not _is_free(port):
        raise ConfigError(
            f"Port {port} of 127.0.0.1 is in use. Choose another with --port, or stop what listens there."
        )
    url = f"http://127.0.0.1:{port}/api"
    settings = {
        "PREFECT_API_URL": url,
        "PREFECT_UI_API_URL": url,
        # For the UI under the one name, whose API has the other.
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": f"http://127.0.0.1:{port},http://localhost:{port}",
        "PREFECT_SERVER_API_AUTH_STRING": password(home),
    }
    beside = home / "server.json.new"
    put_aside(home / "server.log", LARGEST_LOG)
    with beside.open("w") as record, open(home / "server.log", "ab", opener=PRIVATE) as log_file:
        fcntl.flock(record, fcntl.LOCK_EX)  # the server's from here on, which inherits the file
        json.dump({"url": url}, record)
        record.flush()
        log_file.write(STARTED)
        log_file.flush()
        beside.replace(home / "server.json")  # who reads it reads all of it, locked
        subprocess.Popen(
            _command(home, port), stdin=subprocess.DEVNULL, stdout=log_file, stderr=subprocess.STDOUT,
            start_new_session=True, pass_fds=(record.fileno(),), env={**environ, **settings},
        )  # fmt: skip
    while_it_starts()
    _wait_until_healthy(home, url)
    return url


def _command(home: Path, port: int | None) -> list[str]:
    """What a server of a home is started as."""
    return [
        sys.executable,
        "-P",
        "-m",
        "flows.serving.bound",
        str(home / "server.users"),
        "flows.serving.web_server",
        str(port),
    ]


@contextmanager
def kept_up(home: Path, url: str, environ: dict[str, str]) -> Iterator[None]:
    """In this block, start the server again at the same address when it has ended: it was killed, or out of memory. One
    that has not answered for minutes is killed.
    """
    port, hearing = urlsplit(url).port, Hearing(url)

    def start_again(ended: threading.Event) -> None:
        with _locked(home / "server.lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not ended.is_set() and server_address(home) is None:  # else another user was faster
                log.warning("the Prefect server of %s has ended; it is restarted", home)
                start_server(home, port, environ)
        hearing.begin()

    def end_hung() -> None:
        """Under the lock, so that it is not another user's new server, and only if it still does not answer."""
        with _locked(home / "server.lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if hearing.ask(url, ANSWER_S) or server_address(home) != url:
                hearing.begin()
            elif end_server(_command(home, port)):
                log.warning(
                    "the Prefect server of %s has not answered for %.0f s; it was killed", home, hearing.silent_s()
                )
                hearing.begin()  # until its end is seen, which takes a moment

    def until_it_ends(ended: threading.Event) -> None:
        while not ended.wait(LOOK_EVERY_S) and server_address(home) is not None:
            if hearing.is_hung():
                end_hung()

    def watch(ended: threading.Event) -> None:
        ends: deque[float] = deque(maxlen=RESTARTS + 1)
        while not ended.is_set():
            try:
                until_it_ends(ended)
                if ended.is_set():
                    return
                if _too_often(ends, home) and ended.wait(RESTARTS_S):
                    return
                start_again(ended)
            except (DeepFloydError, OSError) as error:  # killed again, its port is taken still, or the disk fails
                log.warning("%s", error)

    with meanwhile("server-kept-up", watch, LOOK_EVERY_S):
        yield


def _too_often(ends: deque[float], home: Path) -> bool:
    """Note that the server has ended just now; whether it did so RESTARTS times within RESTARTS_S, which is reported."""
    ends.append(time.monotonic())
    if len(ends) <= RESTARTS or ends[-1] - ends[0] >= RESTARTS_S:
        return False
    log.warning("the Prefect server of %s has ended %d times; it is restarted in an hour", home, len(ends))
    ends.clear()
    return True


def page_address(url: str, home: Path, private: bool) -> str:
    """What a person opens to see the UI of a server that `prefect_server` yielded.

    private: whether this is shown to the user alone, on a terminal; else the password is left out, and its file named.
    """
    page = url.removesuffix("/api")
    if server_address(home) != url:
        return page  # not a server of ours
    return login_link(page, home) if private else f"{page} (its password is in {home / PASSWORD})"


def _wait_until_healthy(home: Path, url: str) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not healthy(url):
        if server_address(home) is None or time.monotonic() > deadline:
            need_room(home, DATABASE_BYTES, "The Prefect server did not start: its new database takes", _ROOM)
            raise JobError(f"The Prefect server did not start; its log is {home / 'server.log'}.")
        time.sleep(0.1)


def look_for_room(url: str, home: Path) -> None:
    """Raise StorageError where a server of this home, at this address, has no room to write."""
    if server_address(home) == url:
        why = f"The Prefect server at {url} cannot write. Finished work is kept. Its database needs at least"
        need_room(home, LEAST_BYTES, why, _ROOM)


def _leave(home: Path, users: IO[str], lock: IO[str]) -> None:
    """Leave the server; wait for its end if nobody else uses it, so that nothing writes to the history afterwards."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return  # somebody is about to use it
    alone = _is_alone(users)
    fcntl.flock(users, fcntl.LOCK_UN)
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while alone and server_address(home) and time.monotonic() < deadline:
        time.sleep(0.05)


def _is_alone(users: IO[str]) -> bool:
    for mode, alone in ((fcntl.LOCK_EX, True), (fcntl.LOCK_SH, False)):
        try:
            fcntl.flock(users, mode | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        return alone
    return True  # the server has it: it is ending
