"""The history in a real PostgreSQL, by one setting of Prefect's."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from small_run import SmallRun

from flows.serving.server import free_port

BIN = max(Path("/usr/lib/postgresql").glob("*/bin"), default=Path("/usr/bin"))
NOBODY = 65534  # as root, for PostgreSQL refuses that
SHORT = [
    word
    for key in ("stage1.max_train_steps=1", "stage2.max_train_steps=1", "num_eval_images=0", "num_validation_images=1")
    for word in ("--set", key)
]


@pytest.fixture
def postgresql() -> Iterator[str]:
    """The address of an empty database."""
    folder, port = Path(tempfile.mkdtemp(prefix="deepfloyd-postgresql-")), free_port()
    user = NOBODY if os.getuid() == 0 else os.getuid()
    os.chown(folder, user, -1)

    def call(name: str, *arguments: str) -> None:
        environ = {"PATH": os.environ["PATH"], "LC_ALL": "C"}
        command = [str(BIN / name), *arguments]
        subprocess.run(command, user=user, cwd=folder, env=environ, check=True, stdout=subprocess.DEVNULL)

    data = str(folder / "data")
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -c fsync=off"
    try:
        call("initdb", "-D", data, "-U", "prefect", "--auth=trust", "--no-sync")
        call("pg_ctl", "-D", data, "-w", "-l", str(folder / "log"), "-o", options, "start")
        call("createdb", "-h", "127.0.0.1", "-p", str(port), "-U", "prefect", "prefect")
        yield f"postgresql+asyncpg://prefect@127.0.0.1:{port}/prefect"
    finally:
        with suppress(subprocess.CalledProcessError):
            call("pg_ctl", "-D", data, "-m", "immediate", "stop")
        shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.skipif(not (BIN / "initdb").exists(), reason="needs PostgreSQL; on Debian: apt-get install postgresql")
def test_a_run_has_its_history_in_postgresql(small_run: SmallRun, postgresql: str, tmp_path: Path) -> None:
    environ = {key: value for key, value in os.environ.items() if not key.startswith("PREFECT_")}
    environ |= {"PREFECT_HOME": str(tmp_path / "home"), "PREFECT_API_DATABASE_CONNECTION_URL": postgresql}
    command = small_run.command("run", str(small_run.config), *SHORT)
    done = subprocess.run(command, cwd=small_run.folder, env=environ, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not (tmp_path / "home" / "prefect.db").exists()
    query = "select flow.name, flow_run.state_type from flow_run join flow on flow.id = flow_id where flow.name = 'finetune'"
    psql = [str(BIN / "psql"), "-At", "-c", query, postgresql.replace("+asyncpg", "")]
    assert subprocess.check_output(psql, text=True) == "finetune|COMPLETED\n"
