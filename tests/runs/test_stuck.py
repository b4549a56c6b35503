"""A schedule that comes to nothing night after night is told once; one that makes up for missed nights is not."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from uuid import UUID, uuid4

import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import FlowRun, State, StateType

from flows.runs.stuck import streak_of, tell_stuck

START = datetime(2026, 3, 1, 3, tzinfo=UTC)


def run(night: float, kind: str, decided: float | None = None, scheduled: bool = True) -> FlowRun:
    """A run that was planned for a night, and ended in another one if that is given."""
    of = {"Skipped": StateType.CANCELLED, "Cancelled": StateType.CANCELLED, "Completed": StateType.COMPLETED,
          "Failed": StateType.FAILED, "Crashed": StateType.CRASHED}  # fmt: skip
    when = START + timedelta(days=night if decided is None else decided)
    state = State[None](type=of[kind], name=kind, timestamp=when, message="busy")
    planned = START + timedelta(days=night)
    return FlowRun.model_validate(
        {"flow_id": uuid4(), "name": f"night {night}", "state": state, "auto_scheduled": scheduled,
         "expected_start_time": planned}
    )  # fmt: skip


def newest_first(*runs: FlowRun) -> list[FlowRun]:
    return list(reversed(runs))


@pytest.mark.parametrize(
    ("runs", "length"),
    [([run(0, "Completed"), *(run(night, "Skipped") for night in (1, 2, 3))], 3),
     ([run(1, "Failed"), run(2, "Skipped"), run(3, "Crashed"), run(4, "Skipped")], 4),
     ([run(1, "Skipped"), run(2, "Skipped")], 2),
     ([run(1, "Skipped"), run(2, "Completed"), run(3, "Skipped"), run(4, "Skipped")], 2),
     ([run(1, "Skipped"), run(2, "Skipped"), run(2.5, "Completed", scheduled=False), run(3, "Skipped")], 1),
     ([run(1, "Skipped"), run(2, "Cancelled"), run(3, "Skipped"), run(3.5, "Failed", scheduled=False)], 2),
     ([run(night, "Skipped", decided=6.01) for night in range(1, 6)], 0),  # the worker is back after six nights
     ([run(night, "Skipped", decided=night + 0.1) for night in (1, 2, 3)], 3)],
)  # fmt: skip
def test_a_streak_is_of_scheduled_runs_that_came_to_nothing_since_the_last_completed_one(
    runs: list[FlowRun], length: int
) -> None:
    assert len(streak_of(newest_first(*runs))[0]) == length


class Server:
    """Two deployments, of which one has a schedule."""

    def __init__(self) -> None:
        self.runs, self.events, self.paused = list[FlowRun](), list[dict[str, Any]](), False
        self.ids = uuid4(), uuid4()

    def read_deployments(self) -> list[Any]:
        return [
            SimpleNamespace(id=name, flow_id=uuid4(), name="nightly", paused=self.paused,
                            schedules=[SimpleNamespace(active=active)])
            for name, active in zip(self.ids, (True, False), strict=True)
        ]  # fmt: skip

    def read_flow_runs(self, flow_run_filter: Any, limit: int, **_: object) -> list[FlowRun]:
        assert flow_run_filter.deployment_id.any_ == [self.ids[0]]
        kinds = flow_run_filter.state.type.any_
        return [run for run in newest_first(*self.runs) if run.state is not None and run.state.type in kinds][:limit]

    def read_flow(self, flow_id: UUID) -> Any:
        return SimpleNamespace(name="retrain")

    def request(self, method: str, path: str, json: list[dict[str, Any]]) -> None:
        self.events += json

    @property
    def client(self) -> SyncPrefectClient:
        return cast(SyncPrefectClient, self)


def test_a_stuck_schedule_is_told_once_a_streak(tmp_path: Path) -> None:
    server = Server()
    for night in range(1, 9):
        server.runs.append(run(night, "Skipped"))
        lines = tell_stuck(server.client, tmp_path)
        assert len(lines) == (night == 3)
    (event,) = server.events
    assert (
        event["event"] == "deepfloyd.schedule.stuck" and event["resource"]["prefect.resource.name"] == "retrain/nightly"
    )
    assert event["payload"]["message"] == (
        "the last 3 runs of its schedule came to nothing. The newest: Skipped (busy)"
    )
    server.runs += [run(9, "Completed"), *(run(night, "Failed") for night in (10, 11, 12))]
    assert len(tell_stuck(server.client, tmp_path)) == 1 and len(server.events) == 2
    assert tell_stuck(server.client, tmp_path) == []
    assert len({one["id"] for one in server.events}) == 2
    server.runs += [run(13, "Completed"), *(run(night, "Failed") for night in (14, 15, 16))]
    server.paused = True
    assert tell_stuck(server.client, tmp_path) == [], "nobody expects its runs"


def test_a_long_streak_is_told_once_though_the_run_before_it_is_far_back_or_forgotten(tmp_path: Path) -> None:
    server = Server()
    server.runs = [run(0, "Completed"), *(run(night, "Skipped") for night in (1, 2, 3))]
    assert len(tell_stuck(server.client, tmp_path)) == 1
    server.runs += [run(night, "Skipped") for night in range(4, 151)]
    assert tell_stuck(server.client, tmp_path) == [], "more runs than are read"
    del server.runs[0]
    assert tell_stuck(server.client, tmp_path) == [], "the server forgets runs after 60 days"
    server.runs += [run(151, "Completed"), *(run(night, "Skipped") for night in range(152, 155))]
    assert len(tell_stuck(server.client, tmp_path)) == 1
