"""The Prefect server of a run: shared by all runs with one home, gone with the last, never one that nobody asked for."""

import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import ClassVar

import pytest

from deepfloyd_core.errors import ConfigError
from flows.api import check_api, healthy
from flows.proxies import without_loopback

HOLD = """
import sys
from pathlib import Path
from typing import ClassVar
from flows.server import prefect_server
with prefect_server(Path(sys.argv[1])) as url:
    print(url, flush=True)
    sys.stdin.readline()
"""


def _hold(home: Path, *kept: str) -> "subprocess.Popen[str]":
    """kept: settings of Prefect's that it takes from this environment."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("PREFECT_") or key in kept}
    return subprocess.Popen(
        [sys.executable, "-P", "-c", HOLD, str(home)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
    )


def _url(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.parametrize(
    ("given", "merged"),
    [
        ({}, "127.0.0.1,localhost,::1"),
        ({"NO_PROXY": "a.lan, .corp"}, "a.lan,.corp,127.0.0.1,localhost,::1"),
        ({"no_proxy": "a.lan,localhost", "NO_PROXY": "b.lan"}, "a.lan,localhost,b.lan,127.0.0.1,::1"),
        ({"no_proxy": "", "http_proxy": "http://proxy:3128"}, "127.0.0.1,localhost,::1"),
        ({"NO_PROXY": "*"}, "*"),
    ],
)
def test_loopback_joins_the_hosts_that_go_past_the_proxy(given: dict[str, str], merged: str) -> None:
    assert without_loopback(given) == {"no_proxy": merged, "NO_PROXY": merged}


PROXIES = ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")


class _Answers(http.server.BaseHTTPRequestHandler):
    """A server with one answer, a status and a body, for each path."""

    answers: ClassVar[dict[str, tuple[int, bytes]]] = {}

    def do_GET(self) -> None:
        status, body = self.answers.get(self.path, (404, b"{}"))
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


HEALTH = {"/api/health": (200, b"true")}  # what Prefect's answers, also without authentication


@pytest.mark.parametrize(
    ("answers", "named", "said"),
    [
        (HEALTH | {"/api/admin/version": (401, b"{}")}, "/api", "asks for authentication. Set PREFECT_API_AUTH_STRING"),
        (HEALTH | {"/api/admin/version": (200, b'"2.20.16"')}, "/api", "is Prefect 2.20.16, which Prefect 3."),
        (HEALTH | {"/api/admin/version": (200, b"<p>")}, "/api", "tells no version"),
        (HEALTH | {"/api/admin/version": (500, b"{}")}, "/api", "answers 500 when asked for its version"),
        (HEALTH, "", "no Prefect API. Set it to http://127.0.0.1:{port}/api"),
        (HEALTH, "/runs/", "no Prefect API. Set it to http://127.0.0.1:{port}/api"),
        ({"/health": (200, b"<html>")}, "", "no Prefect API. Correct it, or unset it."),
    ],
)
def test_what_no_flow_can_use_is_one_sentence(answers: dict[str, tuple[int, bytes]], named: str, said: str) -> None:
    handler = type("Handler", (_Answers,), {"answers": answers})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        refusal = _refusal(f"http://127.0.0.1:{listening.server_port}{named}")
        listening.shutdown()
    assert said.format(port=listening.server_port) in refusal and "\n" not in refusal


@pytest.mark.parametrize(
    "url", ["127.0.0.1:4200/api", "http://127.0.0.1:x/api", "http:///api", "http://a:b@localhost/api"]
)
def test_an_address_that_is_none_is_one_sentence(url: str) -> None:
    refusal = _refusal(url)
    assert refusal.startswith("PREFECT_API_URL is ") and "\n" not in refusal
    assert "a:b" not in refusal


def _refusal(url: str) -> str:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with temporary_settings({PREFECT_API_URL: url}), pytest.raises(ConfigError) as caught:
        check_api(url)
    return str(caught.value)


@pytest.mark.slow
def test_a_server_that_asks_for_a_password_lets_in_who_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_SERVER_API_AUTH_STRING", "me:secret")
    for given, code in ((None, 1), ("me:wrong", 1), ("me:secret", 0)):
        if given:
            monkeypatch.setenv("PREFECT_API_AUTH_STRING", given)
        held = _hold(tmp_path, "PREFECT_SERVER_API_AUTH_STRING", "PREFECT_API_AUTH_STRING")
        held.communicate("\n", timeout=120)
        assert held.returncode == code, given


@pytest.mark.slow
def test_a_server_starts_where_the_environment_names_a_proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PROXIES:
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    held = _hold(tmp_path)
    assert healthy(_url(held))
    held.communicate("\n", timeout=60)


@pytest.mark.slow
def test_runs_share_a_server_and_the_last_one_stops_it(tmp_path: Path) -> None:
    first, second = _hold(tmp_path), _hold(tmp_path)
    url = _url(first)
    assert url and _url(second) == url
    first.communicate("\n", timeout=60)
    assert healthy(url)  # the second still uses it
    second.communicate("\n", timeout=60)
    assert not healthy(url)
    assert not (tmp_path / "server.json").exists()


@pytest.mark.slow
def test_a_killed_run_counts_itself_out(tmp_path: Path) -> None:
    first = _hold(tmp_path)
    url = _url(first)
    first.send_signal(signal.SIGKILL)
    first.wait()
    second = _hold(tmp_path)
    assert _url(second) == url  # the server outlived its run and is joined
    second.communicate("\n", timeout=60)
    deadline = time.monotonic() + 30
    while healthy(url) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not healthy(url)


@pytest.mark.slow
def test_the_server_listens_on_loopback_only(tmp_path: Path) -> None:
    held = _hold(tmp_path)
    url = _url(held)
    pid = json.loads((tmp_path / "server.json").read_text())["pid"]
    port = int(url.split(":")[2].split("/")[0])
    lines = [line.split() for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]]
    listening = {line[1].split(":")[0] for line in lines if line[3] == "0A" and line[1].endswith(f":{port:04X}")}
    held.communicate("\n", timeout=60)
    assert listening == {"0100007F"}
