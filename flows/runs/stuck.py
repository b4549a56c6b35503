"""Notices schedules that have come to nothing several times in a row, and emits `deepfloyd.schedule.stuck` once for it.

A run that fails has a notification of its own; one that is skipped is no failure, so that nobody hears of a schedule whose
every run is skipped: its run hangs, or no worker is free. The streak begins after the deployment's last completed run,
whoever started it; the file `<PREFECT_HOME>/stuck/DEPLOYMENT` remembers for which streak it was told.
"""

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from uuid import NAMESPACE_URL, UUID, uuid5

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterDeploymentId,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.sorting import FlowRunSort
from prefect.events import Event
from prefect.events.schemas.events import Resource

from deepfloyd_core.files import write_bytes
from flows.runs.run_lease import SKIPPED

FOLDER = "stuck"
STREAK = 3  # runs of a schedule that came to nothing
_PAGE = 100  # of the last runs; more skipped ones in a row are a streak anyway
_FAILED = {StateType.FAILED, StateType.CRASHED}
_FINAL = [StateType.COMPLETED, StateType.CANCELLED, *sorted(_FAILED)]


def tell_stuck(client: SyncPrefectClient, home: Path) -> list[str]:
    """Emit an event for each schedule that is stuck, once a streak. Returns a line for each."""
    told = []
    for deployment in client.read_deployments():
        if deployment.paused or not any(schedule.active for schedule in deployment.schedules):
            continue
        runs = _last_runs(client, deployment.id)
        streak, since = streak_of(runs)
        if len(streak) < STREAK:
            continue
        since = since or _last_completed(client, deployment.id)
        mark = home / FOLDER / str(deployment.id)
        if mark.exists() and since in (
            "",
            mark.read_text(),
        ):  # empty: the server has forgotten that run, or there was none
            continue
        name = f"{client.read_flow(deployment.flow_id).name}/{deployment.name}"
        message = f"the last {len(streak)} runs of its schedule came to nothing. The newest: {_words(streak[0])}"
        client.request("POST", "/events", json=[_event(deployment, name, message, since).model_dump(mode="json")])
        mark.parent.mkdir(exist_ok=True)
        write_bytes(mark, since.encode())  # after it was told: a kill in between tells it twice
        told.append(f"{name} is stuck: {message}")
    return told


def streak_of(runs: Sequence[FlowRun]) -> tuple[list[FlowRun], str]:
    """The runs of a schedule that came to nothing since the last one that completed, and that one's id (empty: none).

    runs: that have ended, those that were planned last first. Empty where the streak may end by itself: after a worker
    was away, all missed runs are skipped at one moment, and another one makes up for them.
    """
    streak, since = list[FlowRun](), ""
    for run in runs:
        if run.state is not None and run.state.is_completed():
            since = str(run.id)
            break
        if run.auto_scheduled and _came_to_nothing(run):
            streak.append(run)
    if len(streak) < STREAK:
        return streak, since
    # Three nights are decided in three nights, at least two thirds of the time for which they were planned.
    newest, third = streak[0], streak[STREAK - 1]
    return (streak, since) if _decided_over(third, newest) >= _planned_over(third, newest) * 2 / 3 else ([], since)


def _came_to_nothing(run: FlowRun) -> bool:
    state = run.state
    return state is not None and (state.type in _FAILED or state.name == SKIPPED)


def _decided_over(first: FlowRun, last: FlowRun) -> timedelta:
    assert first.state is not None and last.state is not None
    return timedelta(seconds=(last.state.timestamp - first.state.timestamp).total_seconds())


def _planned_over(first: FlowRun, last: FlowRun) -> timedelta:
    if first.expected_start_time is None or last.expected_start_time is None:
        return timedelta()
    return timedelta(seconds=(last.expected_start_time - first.expected_start_time).total_seconds())


def _last_completed(client: SyncPrefectClient, deployment: UUID) -> str:
    """The id of the last run that completed, of those that the server knows; empty without one."""
    return next((str(run.id) for run in _last_runs(client, deployment, [StateType.COMPLETED], 1)), "")


def _last_runs(
    client: SyncPrefectClient, deployment: UUID, states: Sequence[StateType] = _FINAL, most: int = _PAGE
) -> list[FlowRun]:
    """The runs in these states, those that were planned last first."""
    ended = FlowRunFilter(
        deployment_id=FlowRunFilterDeploymentId(any_=[deployment]),
        state=FlowRunFilterState(type=FlowRunFilterStateType(any_=list(states))),
    )
    return client.read_flow_runs(flow_run_filter=ended, sort=FlowRunSort.EXPECTED_START_TIME_DESC, limit=most)


def _words(run: FlowRun) -> str:
    assert run.state is not None
    return f"{run.state.name} ({run.state.message or 'no reason'})"


def _event(deployment: DeploymentResponse, name: str, message: str, since: str) -> Event:
    resource = {"prefect.resource.id": f"deepfloyd.schedule.{deployment.id}", "prefect.resource.name": name}
    return Event(
        id=uuid5(NAMESPACE_URL, f"deepfloyd stuck {deployment.id} {since}"),
        event="deepfloyd.schedule.stuck",
        resource=Resource.model_validate(resource),
        payload={"message": message},
    )
