"""Prefect's history does not grow for ever: what a server of ours forgets after some time, and what it keeps."""

import os
import sqlite3
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest
from polling import within

from flows.serving.home import password

PATIENCE_S = 120.0  # a hang, not a measure of speed
HOLD = """
import sys
from pathlib import Path
from flows.serving.server import prefect_server
with prefect_server(Path(sys.argv[1])) as url:
    print(url, flush=True)
    sys.stdin.readline()
"""
DAYS = {"young": 50, "old": 70}  # since the end of a run
EVENT_DAYS = {"young": 2, "old": 4}


def ago(days: float) -> str:
    return (datetime.now(UTC) - timedelta(days=days)).isoformat()


def event(name: str, days: float) -> dict[str, Any]:
    resource = {"prefect.resource.id": f"test.{name}"}
    return {"event": f"test.{name}", "occurred": ago(days), "resource": resource, "id": str(uuid4()), "payload": {}}


def post(api: httpx.Client, path: str, body: Any) -> httpx.Response:
    """The answer; while SQLite is busy it asks again, as Prefect's own clients do."""
    while (answer := api.post(path, json=body)).status_code == 503:
        time.sleep(0.5)
    return answer


def old_and_young(api: httpx.Client, database: Path) -> None:
    """A run that ended before the retention period and one since, each with a log line and an artifact; and events."""
    flow = post(api, "flows/", {"name": "nightly"}).json()["id"]
    for name, days in DAYS.items():
        state = {"type": "COMPLETED", "name": "Completed"}
        run = post(api, "flow_runs/", {"flow_id": flow, "name": name, "state": state}).json()["id"]
        made = {"key": name, "type": "markdown", "data": "payload " * 1000, "flow_run_id": run}
        assert post(api, "artifacts/", made).status_code == 201
        line = {"name": "x", "level": 20, "message": name, "timestamp": ago(days), "flow_run_id": run}
        assert post(api, "logs/", [line]).status_code == 201
        with sqlite3.connect(database, timeout=30) as connection:
            connection.execute(
                "UPDATE flow_run SET end_time = ? WHERE name = ?", (ago(days).replace("T", " ")[:26], name)
            )
        connection.close()
    assert post(api, "events", [event(name, days) for name, days in EVENT_DAYS.items()]).status_code == 204


def kept(database: Path) -> dict[str, set[str]]:
    """What the database has of the two runs and the two events."""
    with sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=30) as connection:
        found = {
            table: {row[0] for row in connection.execute(f"SELECT {column} FROM {table}")}
            for table, column in (
                ("flow_run", "name"),
                ("artifact", "key"),
                ("artifact_collection", "key"),
                ("log", "message"),
            )
        }
        found["events"] = {row[0] for row in connection.execute("SELECT event FROM events WHERE event LIKE 'test.%'")}
        found["payloads"] = {
            row[0] for row in connection.execute(
                "SELECT json_extract(payload, '$.key') FROM events WHERE event = 'prefect.artifact-collection.created'")
        }  # fmt: skip
    connection.close()
    return found


@pytest.mark.slow
def test_old_runs_go_with_their_artifacts_and_logs_and_old_events_go(prefect_home: Path) -> None:
    database = prefect_home / "prefect.db"
    often = {
        f"PREFECT_SERVER_SERVICES_DB_VACUUM_{name}": "1" for name in ("LOOP_SECONDS", "ORPHAN_CLEANUP_LOOP_SECONDS")
    }
    env = {key: value for key, value in os.environ.items() if not key.startswith("PREFECT_")} | often
    with subprocess.Popen(
        [sys.executable, "-P", "-c", HOLD, str(prefect_home)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=env,
    ) as held:  # fmt: skip
        assert held.stdout is not None
        url = held.stdout.readline().strip()
        user, _, secret = password(prefect_home).partition(":")
        with httpx.Client(base_url=url, auth=(user, secret), timeout=30, trust_env=False) as api:
            old_and_young(api, database)
            young = {
                "flow_run": {"young"}, "artifact": {"young"}, "artifact_collection": {"young"}, "log": {"young"},
                "events": {"test.young"},
            }  # fmt: skip
            within(PATIENCE_S, lambda: kept(database).items() >= young.items(), every_s=0.5)
            found = kept(database)
        held.communicate("\n", timeout=PATIENCE_S)
    payloads = found.pop("payloads")
    assert found == young
    assert "old" in payloads, "an event repeats the payload, and goes by its own age"
