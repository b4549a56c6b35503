"""Nobody but its user starts a run on our Prefect server: no page from elsewhere, no other host name or account."""

import http.server
import os
import pwd
import stat
import threading
import urllib.error
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlsplit
from uuid import uuid4

import httpx
import pytest
from browser import NEEDS_BROWSER, page, shows
from polling import within
from prefect_api import post

from deepfloyd_core.errors import ConfigError
from flows.serving.home import login_link, open_home, password
from flows.serving.profile import prefect_command, write_profile
from flows.serving.server import page_address

# Sends what it can send without being asked for permission, and says which web sockets were opened.
ATTACK = """<!doctype html><body><script>
const api = %r, flow = %r;
const body = new Blob([JSON.stringify({flow_id: flow, name: "attack", state: {type: "SCHEDULED"}})]);
const socket = new Promise(told => {
  const opened = new WebSocket(api.replace("http", "ws") + "/events/out", "prefect");
  opened.onopen = () => told("socket opened");
  opened.onerror = () => told("socket refused");
});
Promise.all([fetch(api + "/flow_runs/", {method: "POST", mode: "no-cors", body}), socket]).then(
  ([_, said]) => document.body.append("sent, " + said), error => document.body.append("not sent " + error));
</script>"""


@pytest.fixture
def port(server: str) -> int:
    """The port of the server that all tests share."""
    return urlsplit(server).port or 0


@contextmanager
def _site(document: str) -> Iterator[str]:
    """A web site of somebody else: another port is another origin."""

    class Site(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(document.encode())

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site) as site:
        threading.Thread(target=site.serve_forever, args=(0.05,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{site.server_port}/"
        finally:
            site.shutdown()


@pytest.mark.slow
@pytest.mark.browser
@NEEDS_BROWSER
def test_a_page_from_elsewhere_starts_no_run_and_hears_no_event_in_a_browser_that_is_logged_in(
    server: str, tmp_path: Path
) -> None:
    name = f"flow-{uuid4()}"
    flow = post(server, "flows/", {"name": name})["id"]
    link = f"{server.removesuffix('/api')}/enter#{_base64(os.environ['PREFECT_API_AUTH_STRING'])}"
    page(link, tmp_path / "profile")
    assert shows(f"{server.removesuffix('/api')}/flows", tmp_path / "profile", name), "the UI itself, logged in"
    with _site(ATTACK % (server, flow)) as site:
        assert shows(site, tmp_path / "profile", "sent, socket refused")
    assert not within(2, lambda: post(server, "flow_runs/filter", {"flows": {"id": {"any_": [flow]}}}), every_s=0.5)


def _base64(login: str) -> str:
    return httpx.BasicAuth(*login.split(":"))._auth_header.removeprefix("Basic ")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "attacker.example"}, 400),
        ({"Host": "127.0.0.1.attacker.example:{port}"}, 400),
        ({"Host": "localhost:{port}"}, 200),
        ({"Host": "[::1]:8080"}, 200),  # through a tunnel
        ({"Host": "[::1]:8080", "Origin": "http://[::1]:8080"}, 200),
        ({"Origin": "http://localhost:{port}"}, 200),
        ({"Origin": "http://localhost:1{port}"}, 403),
        ({"Origin": "https://attacker.example"}, 403),
        ({"Origin": "null"}, 403),  # of a file, or of a frame without rights
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),  # of another port
        ({"Sec-Fetch-Site": "same-origin"}, 200),
        ({"Authorization": "Basic YTpi"}, 401),
        ({"Authorization": ""}, 401),
    ],
)
def test_who_may_send_requests(server: str, port: int, headers: dict[str, str], status: int) -> None:
    """All of these have the password, but the last."""
    login = {"Authorization": f"Basic {_base64(os.environ['PREFECT_API_AUTH_STRING'])}"}
    sent = login | {key: value.format(port=port) for key, value in headers.items()}
    assert httpx.post(f"{server}/flows/filter", json={"limit": 1}, headers=sent).status_code == status


def test_no_other_site_shows_the_server_s_pages_in_a_frame(server: str) -> None:
    root = server.removesuffix("/api")
    assert httpx.get(f"{root}/ui-settings").headers["x-frame-options"] == "SAMEORIGIN"
    assert "frame-ancestors 'none'" in httpx.get(f"{root}/enter").headers["content-security-policy"]


def _tried(url: str, paths: list[Path]) -> Iterator[str]:
    """The answer to a request that would change something, and what opening files raises."""
    try:
        post(url, "flows/", {"name": "of-nobody"}, login="")
        yield "answered"
    except urllib.error.HTTPError as error:
        yield str(error.code)
    for path in paths:
        try:
            path.read_bytes()
            yield "read"
        except OSError as error:
            yield type(error).__name__


def _as_nobody(url: str, paths: list[Path]) -> list[str]:
    """The same of another account, in a fork."""
    nobody, (reader, writer) = pwd.getpwnam("nobody"), os.pipe()
    if (pid := os.fork()) == 0:
        try:
            os.setgroups([])
            os.setgid(nobody.pw_gid)
            os.setuid(nobody.pw_uid)
            os.write(writer, " ".join(_tried(url, paths)).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as told:
        said = told.read().split()
    os.waitpid(pid, 0)
    return said


@pytest.mark.skipif(os.getuid() != 0, reason="only root can act as another account")
def test_another_account_of_the_machine_reads_no_password_and_is_refused(server: str) -> None:
    with TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        home = Path(folder, "home")
        home.mkdir(0o755)
        for name in ("prefect.db", "server.log"):
            (home / name).touch(0o644)  # as Prefect leaves them
        open_home(home)
        password(home)
        write_profile(home, server, password(home))
        paths = list(home.iterdir())
        assert _as_nobody(server, paths) == ["401"] + ["PermissionError"] * 4
        assert {stat.S_IMODE(path.stat().st_mode) for path in paths} == {0o600}


def test_the_password_of_a_home_stays_the_same(tmp_path: Path) -> None:
    open_home(tmp_path / "home")
    assert password(tmp_path / "home") == password(tmp_path / "home") != ""
    (tmp_path / "home" / "auth.new").touch()  # of a command that was killed
    (tmp_path / "home" / "auth").unlink()
    assert len(password(tmp_path / "home")) > 40


@pytest.mark.parametrize(
    ("text", "mode", "said"),
    [("me:secret", 0o640, "Others can read"), ("me:secret", 0o604, "Others can read"), ("\n", 0o600, "holds no line")],
)
def test_a_password_that_others_know_is_refused(tmp_path: Path, text: str, mode: int, said: str) -> None:
    (tmp_path / "auth").write_text(text)
    (tmp_path / "auth").chmod(mode)
    with pytest.raises(ConfigError, match=said) as caught:
        password(tmp_path)
    assert "secret" not in str(caught.value)


def test_a_home_of_somebody_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 4711)
    with pytest.raises(ConfigError, match=r"belongs to .* Set PREFECT_HOME to a folder of your own"):
        open_home(tmp_path)
    (tmp_path / "auth").touch(0o600)
    with pytest.raises(ConfigError, match="belongs to"):
        password(tmp_path)


def test_the_profile_stands_beside_those_of_the_user(tmp_path: Path) -> None:
    theirs = '[profiles.cloud]\nPREFECT_API_KEY = "k"\n'
    (tmp_path / "profiles.toml").write_text(f'active = "cloud"\n\n{theirs}')
    for url in ("http://127.0.0.1:4200/api", "http://127.0.0.1:4201/api"):
        write_profile(tmp_path, url, "me:secret")
        written = (tmp_path / "profiles.toml").read_text()
        assert written.startswith('active = "cloud"') and theirs in written and url in written
        assert prefect_command(tmp_path, url) == f"PREFECT_HOME={tmp_path} .venv/bin/prefect --profile deepfloyd"
    assert "4200" not in written
    assert [path.name for path in tmp_path.iterdir()] == ["profiles.toml"]


def test_the_first_profile_is_active_and_a_broken_file_is_one_sentence(tmp_path: Path) -> None:
    write_profile(tmp_path, "http://127.0.0.1:4200/api", "me:secret")
    command = prefect_command(tmp_path, "http://127.0.0.1:4200/api")
    assert command == f"PREFECT_HOME={tmp_path} .venv/bin/prefect"
    assert prefect_command(tmp_path, "http://other/api") == "PREFECT_API_URL=http://other/api .venv/bin/prefect"
    (tmp_path / "profiles.toml").write_text("active = ")
    with pytest.raises(ConfigError, match=r"profiles.toml is not valid: .* Correct or remove it"):
        write_profile(tmp_path, "http://127.0.0.1:4200/api", "me:secret")


def test_only_a_terminal_shows_the_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = "http://127.0.0.1:4200/api"
    assert page_address(url, tmp_path, private=True) == "http://127.0.0.1:4200", "a server of somebody else"
    monkeypatch.setattr("flows.serving.server.server_address", lambda _: url)
    link = page_address(url, tmp_path, private=True)
    assert link == login_link("http://127.0.0.1:4200", tmp_path) and _base64(password(tmp_path)) in link
    assert (
        page_address(url, tmp_path, private=False) == f"http://127.0.0.1:4200 (its password is in {tmp_path / 'auth'})"
    )
