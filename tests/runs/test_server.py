"""The Prefect server of a run: shared by all runs with one home, gone with the last, never one that nobody asked for."""

import errno
import fcntl
import http.server
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib import metadata
from pathlib import Path
from typing import ClassVar

import httpx
import psutil
import pytest
from polling import within
from prefect_api import post
from small_disk import PAGE, small_disk

from deepfloyd_core.errors import ConfigError, DataError, JobError, StorageError
from flows.serving import server
from flows.serving.api import check_api, check_guarded, server_needed
from flows.serving.home import password
from flows.serving.proxies import NAMES, loopback_is_proxied, past_proxy, without_loopback
from flows.serving.ui import serve_ui
from tasks.health import healthy
from tasks.terminal import console

PATIENCE_S = 120.0  # a hang, not a measure of speed: the machine may be busy with other tests

HOLD = """
import sys
from pathlib import Path
from flows.serving.server import prefect_server
with prefect_server(Path(sys.argv[1])) as url:
    print(url, flush=True)
    sys.stdin.readline()
"""


def _hold(home: Path) -> "subprocess.Popen[str]":
    env = {key: value for key, value in os.environ.items() if not key.startswith("PREFECT_")}
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


@pytest.mark.parametrize(
    ("environ", "proxied"),
    [
        ({}, False),
        ({"http_proxy": "http://127.0.0.1:9"}, True),
        ({"ALL_PROXY": "http://proxy:3128", "no_proxy": "a.lan"}, True),
        ({"https_proxy": "http://proxy:3128"}, False),
        ({"http_proxy": "http://proxy:3128", "no_proxy": "a.lan,127.0.0.1"}, False),
        ({"http_proxy": "http://proxy:3128", "no_proxy": "*"}, False),
    ],
)
def test_whether_a_user_s_own_command_would_send_loopback_to_a_proxy(
    monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], proxied: bool
) -> None:
    for name in (*PROXIES, "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert loopback_is_proxied() == proxied
    for written in past_proxy().split():
        monkeypatch.setenv(*written.split("="))
    assert not loopback_is_proxied(), "with what the command begins with"


PROXIES = ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")


def test_neither_a_command_nor_what_it_starts_reaches_loopback_through_a_proxy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in PROXIES:
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # where nobody listens
    for name in NAMES:
        monkeypatch.setenv(name, "a.lan")
    ask = "import sys, urllib.request as web; print(web.urlopen(sys.argv[1] + '/health', timeout=30).status)"
    with _listening(ANSWERS) as port:
        url = f"http://127.0.0.1:{port}/api"
        monkeypatch.setenv("PREFECT_API_URL", url)
        assert healthy(url), "also where `no_proxy` does not say so"
        with server.prefect_server(tmp_path):
            assert httpx.get(f"{url}/health").status_code == 200
            assert subprocess.check_output([sys.executable, "-c", ask, url], text=True) == "200\n"


class _Answers(http.server.BaseHTTPRequestHandler):
    """A server with one answer, a status and a body, for each path."""

    answers: ClassVar[dict[str, tuple[int, bytes]]] = {}
    login: ClassVar[str] = ""  # wanted for every path, as by a proxy before the server

    def do_GET(self) -> None:
        self.answer(*self.answers.get(self.path, (404, b"{}")), self.login)

    def do_POST(self) -> None:
        self.answer(*self.answers.get(self.path, (500, b"{}")), "")

    def answer(self, status: int, body: bytes, login: str) -> None:
        if login and self.headers["Authorization"] != f"Basic {b64encode(login.encode()).decode()}":
            status = 401
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@contextmanager
def _listening(
    answers: dict[str, tuple[int, bytes]], login: str = "", certificate: Path | None = None, host: str = "127.0.0.1"
) -> Iterator[int]:
    """The port of such a server. certificate: with its key, in one file."""
    handler = type("Handler", (_Answers,), {"answers": answers, "login": login})
    with http.server.ThreadingHTTPServer((host, 0), handler) as listening:
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            listening.socket = context.wrap_socket(listening.socket, server_side=True)
        threading.Thread(target=listening.serve_forever, args=(0.05,), daemon=True).start()
        try:
            yield listening.server_port
        finally:
            listening.shutdown()


DEAD = "http://127.0.0.1:9/api"
VERSION = json.dumps(metadata.version("prefect")).encode()
HEALTH = {"/api/health": (200, b"true")}  # what Prefect's answers, also without authentication
ANSWERS = HEALTH | {"/api/admin/version": (200, VERSION)}
ELSEWHERE = "127.0.0.2"  # a host like any other to the product; Linux answers under it without being asked
ELSEWHERE_ONLY = pytest.mark.skipif(sys.platform != "linux", reason="127.0.0.2 is Linux's alone")


@pytest.mark.parametrize(
    ("answers", "named", "said"),
    [
        (HEALTH | {"/api/admin/version": (401, b"{}")}, "/api", "requires authentication. Set PREFECT_API_AUTH_STRING"),
        (HEALTH | {"/api/admin/version": (200, b'"2.20.16"')}, "/api", "is Prefect 2.20.16, which Prefect 3."),
        (HEALTH | {"/api/admin/version": (200, b"<p>")}, "/api", "has no version"),
        (HEALTH | {"/api/admin/version": (500, b"{}")}, "/api", "answers 500 when asked for its version"),
        (HEALTH, "", "no Prefect API. Set it to http://127.0.0.1:{port}/api"),
        (HEALTH, "/runs/", "no Prefect API. Set it to http://127.0.0.1:{port}/api"),
        ({"/health": (200, b"<html>")}, "", "no Prefect API. Correct it, or unset it."),
    ],
)
def test_what_no_flow_can_use_is_one_sentence(answers: dict[str, tuple[int, bytes]], named: str, said: str) -> None:
    from prefect.settings import PREFECT_API_AUTH_STRING, temporary_settings

    # Other tests have the password of the server that they share.
    with _listening(answers) as port, temporary_settings({PREFECT_API_AUTH_STRING: None}):
        refusal = _refusal(f"http://127.0.0.1:{port}{named}")
    assert said.format(port=port) in refusal and "\n" not in refusal


@pytest.mark.parametrize(
    ("given", "said"),
    [(None, "requires authentication"), ("me:wrong", "refuses the user and password"), ("me:secret", None)],
)
@pytest.mark.parametrize("host", ["127.0.0.1", pytest.param(ELSEWHERE, marks=ELSEWHERE_ONLY)])
def test_a_server_behind_a_login_is_asked_with_it(host: str, given: str | None, said: str | None) -> None:
    from prefect.settings import PREFECT_API_AUTH_STRING, temporary_settings

    with _listening(ANSWERS, login="me:secret", host=host) as port:
        url = f"http://{host}:{port}/api"
        with temporary_settings({PREFECT_API_AUTH_STRING: given}):
            if said:
                assert said in _refusal(url) and not healthy(url)
            else:
                _accepted(url)


def test_the_home_s_own_server_needs_no_password_where_the_environment_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PREFECT_API_AUTH_STRING", raising=False)
    monkeypatch.setattr(server, "STOP_TIMEOUT_S", 0.0)
    login = password(tmp_path)
    with _listening(ANSWERS, login=login) as port, (tmp_path / "server.json").open("w") as record:
        url = f"http://127.0.0.1:{port}/api"
        json.dump({"url": url}, record)
        record.flush()
        fcntl.flock(record, fcntl.LOCK_EX)  # as a living server
        monkeypatch.setenv("PREFECT_API_URL", url)
        monkeypatch.setattr(server, "healthy", lambda _: True)
        with server.prefect_server(tmp_path) as joined:
            assert (joined, os.environ["PREFECT_API_AUTH_STRING"]) == (url, login)
    assert os.environ["PREFECT_API_URL"] == url and "PREFECT_API_AUTH_STRING" not in os.environ


def test_a_server_whose_password_was_removed_while_it_ran_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect.settings import get_current_settings

    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    with _listening(ANSWERS, login="deepfloyd:removed") as port:
        monkeypatch.setattr(server, "join_server", lambda *_: f"http://127.0.0.1:{port}/api")
        refused = pytest.raises(ConfigError, match=r"another password than that in .*auth, .* Stop all commands")
        with refused as caught, server.prefect_server(tmp_path):
            pass
    assert "removed since" in str(caught.value) and "deepfloyd:" not in str(caught.value)
    assert get_current_settings().api.url is None, "what Prefect has read in the block does not outlive it"


@ELSEWHERE_ONLY
def test_no_worker_is_started_for_a_server_elsewhere_that_lets_anybody_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "home"))
    with _listening(ANSWERS, host=ELSEWHERE) as port:
        url = f"http://{ELSEWHERE}:{port}/api"
        monkeypatch.setenv("PREFECT_API_URL", url)
        settings = temporary_settings({PREFECT_API_URL: url, PREFECT_API_AUTH_STRING: "me:secret"})
        refused = pytest.raises(ConfigError, match=r"requires no password, .* Start that server with")
        with settings, refused as caught:
            serve_ui(None, False, console())
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("host", "login"), [("127.0.0.1", ""), pytest.param(ELSEWHERE, "me:secret", marks=ELSEWHERE_ONLY)]
)
def test_a_worker_is_started_for_a_server_on_this_machine_and_for_one_with_a_password(host: str, login: str) -> None:
    from prefect.settings import PREFECT_API_AUTH_STRING, temporary_settings

    with (
        _listening(ANSWERS, login=login, host=host) as port,
        temporary_settings({PREFECT_API_AUTH_STRING: login or None}),
    ):
        check_guarded(f"http://{host}:{port}/api")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
def test_a_server_with_a_certificate_of_a_private_authority_is_asked_with_it(tmp_path: Path) -> None:
    from prefect.settings import PREFECT_API_SSL_CERT_FILE, temporary_settings

    file = tmp_path / "server.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=here", "-days", "2",
         "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(file), "-out", str(tmp_path / "ca.pem")],
        check=True, capture_output=True,
    )  # fmt: skip
    with file.open("a") as both:
        both.write((tmp_path / "ca.pem").read_text())
    with _listening(ANSWERS, certificate=file) as port:
        url = f"https://127.0.0.1:{port}/api"
        assert "no Prefect server answers there" in _refusal(url) and not healthy(url)
        with temporary_settings({PREFECT_API_SSL_CERT_FILE: str(tmp_path / "ca.pem")}):
            _accepted(url)


@ELSEWHERE_ONLY
@pytest.mark.parametrize(
    ("answers", "named", "said"),
    [
        (HEALTH | {"/api/admin/version": (200, b'"2.20.16"')}, "/api", "is Prefect 2.20.16, which Prefect 3."),
        (HEALTH | {"/api/admin/version": (503, b"{}")}, "/api", "answers 503 when asked for its version"),
        (ANSWERS | {"/admin/version": (200, b"<html>")}, "", "no Prefect API. Set it to http://127.0.0.2:{port}/api"),
        ({"/admin/version": (200, b"<html>")}, "", "no Prefect API. Correct it, or unset it."),
    ],
)
def test_a_server_elsewhere_is_refused_as_one_on_loopback_is(
    answers: dict[str, tuple[int, bytes]], named: str, said: str
) -> None:
    with _listening(answers, host=ELSEWHERE) as port:
        refusal = _refusal(f"http://{ELSEWHERE}:{port}{named}")
    assert said.format(port=port) in refusal and "\n" not in refusal


@pytest.mark.parametrize("known", [True, False])
def test_prefect_cloud_tells_no_version_and_is_asked_for_flows(known: bool) -> None:
    from prefect.settings import PREFECT_CLOUD_API_URL, temporary_settings

    with _listening({"/api/flows/filter": (200 if known else 401, b"[]")}, login="-") as port:
        url = f"http://127.0.0.1:{port}/api"
        with temporary_settings({PREFECT_CLOUD_API_URL: url}):
            assert healthy(url) == known


@pytest.mark.parametrize(
    "url", ["127.0.0.1:4200/api", "http://127.0.0.1:x/api", "http:///api", "http://127.0.0.1:0/api"]
)
def test_an_address_that_is_none_is_one_sentence(url: str) -> None:
    refusal = _refusal(url)
    assert refusal == f"PREFECT_API_URL is {url}, which is no address such as http://127.0.0.1:4200/api."


@pytest.mark.parametrize("host", ["127.0.0.1:9/api", "127.0.0.1:x/api", "me@127.0.0.1:9/api"])
@pytest.mark.parametrize("scheme", ["http://", "ws://", ""])
@pytest.mark.parametrize("login", ["me:secret", "me:1/secret", "me:1#secret?", "secret"])
def test_no_password_is_printed(
    scheme: str, login: str, host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However wrong its address is."""
    url = f"{scheme}{login}@{host}"
    refusal = _refusal(url)
    assert f"PREFECT_API_URL is {scheme}{host.removeprefix('me@')}" in refusal and "secret" not in refusal
    monkeypatch.setenv("PREFECT_API_URL", url)
    with pytest.raises(ConfigError, match="Remove --port") as caught, server.prefect_server(tmp_path, 4202):
        pass
    assert "secret" not in str(caught.value)


def test_a_server_that_has_forgotten_the_run_is_one_sentence() -> None:
    from prefect.exceptions import ObjectNotFound

    with pytest.raises(JobError, match=r"another database\. Finished work is kept"), server_needed(DEAD):
        raise ObjectNotFound(http_exc=RuntimeError())


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        (None, "does not answer"),
        ({"/api/admin/version": (200, VERSION)}, "answers 500"),
        ({"/api/admin/version": (502, b"{}")}, "answers 502"),
    ],
)
def test_a_server_that_ends_or_fails_after_it_was_asked_is_one_sentence(
    answers: dict[str, tuple[int, bytes]] | None, said: str
) -> None:
    """Prefect's own exception for the first and the last is a RuntimeError."""
    from prefect import flow
    from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    with _listening(answers or {}) as port:
        url = DEAD if answers is None else f"http://127.0.0.1:{port}/api"
        named = temporary_settings({PREFECT_API_URL: url, PREFECT_CLIENT_MAX_RETRIES: 0})
        with named, pytest.raises(JobError, match=f"{said}.*Finished work is kept") as caught, server_needed(url):
            flow(name="any")(list)()
    assert "\n" not in str(caught.value)


def test_a_run_that_had_failed_before_the_server_ends_with_its_own_error() -> None:
    import httpx

    with pytest.raises(DataError, match="No picture is left"), server_needed(DEAD):
        try:
            raise DataError("No picture is left.")
        except DataError:
            raise httpx.ConnectError("refused")  # noqa: B904  (as Prefect's engine does)


def test_an_error_of_the_run_itself_passes_as_it_is() -> None:
    with pytest.raises(RuntimeError, match="out of memory"), server_needed(DEAD):
        raise RuntimeError("CUDA out of memory")


def _refusal(url: str) -> str:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with temporary_settings({PREFECT_API_URL: url}), pytest.raises(ConfigError) as caught:
        check_api(url)
    return str(caught.value)


def _accepted(url: str) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with temporary_settings({PREFECT_API_URL: url}):
        check_api(url)
    assert healthy(url)


@pytest.mark.slow
def test_a_server_that_is_killed_is_started_again_at_the_same_address(prefect_home: Path) -> None:
    held = _hold(prefect_home)
    url, login = _url(held), password(prefect_home)
    for _ in range(2):
        (process,) = (each for each in psutil.process_iter() if _is_server_of(each, prefect_home))
        process.kill()
        process.wait(30)
        assert within(PATIENCE_S, lambda: healthy(url), every_s=0.2)
        assert post(url, "flows/filter", {}, login) == []
    held.communicate("\n", timeout=PATIENCE_S)
    assert held.returncode == 0 and not healthy(url)


def test_a_server_that_dies_while_it_is_started_again_is_started_once_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts: list[int] = []

    def start(home: Path, port: int, environ: dict[str, str]) -> str:
        starts.append(port)
        if len(starts) < 3:
            raise JobError("The Prefect server did not start.")
        monkeypatch.setattr(server, "server_address", lambda home: "http://127.0.0.1:4201/api")
        return ""

    monkeypatch.setattr(server, "LOOK_EVERY_S", 0.01)
    monkeypatch.setattr(server, "start_server", start)
    with server.kept_up(tmp_path, "http://127.0.0.1:4201/api", {}):
        assert within(5, lambda: len(starts) == 3, every_s=0.01)
    assert starts == [4201] * 3


def test_a_disk_that_fails_for_a_moment_does_not_end_the_watch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []

    def address(home: Path) -> str | None:
        looks.append(len(looks))
        if len(looks) < 3:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return None if len(looks) == 3 else "http://127.0.0.1:4201/api"

    started: list[int] = []
    monkeypatch.setattr(server, "LOOK_EVERY_S", 0.01)
    monkeypatch.setattr(server, "server_address", address)
    monkeypatch.setattr(server, "start_server", lambda home, port, environ: started.append(port))
    with server.kept_up(tmp_path, "http://127.0.0.1:4201/api", {}):
        assert within(5, lambda: len(looks) > 5, every_s=0.01), "it looks again"
    assert started == []  # the look under the lock found it running


@pytest.mark.slow
def test_runs_share_a_server_on_loopback_only_whatever_proxy_is_named_and_the_last_one_stops_it(
    prefect_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in PROXIES:
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    first, second = _hold(prefect_home), _hold(prefect_home)
    url = _url(first)
    assert url and _url(second) == url
    port = int(url.split(":")[2].split("/")[0])
    lines = [line.split() for line in Path("/proc/self/net/tcp").read_text().splitlines()[1:]]
    assert {line[1].split(":")[0] for line in lines if line[3] == "0A" and line[1].endswith(f":{port:04X}")} == {
        "0100007F"
    }
    first.communicate("\n", timeout=PATIENCE_S)
    assert healthy(url)  # the second still uses it
    second.communicate("\n", timeout=PATIENCE_S)
    assert not healthy(url)


@pytest.mark.slow
def test_a_server_ends_with_its_last_user_however_that_died_and_who_comes_then_gets_a_new_one(
    prefect_home: Path,
) -> None:
    first = _hold(prefect_home)
    url = _url(first)
    second = _hold(prefect_home)
    assert _url(second) == url
    _kill(first)
    time.sleep(2)
    assert healthy(url)  # the second still uses it
    _kill(second)
    third = _hold(prefect_home)  # while it ends, or just before
    assert healthy(_url(third))
    (pid,) = {process.pid for process in psutil.process_iter() if _is_server_of(process, prefect_home)}
    os.kill(pid, signal.SIGKILL)
    fourth = _hold(prefect_home)  # its record is still there
    assert healthy(_url(fourth))
    for user in (third, fourth):
        _kill(user)
    assert within(
        PATIENCE_S,
        lambda: not any(_is_server_of(process, prefect_home) for process in psutil.process_iter()),
        every_s=0.1,
    )


def _kill(process: "subprocess.Popen[str]") -> None:
    process.kill()
    process.wait()


def _is_server_of(process: psutil.Process, home: Path) -> bool:
    try:
        return str(home / "server.users") in process.cmdline()
    except psutil.Error:
        return False


def test_a_record_that_no_living_server_holds_is_not_joined(tmp_path: Path) -> None:
    """Another program may have its port by now, and its process id."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        url = f"http://127.0.0.1:{other.getsockname()[1]}/api"
        (tmp_path / "server.json").write_text(json.dumps({"url": url, "pid": os.getpid()}))
        assert server.server_address(tmp_path) is None


def test_a_port_that_the_running_server_does_not_have_is_an_error(tmp_path: Path) -> None:
    with (tmp_path / "server.json").open("w") as record:
        json.dump({"url": "http://127.0.0.1:4201/api"}, record)
        record.flush()
        fcntl.flock(record, fcntl.LOCK_EX)  # as a living server
        with pytest.raises(ConfigError, match=r"already running at http://127.0.0.1:4201, .* Remove --port"):
            server.join_server(tmp_path, 4202)


@pytest.mark.parametrize("runs_already", [False, True])
def test_who_uses_a_server_is_told_that_a_service_of_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, runs_already: bool
) -> None:
    monkeypatch.setattr(os, "environ", {"PATH": os.environ["PATH"]})
    monkeypatch.setattr(server, "join_server", lambda *_: DEAD if runs_already else None)
    monkeypatch.setattr(server, "start_server", lambda *_: DEAD)
    monkeypatch.setattr(server, "check_access", lambda *_: None)
    monkeypatch.setattr(server, "kept_up", lambda *_: nullcontext())
    error = "21:29:00.000 | ERROR   | prefect.server.services.scheduler - no run is scheduled\n"
    (tmp_path / "server.log").write_text(error.replace("no run", "of an earlier start: no run"))
    with server.prefect_server(tmp_path), (tmp_path / "server.log").open("a") as log:
        log.write(error)
    assert caplog.messages == [
        "the Prefect server's service prefect.server.services.scheduler fails: no run is scheduled "
        f"(log: {tmp_path / 'server.log'})"
    ]


def test_a_port_beside_a_configured_server_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    with pytest.raises(ConfigError, match="Remove --port"), server.prefect_server(tmp_path, 4202):
        pass


BOUND = """
import runpy, subprocess, sys, time
from flows.serving import bound
bound.RUNS_S = bound.REPORT_S = bound.ITSELF_S = 0.3
DEAF = "import signal, time; [signal.signal(n, signal.SIG_IGN) for n in (2, 15)]; print('ready', flush=True); time.sleep(60)"
def prefect(*_, **__):
    subprocess.Popen([sys.executable, "-c", DEAF], start_new_session=True)
    while True:
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            print("asked", flush=True)
runpy.run_module = prefect
bound.main(sys.argv[1], "prefect")
"""


@pytest.mark.parametrize("owned", [True, False])
def test_what_is_bound_ends_with_its_last_user_and_with_it_what_it_started(tmp_path: Path, owned: bool) -> None:
    """Also where none of it hears: a worker's owner closes a pipe, a server's users free a lock, by any death."""
    users = [(tmp_path / "users").open("a") for _ in range(2)]
    for each in users:
        fcntl.flock(each, fcntl.LOCK_SH)
    bound = subprocess.Popen(
        [sys.executable, "-P", "-c", BOUND, "-" if owned else users[0].name],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert bound.stdin and bound.stdout and bound.stdout.readline() == "ready\n"
    (child,) = psutil.Process(bound.pid).children()
    users[0].close()
    time.sleep(0.5)
    assert bound.poll() is None  # one is left
    (bound.stdin if owned else users[1]).close()
    if not within(30, lambda: bound.poll() is not None, every_s=0.05):
        bound.kill()
        child.kill()
        pytest.fail("it goes on without a user")
    assert bound.stdout.readline() == "asked\n"
    assert bound.wait(10) == -signal.SIGKILL
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
    users[1].close()
    bound.stdin.close()
    bound.stdout.close()


def test_a_home_on_a_full_disk_is_told_when_a_server_does_not_start_or_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with small_disk(tmp_path / "home", 20 * PAGE) as disk, monkeypatch.context() as patch:
        patch.delenv("PREFECT_API_URL", raising=False)
        patch.setattr(server, "_command", lambda *_: ["false"])
        full = rf"\(tmpfs at {disk.folder}, .* kB free\)\. Free some space there, or set PREFECT_HOME to a folder"
        said = pytest.raises(StorageError, match=rf"did not start: its new database takes 6\.00 MB, and .*{full}")
        with said, server.prefect_server(disk.folder):
            pass
        patch.setattr(server, "server_address", lambda home: DEAD)
        refused = httpx.HTTPStatusError("", request=httpx.Request("GET", DEAD), response=httpx.Response(500))
        said = pytest.raises(StorageError, match=rf"{DEAD} cannot write\. Finished work is kept\. .*{full}")
        with said, server_needed(DEAD, lambda url: server.look_for_room(url, disk.folder)):
            raise refused
