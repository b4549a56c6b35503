"""What is shown in Prefect: never a reason to wait or to fail, and complete when a server that was away is back."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from importlib import import_module, metadata
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import cloudpickle
import httpx
import pytest
from polling import within
from prefect import Flow
from prefect_api import post
from small_run import SmallRun

from deepfloyd_core.errors import DataError, JobError
from flows.serving.server import free_port
from tasks import conditioning, outbox, stage_pixels
from tasks.health import healthy

ROOT = Path(__file__).parents[2]
DEAD = "http://127.0.0.1:9/api"


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether the server of this test answers: what is last in here."""
    now = [False]
    monkeypatch.setattr(outbox, "healthy", lambda url: now[-1])
    monkeypatch.setattr(outbox, "ASK_EVERY_S", 0.02)
    monkeypatch.setattr(outbox, "emit_event", lambda *_: None)
    return now


def _asks(now: list[bool], done: list[str]) -> Callable[[str], None]:
    def request(name: str) -> None:
        if not now[-1]:
            raise httpx.ConnectError("All connection attempts failed")
        done.append(name)

    return request


def test_what_is_shown_waits_for_the_server_in_order_and_progress_as_its_newest(answers: list[bool]) -> None:
    box, done = outbox.Outbox(), list[str]()
    request = _asks(answers, done)
    _put(box, request, "first")
    _until_away(box)
    _put(box, request, "progress 1", slot="bar")
    _put(box, request, "table")
    for number in range(2, 500):
        _put(box, request, f"progress {number}", slot="bar")
    _put(box, request, "sheet")
    assert not box.deliver(0.1) and done == []
    answers.append(True)
    assert box.deliver(5.0)
    assert done == ["first", "progress 499", "table", "sheet"]


def test_a_server_that_is_back_gets_an_event_with_which_prefect_sends_those_that_it_kept(
    answers: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    events, done = list[str](), list[str]()
    monkeypatch.setattr(outbox, "emit_event", lambda name, _: events.append(name))
    box = outbox.Outbox()
    _put(box, _asks(answers, done), "table")
    _until_away(box)
    assert events == []
    answers.append(True)
    assert box.deliver(5.0) and done == ["table"] and events == ["deepfloyd.server-back"]


def test_what_the_server_refuses_is_said_once_and_holds_nothing_up(
    answers: list[bool], caplog: pytest.LogCaptureFixture
) -> None:
    answers.append(True)
    box, done = outbox.Outbox(), list[str]()

    def refused(status: int) -> None:
        answer = httpx.Response(status, request=httpx.Request("POST", DEAD))
        raise httpx.HTTPStatusError(f"{status} of the server", request=answer.request, response=answer)

    for status in (422, 422, 500):
        _put(box, refused, status)
    _put(box, lambda text: json.loads(text), "no json")
    _put(box, _asks(answers, done), "table")
    assert box.deliver(5.0) and done == ["table"]
    assert [record.getMessage().split(": ")[1] for record in caplog.records] == [
        "HTTPStatusError", "HTTPStatusError", "JSONDecodeError",
    ]  # fmt: skip


def test_threads_that_are_the_first_to_show_something_share_an_outbox(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(outbox.Outbox):
        def __init__(self) -> None:
            time.sleep(0.05)
            super().__init__()

    monkeypatch.setattr(outbox, "Outbox", Slow)
    with ThreadPoolExecutor(8) as pool:
        boxes = list(pool.map(outbox.process_outbox, [-1] * 8))
    assert len({id(box) for box in boxes}) == 1


def test_records_of_a_worker_elsewhere_go_to_the_server_that_its_task_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its environment names none; Prefect hands a task its flow's settings in its context."""
    from prefect.settings import PREFECT_API_URL, temporary_settings

    seen: list[str] = []
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setattr(outbox, "send_lines", lambda lines: seen.append(str(PREFECT_API_URL.value())))
    box = outbox.Outbox()
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:4321/api"}):
        box.put_line({"message": "a line"})
    assert box.empty(5.0) and seen == ["http://127.0.0.1:4321/api"]


def test_where_no_server_is_named_none_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    from prefect.server.api import server
    from prefect.settings import PREFECT_API_URL, temporary_settings

    started: list[str] = []
    monkeypatch.setattr(server.SubprocessASGIServer, "start", lambda *_, **__: started.append("a server"))
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    box = outbox.Outbox()
    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        box.put_line({"message": "a line"})
        assert box.empty(5.0) and not healthy("None")
    assert started == []


@pytest.fixture
def box(answers: list[bool], monkeypatch: pytest.MonkeyPatch) -> outbox.Outbox:
    """The process's own in this test, with the patience that its promises are of."""
    made = outbox.Outbox()
    monkeypatch.setattr(outbox, "process_outbox", lambda _: made)
    monkeypatch.setattr(outbox, "PATIENCE_S", 60.0)
    monkeypatch.setattr(outbox, "IN_A_HURRY_S", 0.1)
    return made


def test_a_run_that_fails_while_the_server_is_away_tells_why_at_once(
    box: outbox.Outbox, caplog: pytest.LogCaptureFixture
) -> None:
    @outbox.server_awaited
    def subflow() -> None:
        raise DataError("No picture is left.")

    @outbox.server_awaited
    def whole() -> None:
        subflow()

    begun = time.monotonic()
    with pytest.raises(DataError):
        whole()
    assert time.monotonic() - begun < outbox.PATIENCE_S / 2
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == ["No picture is left."]


def test_a_run_that_fails_while_the_server_answers_tells_why_once_at_its_end(
    answers: list[bool], box: outbox.Outbox, caplog: pytest.LogCaptureFixture
) -> None:
    @outbox.server_awaited
    def whole() -> None:
        raise DataError("No picture is left.")

    answers.append(True)
    with pytest.raises(DataError):
        whole()
    assert not caplog.records


def test_a_subflow_that_began_when_the_server_went_away_is_called_again(monkeypatch: pytest.MonkeyPatch) -> None:
    waited, called = list[bool](), list[int]()
    monkeypatch.setattr(outbox, "await_server", lambda: waited.append(True))

    def part(number: int, error: type[httpx.TransportError]) -> int:
        called.append(number)
        if len(called) == 1:
            raise error("gone")
        return number

    assert outbox.call_subflow(part, 3, error=httpx.ConnectError) == 3
    assert (called, waited) == ([3, 3], [True, True])
    called.clear()
    with pytest.raises(httpx.ReadError):  # Prefect has tried that again itself
        outbox.call_subflow(part, 4, error=httpx.ReadError)
    assert called == [4]
    called.clear()
    with pytest.raises(httpx.ConnectError):  # it has begun
        outbox.call_subflow(outbox.server_awaited(part), 5, error=httpx.ConnectError)
    assert called == [5]


def test_a_server_that_stays_away_is_waited_for_once(box: outbox.Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not again by each flow around the one that waited."""

    @outbox.server_awaited
    def whole() -> None:
        outbox.server_awaited(outbox.await_server)()

    monkeypatch.setattr(outbox, "PATIENCE_S", 3.0)
    monkeypatch.setattr(outbox, "IN_A_HURRY_S", 3.0)
    begun = time.monotonic()
    with pytest.raises(JobError, match="has not answered for"):
        whole()
    assert time.monotonic() - begun < 2 * outbox.PATIENCE_S


def test_every_flow_has_the_packages_version_and_waits_for_the_server() -> None:
    """Prefect's default would be the hash of the file that holds the waiting, for all of them."""
    modules = [import_module(f"{package}.{file.stem}") for package in ("flows", "tasks")
               for file in sorted(Path(ROOT, package).glob("*.py")) if "@flow(" in file.read_text()]  # fmt: skip
    flows = {each.name: each for module in modules for each in vars(module).values() if isinstance(each, Flow)}
    assert len(flows) >= 13
    for name, each in flows.items():
        assert each.version == metadata.version("deepfloyd-pipeline"), name
        assert hasattr(each.fn, "__wrapped__"), name


def test_subflows_can_be_sent_to_workers() -> None:
    """Prefect pickles the flow along with each task of it, for processes, Ray and Dask."""
    for module in (stage_pixels, conditioning):
        (subflow,) = (each for each in vars(module).values() if isinstance(each, Flow))
        assert cloudpickle.loads(cloudpickle.dumps(subflow)).name == subflow.name


def _until_away(box: outbox.Outbox) -> None:
    assert within(120, lambda: box.away)


def _put(box: outbox.Outbox, function: Callable[..., None], argument: object, slot: str | None = None) -> None:
    box.put(outbox.Call(lambda: function(argument), copy_context(), slot))


@contextmanager
def _server(home: Path, port: int) -> Iterator["subprocess.Popen[bytes]"]:
    env = {key: value for key, value in os.environ.items() if not key.startswith("PREFECT_")}
    command = [sys.executable, "-P", "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with (home / "server.log").open("ab") as log:
        server = subprocess.Popen(
            command, env=env | {"PREFECT_HOME": str(home)}, stdout=log, stderr=log, start_new_session=True
        )
    try:
        while not healthy(f"http://127.0.0.1:{port}/api"):
            assert server.poll() is None, (home / "server.log").read_text()
            time.sleep(0.1)
        yield server
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


@pytest.mark.slow
def test_a_training_outlives_its_server_and_is_shown_by_the_next(
    small_run: SmallRun, tmp_path: Path, prefect_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port, log = free_port(), tmp_path / "run.log"
    url = f"http://127.0.0.1:{port}/api"
    monkeypatch.setenv("PREFECT_API_URL", url)
    monkeypatch.setenv("PREFECT_CLIENT_MAX_RETRIES", "1")  # Prefect's own patience: some seconds instead of a minute
    with _server(prefect_home, port):
        run = small_run.start_here(log, "train-stage1", str(small_run.config))
        _until(run, log, lambda: any(small_run.workspace.glob("stage1_lora/*/.checkpoints/*/checkpoint.json")))
    _until(run, log, lambda: any(small_run.workspace.glob("stage1_lora/*/manifest.json")))
    time.sleep(8)  # in which Prefect would give up
    assert run.is_alive(), log.read_text()
    with _server(prefect_home, port):
        run.join(300)
        assert run.exitcode == 0, log.read_text()
        (flow_run,) = _found(url, "flow_runs", {"flow_runs": {"name": {"any_": _names(url)}}})
        assert flow_run["state_type"] == "COMPLETED"
        of_run = {"flow_runs": {"id": {"any_": [flow_run["id"]]}}}
        tasks = {entry["name"].rsplit("-", 1)[0]: entry["state_type"] for entry in _found(url, "task_runs", of_run)}
        assert set(tasks.values()) == {"COMPLETED"} and "stage1_lora" in tasks
        shown = _found(url, "artifacts", of_run)
        (page,) = [entry["data"] for entry in shown if entry["key"] == "stage1-lora-workspace"]
        assert "Held\\-out loss by timestep" in page and "Sizes that batches were made of" in page
        bars = {entry["description"].split(":")[0]: entry["data"] for entry in shown if entry["type"] == "progress"}
        assert bars["stage I LoRA"] == 100
        logs = {"logs": {"flow_run_id": {"any_": [flow_run["id"]]}}}
        lines = [entry["message"] for entry in _found(url, "logs", logs)]
        # The subflow's own stands in its own log.
        assert lines.count("Finished in state Completed()") == len(tasks)
    printed = log.read_text()
    away, back = printed.count("does not answer"), printed.count("answers again")
    assert away == back >= 1  # on a busy machine a single question can time out as well
    assert "Traceback" not in printed and "ERROR" not in printed


def _until(run: BaseProcess, log: Path, reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not reached():
        assert run.is_alive() and time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


def _names(url: str) -> list[str]:
    return [entry["name"] for entry in _found(url, "flow_runs", {}) if entry["parent_task_run_id"] is None]


def _found(url: str, kind: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    return list(post(url, f"{kind}/filter", {"limit": 200, **body}))
