"""`deepfloyd ui` over time, with real processes: what dies is started again, and no run keeps a state that is not true."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from polling import slowness, within
from prefect_api import OPEN, PrefectApi
from unattended import PATIENCE_S, Ui

from flows.runs.dead_runs import RUN_ID, WORKER
from flows.serving.worker import worker_name

WAITS = """
from pathlib import Path
from time import monotonic, sleep
from prefect import flow, task
from flows.deployable import deployable
from tasks.outbox import call_subflow

@task
def wait(file: str) -> None:
    until = monotonic() + 300
    while not Path(file).exists() and monotonic() < until:
        sleep(0.1)

@flow(name="part")
@deployable
def part(file: str) -> None:
    wait(file)

@flow(name="generate")  # the names of flows that are run again
@deployable
def waits(file: str = "never") -> None:
    call_subflow(part, file)

@flow(name="gc")
@deployable
def ticks() -> None:
    pass
"""
PROJECT = """
name: unattended
deployments:
  - name: person
    entrypoint: waits.py:waits
    work_pool: {name: deepfloyd}
  - name: often
    entrypoint: waits.py:ticks
    work_pool: {name: deepfloyd, work_queue_name: training}
    schedules:
      - interval: 4
        active: false
"""


@contextmanager
def _ui(project: Path, home: Path) -> Iterator[Ui]:
    (project / "waits.py").write_text(WAITS)
    (project / "prefect.yaml").write_text(PROJECT)
    ui = Ui(project, home)
    ui.start()
    try:
        yield ui
    finally:
        ui.stop(signal.SIGINT)


def _pid(api: PrefectApi, run: str) -> int:
    return int(str(api.get(f"flow_runs/{run}")["infrastructure_pid"]).rpartition(":")[2])


def _ends(api: PrefectApi, run: str) -> Callable[[], bool]:
    return lambda: api.state(run) in ("COMPLETED", "CRASHED", "CANCELLED", "FAILED")


@pytest.mark.slow
def test_a_night_of_deaths_leaves_no_run_running_and_keeps_what_the_user_has_set(
    tmp_path: Path, prefect_home: Path
) -> None:
    with _ui(tmp_path, prefect_home) as ui:
        assert _second_is_refused(ui)
        again = _killed_run_is_run_again(ui)
        _run_and_worker_killed_at_once(ui, again)
        _cancelled_run_ends_soon(ui)
        _server_killed_costs_nothing(ui)
        _ui_killed(ui)


def _second_is_refused(ui: Ui) -> bool:
    code, printed = ui.refused()
    return code == 2 and "is running already" in " ".join(printed.split())


def _begin(ui: Ui, **parameters: str) -> str:
    run = ui.api.run("generate/person", parameters)
    assert within(PATIENCE_S, lambda: ui.api.state(run) == "RUNNING", every_s=0.3), ui.printed
    assert ui.api.get(f"flow_runs/{run}")["labels"][WORKER] == worker_name(ui.home), "by this a lost run is known"
    assert psutil.Process(_pid(ui.api, run)).environ()[RUN_ID] == run
    return run


def _killed_run_is_run_again(ui: Ui) -> str:
    """Returns the second run."""
    run = _begin(ui)
    assert within(PATIENCE_S, lambda: len(ui.api.open_runs("part")) == 1, every_s=0.3)
    (part,) = ui.api.open_runs("part")
    os.kill(_pid(ui.api, run), signal.SIGKILL)
    assert within(PATIENCE_S, lambda: ui.api.state(run) == "CRASHED", every_s=0.3)
    assert within(PATIENCE_S, lambda: part not in ui.api.open_runs("part"), every_s=0.3), (
        "its worker tells of the run alone"
    )
    assert within(PATIENCE_S, lambda: bool(ui.api.tagged("again")), every_s=0.3), ui.printed
    (again,) = ui.api.tagged("again")
    assert within(PATIENCE_S, lambda: ui.api.state(again) == "RUNNING", every_s=0.3)
    return again


def _run_and_worker_killed_at_once(ui: Ui, again: str) -> None:
    ui.process_of("worker start").kill()
    os.kill(_pid(ui.api, again), signal.SIGKILL)
    assert within(PATIENCE_S, lambda: ui.api.state(again) == "CRASHED", every_s=0.3), ui.printed
    assert within(PATIENCE_S, lambda: ui.api.open_task_runs(again) == [], every_s=0.3)
    assert "the worker has ended" in ui.printed
    assert ui.api.tagged("again") == [again], "twice is enough"


def _cancelled_run_ends_soon(ui: Ui) -> None:
    run, log = _begin(ui), ui.home / "worker.log"
    before = len(log.read_text())
    ui.api.cancel(run)
    assert within(30 * slowness(), lambda: ui.api.state(run) == "CANCELLED", every_s=0.3)
    assert "Traceback" not in log.read_text()[before:]


def _server_killed_costs_nothing(ui: Ui) -> None:
    done = ui.project / "done"
    run = _begin(ui, file=str(done))
    ui.process_of("server.users").kill()
    time.sleep(1)
    done.touch()
    assert within(PATIENCE_S, _answering(lambda: ui.api.state(run) == "COMPLETED"), every_s=0.5), _told(ui, run)


def _told(ui: Ui, run: str) -> str:
    """What is known of a run that did not end as it should, each a line that pytest does not shorten."""
    state = ui.api.get(f"flow_runs/{run}")["state"]
    lines = [f"{state['type']} {state['name']}: {state['message']}", *ui.printed.splitlines()[-8:]]
    return "\n".join([*lines, *(ui.home / "worker.log").read_text().splitlines()[-200:]])


def _answering(look: Callable[[], bool]) -> Callable[[], bool]:
    def looked() -> bool:
        try:
            return look()
        except OSError:
            return False

    return looked


def _ui_killed(ui: Ui) -> None:
    """With a run under way; what the user has changed, kept over an upgrade; and nights that are missed."""
    run = _begin(ui)
    ui.api.patch("work_pools/deepfloyd", {"concurrency_limit": 7})
    ui.api.post(f"deployments/{ui.api.deployment('generate/person')['id']}/pause_deployment", {})
    often = ui.api.deployment("gc/often")
    ui.api.patch(f"deployments/{often['id']}/schedules/{often['schedules'][0]['id']}", {"active": True})
    assert within(PATIENCE_S, lambda: ui.api.count("gc", "COMPLETED") > 2, every_s=0.3), ui.printed
    ui.api.patch(f"deployments/{often['id']}", {"tags": ["mine"]})
    ui.stop(signal.SIGKILL)
    _upgrade(ui.home)
    time.sleep(22)  # five ticks are missed
    ui.start()
    assert within(PATIENCE_S, lambda: ui.api.state(run) == "CRASHED", every_s=0.3)
    assert ui.api.get("work_pools/deepfloyd")["concurrency_limit"] == 7
    assert ui.api.deployment("generate/person")["paused"] is True
    often = ui.api.deployment("gc/often")
    assert often["schedules"][0]["active"] is True and often["tags"] == ["mine"]
    assert within(PATIENCE_S, lambda: ui.api.count("gc", "CANCELLED") >= 3, every_s=0.3), ui.printed
    begun = {"flows": {"name": {"any_": ["generate"]}}, "flow_runs": {"state": {"type": {"any_": OPEN[1:]}}}}
    left = [(run["name"], run["tags"]) for run in ui.api.post("flow_runs/filter", begun) if "again" not in run["tags"]]
    assert left == [], "the run that was under way may have been begun again by now"


def _upgrade(home: Path) -> None:
    """Let the deployments be of other code, so that they are deployed again."""
    record = home / "deployed.json"
    record.write_text(record.read_text().replace('"code":"', '"code":"earlier-'))
    assert "earlier-" in record.read_text()
