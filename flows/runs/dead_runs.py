"""Gives each flow run whose process has ended its true state, and runs those of deployments once more.

Prefect leaves a run "Running" for ever when its process and its worker were killed, or when it ended while the server
was away; a run that a worker began while the server was away is "Crashed" before its first line. Finished work of all
of them is kept, so a second run goes on where the first one ended. The first run gets the tag REPLACED, the second one
AGAIN; it is not run a third time.
"""

from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import psutil
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterExpectedStartTime,
    FlowRunFilterId,
    FlowRunFilterParentFlowRunId,
    FlowRunFilterState,
    FlowRunFilterStateType,
    TaskRunFilter,
    TaskRunFilterState,
    TaskRunFilterStateType,
    WorkPoolFilter,
    WorkPoolFilterName,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.exceptions import ObjectNotFound, PrefectException
from prefect.settings import PREFECT_HOME
from prefect.states import Cancelled, Crashed

from deepfloyd_core.store.counts import many
from flows.runs.run_lease import SKIPPED, free_lease, has_lease, lease_of, leases
from tasks.health import asked_once

REPLACED, AGAIN = "replaced", "again"
WORKER = "prefect.worker.name"  # the label that a worker gives to a run before it starts the process
RUN_ID = "PREFECT__FLOW_RUN_ID"  # in the environment of that process
# Flows that a second run of does no harm. A rollback of a rollback does: so decisions are not repeated.
REPEATED = ("finetune", "retrain", "prepare", "embed", "train-stage1", "train-stage2", "generate", "gc", "history")
LONGEST_REASON = 300  # characters
RECENT_S = 86_400.0  # how long ago a run may have crashed that is run again though it never had a lease
DEAD = "Its process was killed, or could not tell the server how it ended. Finished work is kept."
CANCELLED = "Its process has ended. Finished work is kept."
MISSED = "No worker was free at this time; the run of a later time covers it."
OVERTAKEN = "Another run of this deployment was under way at this time."
CANCELS_S = 30.0  # how long a worker may take to cancel a run, and to tell the server
BEGINS_S = 120.0  # how long a run may take from its worker's decision to its first line, on a busy machine
LATE_S = 15.0  # of a scheduled run that no worker has taken
PAST = timedelta(days=7)  # how far back runs are looked for that died before their first line
PAGE = 200  # runs of one request
_OPEN = [StateType.PENDING, StateType.RUNNING, StateType.CANCELLING]


def settle_here() -> list[str]:
    """Settle the ended runs of this machine, and run none of them again. Returns a line for each that was dead.

    A server that does not answer is no error: the next command settles them.
    """
    with asked_once(), get_client(sync_client=True) as client:
        try:
            return settle_ended(client, Path(PREFECT_HOME.value()), again=False)
        except (httpx.HTTPError, PrefectException):
            return []


def settle_ended(client: SyncPrefectClient, home: Path, *, again: bool) -> list[str]:
    """Settle the runs whose processes have ended, by their leases. Returns a line for each that was dead.

    again: also run those of deployments once more; otherwise their leases stay, for the next call that may.
    """
    dead, told = list[FlowRun](), list[str]()
    for path in leases(home):
        with free_lease(path) as run_id:
            run = run_id and _read(client, run_id)
            if run and run.state and not run.state.is_final():
                if run.state.is_cancelling() and _age_s(run.state) < CANCELS_S:
                    continue
                told.append(_bury(client, run))
                run = _read(client, run.id)
            elif (
                run and run.state and not run.state.is_completed()
            ):  # its worker has told its end, and not that of its parts
                _bury_parts(client, run)
            if again and run and _was_repeated(run):
                told.append(f"{run.name} was run again already: start it yourself, and it goes on where it was")
            if run and _deserves_another(client, run):
                if not again:
                    continue
                dead.append(run)
            elif run_id:
                path.unlink(missing_ok=True)
    told += run_again(client, dead)
    for run in dead:
        lease_of(home, run.id).unlink(missing_ok=True)
    return told


def settle_lost(
    client: SyncPrefectClient,
    home: Path,
    pool: str,
    worker: str,
    own: bool,
    settled: set[UUID] | None = None,
    worker_since: datetime | None = None,
) -> list[str]:
    """Settle the runs of a pool that died before they had a lease, and run them again.

    worker: the name of this home's; of runs that another one has begun no process can be seen here, and they are left alone
    until they have crashed. own: the server is this home's, so that those which no worker has begun, and those which have
    crashed, are looked after here. settled: the crashed runs that an earlier call has settled, to which this one adds its
    own: each costs two requests. worker_since: when this home's worker was started; what one before it has begun, and no
    process here was started for, will not begin. Returns a line for each. A run whose process lives is left alone, and one
    that may just be beginning.
    """
    lost, told, settled = list[FlowRun](), list[str](), set() if settled is None else settled
    runs = _runs(client, pool, [*_OPEN, StateType.CRASHED])
    settled &= {run.id for run in runs}
    for run in runs:
        state, begun_by = run.state, run.labels.get(WORKER)
        if state is None or run.id in settled or has_lease(home, run.id):
            continue
        if state.is_crashed():
            lost += [run] if (own or begun_by == worker) and _age_s(state) < RECENT_S else []
        elif (begun_by == worker or (own and begun_by is None)) and not _is_alive(run):
            # The times of another machine's server are by another clock.
            is_orphan = own and begun_by == worker and worker_since is not None and state.timestamp < worker_since
            if _age_s(state) < BEGINS_S and not (is_orphan and not _has_process(run)):
                continue
            told.append(_bury(client, run))
            lost.append(run)
    told += run_again(client, [run for run in lost if _deserves_another(client, _read(client, run.id) or run)])
    settled |= {run.id for run in lost}
    return told


def run_again(client: SyncPrefectClient, dead: Iterable[FlowRun]) -> list[str]:
    """Run the newest of the dead runs with the same deployment and parameters again. Returns a line for each."""
    dead, told = list(dead), list[str]()
    newest = {(run.deployment_id, repr(sorted(run.parameters.items()))): run for run in dead}
    for run in newest.values():
        assert run.deployment_id is not None
        try:
            second = client.create_flow_run_from_deployment(
                run.deployment_id,
                parameters=run.parameters,
                tags=[*run.tags, AGAIN],
                idempotency_key=f"{AGAIN}-{run.id}",
                work_queue_name=run.work_queue_name,
                job_variables=run.job_variables,
            )
        except ObjectNotFound:  # its deployment was removed
            continue
        except httpx.HTTPStatusError as error:
            if error.response.status_code >= 500:
                raise
            told.append(f"{run.name} cannot be run again: {error.response.text[:LONGEST_REASON]}")
            continue
        told.append(f"{run.name} is run again as {second.name}")
    for run in dead:
        client.update_flow_run(run.id, tags=[*run.tags, REPLACED])
    return told


def skip_missed(client: SyncPrefectClient, pool: str) -> list[str]:
    """Cancel scheduled runs that are late, except the newest of each deployment if none of it is running or beginning.

    So a worker that was away for six nights starts one run, and a run that is longer than its interval is followed by
    the next one on time. Runs that a person started all stay. Returns a line for each deployment.
    """
    busy = {run.deployment_id for run in _runs(client, pool, _OPEN)}
    late: dict[UUID | None, list[FlowRun]] = {}
    before = datetime.now(UTC) - timedelta(seconds=LATE_S)
    for run in _runs(client, pool, [StateType.SCHEDULED], before):
        if run.auto_scheduled:
            late.setdefault(run.deployment_id, []).append(run)
    told = []
    for deployment_id, runs in late.items():
        missed, why = (runs, OVERTAKEN) if deployment_id in busy else (runs[:-1], MISSED)
        for run in missed:
            client.set_flow_run_state(run.id, Cancelled(name=SKIPPED, message=why), force=True)
        if missed:
            names = ", ".join(run.name for run in missed[:3]) + (" ..." if len(missed) > 3 else "")
            told.append(f"{many(len(missed), 'late run is', 'late runs are')} skipped: {names}")
    return told


def _age_s(state: "State[Any]") -> float:
    return (datetime.now(UTC) - state.timestamp).total_seconds()


def _read(client: SyncPrefectClient, run_id: UUID) -> FlowRun | None:
    try:
        return client.read_flow_run(run_id)
    except ObjectNotFound:  # of another server, or removed
        return None


def _runs(
    client: SyncPrefectClient, pool: str, states: list[StateType], before: datetime | None = None
) -> list[FlowRun]:
    """The runs of a pool in these states, by the time for which they were planned."""
    times = FlowRunFilterExpectedStartTime.model_validate({"after_": datetime.now(UTC) - PAST, "before_": before})
    wanted = FlowRunFilter(
        state=FlowRunFilterState(type=FlowRunFilterStateType(any_=states)), expected_start_time=times
    )
    found: list[FlowRun] = []
    while page := client.read_flow_runs(
        flow_run_filter=wanted,
        work_pool_filter=WorkPoolFilter(name=WorkPoolFilterName(any_=[pool])),
        sort=FlowRunSort.EXPECTED_START_TIME_ASC,
        limit=PAGE,
        offset=len(found),
    ):
        found += page
    return found


def _deserves_another(client: SyncPrefectClient, run: FlowRun) -> bool:
    crashed = run.state is not None and run.state.is_crashed()
    if not crashed or run.deployment_id is None or {AGAIN, REPLACED} & set(run.tags):
        return False
    return client.read_flow(run.flow_id).name in REPEATED


def _was_repeated(run: FlowRun) -> bool:
    return run.state is not None and run.state.is_crashed() and run.deployment_id is not None and AGAIN in run.tags


def _bury(client: SyncPrefectClient, run: FlowRun) -> str:
    """Give a dead run, and its parts, their last state."""
    assert run.state is not None
    before = run.state.name
    state: State[None] = Cancelled(message=CANCELLED) if run.state.is_cancelling() else Crashed(message=DEAD)
    client.set_flow_run_state(run.id, state, force=True)
    _bury_parts(client, run)
    return f"the run {run.name} was {before}, and is {state.name}: {state.message}"


def _bury_parts(client: SyncPrefectClient, run: FlowRun) -> None:
    """Give the subflows and tasks of a run that is over, and that had not ended, their last state."""
    parts = FlowRunFilter(
        parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=[run.id]),
        state=FlowRunFilterState(type=FlowRunFilterStateType(any_=_OPEN)),
    )
    for part in client.read_flow_runs(flow_run_filter=parts):
        _bury(client, part)
    tasks = client.read_task_runs(
        flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run.id])),
        task_run_filter=TaskRunFilter(state=TaskRunFilterState(type=TaskRunFilterStateType(any_=_OPEN))),
    )
    for task in tasks:
        client.set_task_run_state(task.id, Crashed(message=DEAD), force=True)


def _has_process(run: FlowRun) -> bool:
    """Whether any process of this machine was started for a run: its worker may have ended before it told the server."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(RUN_ID) == str(run.id):
                return True
    return False


def _is_alive(run: FlowRun) -> bool:
    """Whether the process of a run of this home's worker lives.

    Its environment names the run: in a container that was started again another process has its number, as a rule.
    """
    pid = run.infrastructure_pid or ""
    try:
        return pid.isdecimal() and psutil.Process(int(pid)).environ().get(RUN_ID) == str(run.id)
    except psutil.Error:  # it has ended, or is another user's
        return False
