"""The history in a real PostgreSQL, by one setting of Prefect's."""

import os
import subprocess
from pathlib import Path

import pytest
from postgresql import BIN, NEEDS_POSTGRESQL, database
from small_run import SmallRun

SHORT = [
    word
    for key in ("stage1.max_train_steps=1", "stage2.max_train_steps=1", "num_eval_images=0", "num_validation_images=1")
    for word in ("--set", key)
]


@pytest.mark.slow
@NEEDS_POSTGRESQL
def test_a_run_has_its_history_in_postgresql(small_run: SmallRun, tmp_path: Path) -> None:
    with database() as port:
        address = f"postgresql+asyncpg://prefect@127.0.0.1:{port}/prefect"
        environ = {key: value for key, value in os.environ.items() if not key.startswith("PREFECT_")}
        environ |= {"PREFECT_HOME": str(tmp_path / "home"), "PREFECT_API_DATABASE_CONNECTION_URL": address}
        command = small_run.command("run", str(small_run.config), *SHORT)
        done = subprocess.run(command, cwd=small_run.folder, env=environ, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
        assert not (tmp_path / "home" / "prefect.db").exists()
        joined = "select flow.name, flow_run.state_type from flow_run join flow on flow.id = flow_id"
        psql = [
            str(BIN / "psql"),
            "-At",
            "-c",
            f"{joined} where flow.name = 'finetune'",
            address.replace("+asyncpg", ""),
        ]
        assert subprocess.check_output(psql, text=True) == "finetune|COMPLETED\n"
