"""What fails inside a Prefect server is said by whoever uses it: one line for each error."""

from pathlib import Path

import pytest

from flows.serving.server_log import LogReader, errors_told, service_error

FAILED = """\
21:27:57.023 | ERROR   | docket.dependencies - ↩ [    30ms] schedule_deployments(){schedule_deployments}
Traceback (most recent call last):
  File "/venv/docket/worker.py", line 1134, in _execute
    result = await execution.function(
             ^^^^^^^^^^^^^^^^^^^^^^^^^
sqlalchemy.exc.InvalidRequestError: Can't evaluate bulk DML statement; run 17 of 20
"""
OTHERS = """\
21:27:50.000 | INFO    | prefect.server - started
21:27:51.000 | WARNING | prefect.server.services.late - slow
21:27:52.000 | ERROR   | prefect.server - Encountered exception in request:
Traceback (most recent call last):
ValueError: the caller is told
21:27:53.000 | ERROR   | uvicorn.error - Exception in ASGI application
21:27:54.000 | ERROR   | prefect.server.utilities.worker_channel - Worker channel heartbeat persistence failed: work_pool=p
Traceback (most recent call last):
sqlite3.OperationalError: database is locked
21:27:55.000 | ERROR   | prefect.server.events.services.event_persister - Max flush retries (5) reached, dropping 2 events
Traceback (most recent call last):
sqlalchemy.exc.IntegrityError: (sqlite3.IntegrityError) NOT NULL constraint failed: events.occurred
"""
LAST = "21:29:00.000 | ERROR   | prefect.server.events.triggers - Error sweeping held events\n"


def test_each_error_of_a_service_is_one_line_and_is_said_once(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    log.write_text(FAILED.replace("schedule_deployments", "of_an_earlier_start"))
    lines: list[str] = []
    reader = LogReader(log)
    with errors_told(reader, lines.append), log.open("a") as opened:
        opened.write(f"banner\n{OTHERS}{FAILED}{FAILED.replace('17', '3').replace('57.023', '59.001')}{LAST}")
    assert lines == [
        "the Prefect server's service schedule_deployments fails: sqlalchemy.exc.InvalidRequestError: Can't evaluate "
        f"bulk DML statement; run 17 of 20 (log: {log})",
        f"the Prefect server's service prefect.server.events.triggers fails: Error sweeping held events (log: {log})",
    ]


@pytest.mark.parametrize("size", [1, 7, 100])
def test_a_record_that_arrives_in_pieces_is_read_whole(tmp_path: Path, size: int) -> None:
    log = tmp_path / "server.log"
    reader, data = LogReader(log), (FAILED + OTHERS).encode()
    found = []
    with log.open("ab", buffering=0) as opened:
        for start in range(0, len(data), size):
            opened.write(data[start : start + size])
            found += reader.errors()
    found += reader.errors(to_the_end=True)
    assert [(error.service, error.error[:38]) for error in found] == [
        ("schedule_deployments", "sqlalchemy.exc.InvalidRequestError: Ca")
    ]


LOCKED = """\
09:20:55.328 | ERROR   | prefect.server.events.triggers - Error sweeping held events
Traceback (most recent call last):
  File "/venv/aiosqlite/core.py", line 63, in _connection_worker_thread
    result = function()
             ^^^^^^^^^^
sqlite3.OperationalError: database is locked

The above exception was the direct cause of the following exception:

Traceback (most recent call last):
  File "/venv/sqlalchemy/engine/default.py", line 1192, in do_execute
    cursor.execute(statement, parameters)
sqlalchemy.exc.OperationalError: (sqlite3.OperationalError) database is locked
[SQL: INSERT INTO worker (name) VALUES (:name)
  ON CONFLICT (name) DO NOTHING]
[parameters: {'name': 'ProcessWorker 1b9e6cb9'}]
(Background on this error at: https://sqlalche.me/e/21/e3q8)
"""


def test_an_error_is_told_by_what_was_raised_not_by_what_stands_below_it() -> None:
    error = service_error(LOCKED)
    assert error and error.error == "sqlalchemy.exc.OperationalError: (sqlite3.OperationalError) database is locked"


def test_a_log_that_is_emptied_or_missing_is_no_error(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    reader = LogReader(log)
    assert reader.errors() == []
    log.write_text(OTHERS * 9)
    assert reader.errors() == []
    log.write_text(FAILED)
    assert [error.service for error in reader.errors(to_the_end=True)] == ["schedule_deployments"]
    log.write_bytes(b"\xff\xfe" * 1000)
    assert reader.errors(to_the_end=True) == []
