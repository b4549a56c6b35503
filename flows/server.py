"""The Prefect server of a run: the one that is configured, or one that all runs with the same PREFECT_HOME share.

Never Prefect's ephemeral server: it gives up after 20 s on a busy machine and loses task runs. The first run starts a
server on a free loopback port, later ones join it, the last one stops it. A shared lock counts the users, so a killed
run counts itself out.
"""

import fcntl
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from deepfloyd_core.errors import ConfigError, JobError
from deepfloyd_core.files import write_bytes
from flows.api import check_access, check_api, healthy
from flows.proxies import without_loopback
from flows.server_log import LogReader, errors_told

log = logging.getLogger("deepfloyd_core.server")

START_TIMEOUT_S = 180.0
# Quiet and offline, one real server; the console belongs to our own messages, Prefect's records go to the server.
SETTINGS = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_EPHEMERAL_ENABLED": "false",
    "PREFECT_LOGGING_EXTRA_LOGGERS": "deepfloyd_core",
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",  # the core also logs outside of flow runs
    "PREFECT_CLI_COLORS": "false",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def default_home() -> Path:
    """PREFECT_HOME, or `.prefect` in the current directory, so that every command here sees the same history."""
    return Path(os.environ.get("PREFECT_HOME", ".prefect")).absolute()


@contextmanager
def prefect_server(home: Path, port: int | None = None) -> Iterator[str]:
    """Set the environment for Prefect and yield the API's address. Import prefect only inside.

    Raises ConfigError when PREFECT_API_URL is set to what no flow can use, or the server wants a password that we do not
    have, JobError when a server does not start.
    """
    os.environ.update({key: os.environ.get(key, value) for key, value in SETTINGS.items()})
    os.environ.update(without_loopback(os.environ))
    given = os.environ.get("PREFECT_API_URL")
    if given:
        check_api(given)
        yield given
        return
    home.mkdir(parents=True, exist_ok=True)
    os.environ["PREFECT_HOME"] = str(home)
    gained = LogReader(home / "server.log")
    with (home / "server.users").open("a") as users, (home / "server.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        url = _join(home) or _start(home, port)
        fcntl.flock(users, fcntl.LOCK_SH)
        fcntl.flock(lock, fcntl.LOCK_UN)
        os.environ["PREFECT_API_URL"] = url
        try:
            check_access(url)
            with errors_told(gained, log.warning):
                yield url
        finally:
            del os.environ["PREFECT_API_URL"]
            _leave(home, users, lock)


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


def stop_group(process_id: int) -> None:
    """Ask a process group to end as Ctrl-C would, wait, then insist."""
    for number, patience_s in ((signal.SIGINT, 20.0), (signal.SIGKILL, 5.0)):
        try:
            os.killpg(process_id, number)
        except ProcessLookupError:
            return
        deadline = time.monotonic() + patience_s
        while time.monotonic() < deadline:
            with suppress(ChildProcessError):  # started by another run
                os.waitpid(process_id, os.WNOHANG)
            try:
                os.killpg(process_id, 0)
            except ProcessLookupError:
                return
            time.sleep(0.1)


def _join(home: Path) -> str | None:
    try:
        record = json.loads((home / "server.json").read_bytes())
    except (OSError, ValueError):
        return None
    url = str(record["url"])
    return url if healthy(url) else None


def _start(home: Path, port: int | None) -> str:
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
        # A page from elsewhere in the user's browser must not be able to call the API.
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": f"http://127.0.0.1:{port},http://localhost:{port}",
    }
    command = [sys.executable, "-P", "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with (home / "server.log").open("ab") as log_file:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log_file, stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, **settings},
        )  # fmt: skip
    deadline = time.monotonic() + START_TIMEOUT_S
    while not healthy(url):
        if child.poll() is not None or time.monotonic() > deadline:
            stop_group(child.pid)
            raise JobError(f"The Prefect server did not start; its log is {home / 'server.log'}.")
        time.sleep(0.3)
    write_bytes(home / "server.json", json.dumps({"url": url, "pid": child.pid}).encode())
    return url


def _leave(home: Path, users: IO[str], lock: IO[str]) -> None:
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return  # somebody else still uses it
    with suppress(FileNotFoundError):  # somebody removed the directory; then there is nothing left to stop it by
        record = json.loads((home / "server.json").read_bytes())
        (home / "server.json").unlink()
        stop_group(record["pid"])
