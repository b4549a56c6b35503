"""A server that lives and answers nothing is killed and started again; a busy one is left alone."""

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from polling import within

from flows.serving import hung_server, server
from flows.serving.hung_server import Hearing, end_server
from tasks.health import answers


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Minutes become a second."""
    monkeypatch.setattr(hung_server, "ASK_EVERY_S", 0.05)
    monkeypatch.setattr(hung_server, "PATIENCE_S", 1.0)
    monkeypatch.setattr(hung_server, "HUNG_S", 1.5)
    monkeypatch.setattr(server, "ANSWER_S", 0.2)
    monkeypatch.setattr(server, "LOOK_EVERY_S", 0.02)


class Web:
    """A web server in a process of its own, in place of Prefect's."""

    def __init__(self) -> None:
        self.port = server.free_port()
        self.url = f"http://127.0.0.1:{self.port}/api"
        self.command = [sys.executable, "-P", "-m", "http.server", str(self.port), "--bind", "127.0.0.1"]
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> str:
        process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.processes.append(process)
        # A thread that starts one may still be here when the test is over and has killed it.
        assert within(20, lambda: process.poll() is not None or answers(self.url, 1.0), every_s=0.05)
        return self.url

    def serves(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Be the server of this home. Other homes, which this process may also keep up for other tests, keep theirs."""
        address, start, command = server.server_address, server.start_server, server._command

        def address_of(asked: Path) -> str | None:
            if asked != home:
                return address(asked)
            return self.url if self.processes[-1].poll() is None else None

        monkeypatch.setattr(server, "server_address", address_of)
        monkeypatch.setattr(server, "start_server", lambda of, *rest: self.start() if of == home else start(of, *rest))
        monkeypatch.setattr(server, "_command", lambda of, port: self.command if of == home else command(of, port))


@pytest.fixture
def web() -> Iterator[Web]:
    web = Web()
    web.start()
    yield web
    for process in web.processes:
        process.kill()
        process.wait()


def test_a_stopped_server_is_killed_and_started_again(
    web: Web, quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    web.serves(tmp_path, monkeypatch)
    with caplog.at_level(logging.WARNING), server.kept_up(tmp_path, web.url, {}):
        assert not within(2.5, lambda: len(web.processes) > 1, every_s=0.05), "it answers: 404 is an answer too"
        os.kill(web.processes[0].pid, signal.SIGSTOP)
        assert within(60, lambda: len(web.processes) > 1 and answers(web.url, 1.0), every_s=0.05)
    assert web.processes[0].poll() is not None
    said = [line for record in caplog.records if str(tmp_path) in (line := record.getMessage())]
    assert "has not answered for" in said[0] and "it was killed" in said[0] and "is restarted" in said[1]


def test_a_server_that_answers_now_and_then_is_busy_and_not_hung(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    now, replies = [0.0], iter([False] * 5 + [True] + [False] * 6)
    monkeypatch.setattr("flows.serving.hung_server.time.monotonic", lambda: now[0])
    hearing, found = Hearing("http://127.0.0.1:1/api", lambda url, patience_s: next(replies)), list[bool]()
    hearing.begin()
    for _ in range(12):
        now[0] += 0.29
        found.append(hearing.is_hung())
    assert found == [False] * 11 + [True], "the answer in between begins the time anew"


def test_only_the_process_of_the_very_command_is_ended(web: Web) -> None:
    assert not end_server([*web.command, "more"]) and psutil.pid_exists(web.processes[0].pid)
    assert end_server(["/another/python", *web.command[1:]])
    assert web.processes[0].poll() is not None
