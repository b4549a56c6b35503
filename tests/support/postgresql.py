"""A real PostgreSQL on loopback, with an empty database `prefect` of the user `prefect`."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from flows.serving.server import free_port

BIN = max(Path("/usr/lib/postgresql").glob("*/bin"), default=Path("/usr/bin"))
NEEDS_POSTGRESQL = pytest.mark.skipif(
    not (BIN / "initdb").exists(), reason="needs PostgreSQL; on Debian: apt-get install postgresql"
)
NOBODY = 65534  # as root, for PostgreSQL refuses that


@contextmanager
def database(password: str = "") -> Iterator[int]:
    """Its port, until the end of the block. Without a password everybody is let in."""
    folder, port = Path(tempfile.mkdtemp(prefix="deepfloyd-postgresql-")), free_port()
    user = NOBODY if os.getuid() == 0 else os.getuid()
    (folder / "password").write_text(password or "none")
    for path in (folder, folder / "password"):
        os.chown(path, user, -1)

    def call(name: str, *arguments: str) -> None:
        environ = {"PATH": os.environ["PATH"], "LC_ALL": "C", "PGPASSWORD": password}
        command = [str(BIN / name), *arguments]
        subprocess.run(command, user=user, cwd=folder, env=environ, check=True, stdout=subprocess.DEVNULL)

    data, secret = str(folder / "data"), str(folder / "password")
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -c fsync=off"
    by = "scram-sha-256" if password else "trust"
    try:
        call("initdb", "-D", data, "-U", "prefect", f"--auth={by}", f"--pwfile={secret}", "--no-sync")
        call("pg_ctl", "-D", data, "-w", "-l", str(folder / "log"), "-o", options, "start")
        call("createdb", "-h", "127.0.0.1", "-p", str(port), "-U", "prefect", "prefect")
        yield port
    finally:
        with suppress(subprocess.CalledProcessError):
            call("pg_ctl", "-D", data, "-m", "immediate", "stop")
        shutil.rmtree(folder)
