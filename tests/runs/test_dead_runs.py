"""What `deepfloyd ui` asks a server again and again about runs that died."""

from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from uuid import UUID, uuid4

import httpx
import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import State, StateType

from flows.runs.dead_runs import settle_lost


class Server:
    """Counts the requests about runs that have crashed."""

    def __init__(self, flow: str, count: int) -> None:
        self.flow, self.asked = flow, Counter[str]()
        self.fails = False
        crashed = State[None](type=StateType.CRASHED, timestamp=datetime.now(UTC))
        self.runs = [
            SimpleNamespace(id=uuid4(), flow_id=uuid4(), deployment_id=uuid4(), state=crashed, tags=list[str](),
                            infrastructure_pid=None, parameters={}, name=f"run {number}", work_queue_name=None,
                            job_variables=None)
            for number in range(count)
        ]  # fmt: skip

    def read_flow_runs(self, offset: int = 0, **_: object) -> list[Any]:
        return self.runs[offset:]

    def read_flow_run(self, run_id: UUID) -> Any:
        self.asked["run"] += 1
        return next(run for run in self.runs if run.id == run_id)

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
        assert settle_lost(server.client, tmp_path, "pool", settled) == []
    assert server.asked == {"run": 3, "flow": 3}
    gone = server.runs.pop()
    settle_lost(server.client, tmp_path, "pool", settled)
    assert settled == {run.id for run in server.runs} and gone.id not in settled, "it does not grow for ever"


def test_a_run_that_could_not_be_repeated_for_want_of_the_server_is_repeated_at_the_next_look(tmp_path: Path) -> None:
    server, settled = Server("retrain", 1), set[UUID]()
    server.fails = True
    with pytest.raises(httpx.HTTPStatusError):
        settle_lost(server.client, tmp_path, "pool", settled)
    server.fails = False
    assert settle_lost(server.client, tmp_path, "pool", settled) == ["run 0 is run again as another"]
    assert settle_lost(server.client, tmp_path, "pool", settled) == [] and server.asked["again"] == 1
