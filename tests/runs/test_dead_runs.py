"""What `deepfloyd ui` asks a server again and again about runs that died."""

import os
import subprocess
import sys
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from uuid import UUID, uuid4

import httpx
import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import State, StateType

from flows.runs.dead_runs import RUN_ID, WORKER, settle_ended, settle_lost
from flows.runs.run_lease import lease_of, leases
from flows.serving.worker import worker_name


class Server:
    """Counts the requests about runs that have crashed."""

    def __init__(self, flow: str, count: int) -> None:
        self.flow, self.asked = flow, Counter[str]()
        self.fails, self.parts = False, list[Any]()
        crashed = State[None](type=StateType.CRASHED, timestamp=datetime.now(UTC))
        self.runs = [
            SimpleNamespace(id=uuid4(), flow_id=uuid4(), deployment_id=uuid4(), state=crashed, tags=list[str](),
                            infrastructure_pid=None, labels=dict[str, str](), parameters={}, name=f"run {number}",
                            work_queue_name=None, job_variables=None)
            for number in range(count)
        ]  # fmt: skip

    def read_flow_runs(self, flow_run_filter: Any, offset: int = 0, **_: object) -> list[Any]:
        if flow_run_filter.parent_flow_run_id is None:
            return self.runs[offset:]
        (parent,) = flow_run_filter.parent_flow_run_id.any_
        types = flow_run_filter.state.type.any_
        return [part for part in self.parts if part.parent == parent and part.state.type in types]

    def read_flow_run(self, run_id: UUID) -> Any:
        self.asked["run"] += 1
        return next(run for run in self.runs if run.id == run_id)

    def set_flow_run_state(self, run_id: UUID, state: "State[None]", force: bool) -> None:
        assert force
        next(run for run in (*self.runs, *self.parts) if run.id == run_id).state = state

    def read_task_runs(self, **_: object) -> list[Any]:
        return []

    def read_flow(self, flow_id: UUID) -> Any:
        self.asked["flow"] += 1
        return SimpleNamespace(name=self.flow)

    def create_flow_run_from_deployment(self, *_: object, **__: object) -> Any:
        if self.fails:
            raise httpx.HTTPStatusError("away", request=httpx.Request("POST", "http://a"), response=httpx.Response(503))
        self.asked["again"] += 1
        return SimpleNamespace(name="another")

    def update_flow_run(self, run_id: UUID, tags: list[str]) -> None:
        next(run for run in self.runs if run.id == run_id).tags = tags

    @property
    def client(self) -> SyncPrefectClient:
        return cast(SyncPrefectClient, self)


def test_a_crashed_run_that_is_not_repeated_is_asked_for_once(tmp_path: Path) -> None:
    server, settled = Server("promote", 3), set[UUID]()
    for _ in range(4):
        assert settle_lost(server.client, tmp_path, "pool", "ours", True, settled) == []
    assert server.asked == {"run": 3, "flow": 3}
    gone = server.runs.pop()
    settle_lost(server.client, tmp_path, "pool", "ours", True, settled)
    assert settled == {run.id for run in server.runs} and gone.id not in settled, "it does not grow for ever"


def test_a_run_that_could_not_be_repeated_for_want_of_the_server_is_repeated_at_the_next_look(tmp_path: Path) -> None:
    server, settled = Server("retrain", 1), set[UUID]()
    server.fails = True
    with pytest.raises(httpx.HTTPStatusError):
        settle_lost(server.client, tmp_path, "pool", "ours", True, settled)
    server.fails = False
    assert settle_lost(server.client, tmp_path, "pool", "ours", True, settled) == ["run 0 is run again as another"]
    assert settle_lost(server.client, tmp_path, "pool", "ours", True, settled) == [] and server.asked["again"] == 1


def lost_run(pid: int, worker: str | None = "ours") -> Server:
    """A run that has been Running for an hour, and has no lease here."""
    server = Server("retrain", 1)
    (run,) = server.runs
    run.state = State[None](type=StateType.RUNNING, timestamp=datetime.now(UTC) - timedelta(hours=1))
    run.infrastructure_pid, run.labels = str(pid), {WORKER: worker} if worker else {}
    return server


def ended_pid() -> int:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        return process.pid


@pytest.mark.parametrize(
    ("worker", "own", "is_settled"),
    [("ours", True, True), ("ours", False, True), ("another machine's", True, False), ("another machine's", False, False),
     (None, True, True), (None, False, False)],
)  # fmt: skip
def test_a_run_without_a_process_here_is_settled_where_its_worker_is(
    tmp_path: Path, worker: str | None, own: bool, is_settled: bool
) -> None:
    server = lost_run(ended_pid(), worker)
    settle_lost(server.client, tmp_path, "pool", "ours", own)
    assert (server.runs[0].state.type, server.asked["again"]) == (
        (StateType.CRASHED, 1) if is_settled else (StateType.RUNNING, 0)
    )


@pytest.mark.parametrize("own", [True, False])
def test_a_crashed_run_of_another_worker_is_run_again_by_who_has_the_server(tmp_path: Path, own: bool) -> None:
    server = Server("retrain", 1)
    server.runs[0].labels = {WORKER: "another machine's"}
    settle_lost(server.client, tmp_path, "pool", "ours", own)
    assert server.asked["again"] == own


def test_a_run_lives_as_long_as_the_process_that_was_started_for_it_and_not_one_with_its_number(tmp_path: Path) -> None:
    server = lost_run(os.getpid())
    command = [sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()"]
    environ = os.environ | {RUN_ID: str(server.runs[0].id)}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environ) as process:
        assert process.stdout is not None and process.stdout.readline()
        server.runs[0].infrastructure_pid = str(process.pid)
        assert settle_lost(server.client, tmp_path, "pool", "ours", True) == []
        server.runs[0].infrastructure_pid = str(os.getpid())
        (buried, again) = settle_lost(server.client, tmp_path, "pool", "ours", True)
    assert "is Crashed" in buried and again == "run 0 is run again as another"


def test_what_a_worker_had_begun_that_was_killed_is_known_at_once_and_what_a_new_one_begins_is_waited_for(
    tmp_path: Path,
) -> None:
    """It had told the server that a run begins, and died before it had told its process."""
    now = datetime.now(UTC)

    def settled(since: datetime, own: bool = True, pid: str | None = None) -> bool:
        server = lost_run(0)
        run = server.runs[0]
        run.state = State[None](type=StateType.PENDING, timestamp=now - timedelta(seconds=5))
        run.infrastructure_pid = pid
        return bool(settle_lost(server.client, tmp_path, "pool", "ours", own, worker_since=since))

    assert settled(now), "the worker was started after that"
    assert not settled(now - timedelta(seconds=9)), "this worker is about to start it"
    assert not settled(now, own=False), "another machine's clock"
    server = lost_run(0)
    server.runs[0].infrastructure_pid = None
    server.runs[0].state = State[None](type=StateType.PENDING, timestamp=now - timedelta(seconds=5))
    environ = os.environ | {RUN_ID: str(server.runs[0].id)}
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, env=environ) as process:
        assert settle_lost(server.client, tmp_path, "pool", "ours", True, worker_since=now) == [], "its process imports"
        process.kill()
    assert settle_lost(server.client, tmp_path, "pool", "ours", True, worker_since=now)


@pytest.mark.parametrize("ended", [StateType.CRASHED, StateType.CANCELLED, StateType.RUNNING, StateType.COMPLETED])
def test_the_parts_of_a_run_end_with_it_also_when_its_worker_has_told_its_end(tmp_path: Path, ended: StateType) -> None:
    """A worker that sees its process killed tells the server of the run, and not of the subflow that was under way."""
    server = Server("retrain", 1)
    (run,) = server.runs
    now, part = datetime.now(UTC), Server("stage1_pixels", 1).runs[0]
    run.state = State[None](type=ended, timestamp=now)
    part.parent, part.state = run.id, State[None](type=StateType.RUNNING, timestamp=now)
    server.parts = [part]
    process = subprocess.run([sys.executable, "-c", LEASED, str(tmp_path), str(run.id)], check=True)
    assert process.returncode == 0 and leases(tmp_path)
    settle_ended(server.client, tmp_path, again=True)
    assert part.state.type == (StateType.RUNNING if ended is StateType.COMPLETED else StateType.CRASHED)


LEASED = """
import os, sys
from pathlib import Path
from uuid import UUID
from flows.runs.run_lease import take_lease
take_lease(Path(sys.argv[1]), UUID(sys.argv[2]))
os._exit(0)
"""


def test_the_worker_of_a_home_keeps_its_name_and_that_of_another_home_has_another(tmp_path: Path) -> None:
    homes = tmp_path / "a", tmp_path / "b"
    for home in homes:
        home.mkdir()
    first, second = map(worker_name, homes)
    assert first != second and worker_name(homes[0]) == first


def test_a_repetition_that_crashed_is_told_and_not_run_again(tmp_path: Path) -> None:
    server = Server("retrain", 1)
    server.runs[0].tags = ["again"]
    lease = lease_of(tmp_path, server.runs[0].id)
    lease.parent.mkdir()
    lease.touch()
    told = settle_ended(server.client, tmp_path, again=True)
    assert told == ["run 0 was run again already: start it yourself, and it goes on where it was"]
    assert not leases(tmp_path) and "again" not in server.asked
