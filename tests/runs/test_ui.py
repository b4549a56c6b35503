"""`deepfloyd ui`: a server, a worker and the deployments, and artifacts that a real browser renders."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from browser import NEEDS_BROWSER, shows
from polling import within
from prefect_api import PrefectApi, post
from small_run import SmallRun

from flows.serving.home import login_link, password
from flows.serving.server import free_port

ROOT = Path(__file__).parents[2]


@contextmanager
def _ui(project: Path, home: Path, log: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """`deepfloyd ui` of a project until the end of the block: its port, and an environment with its PREFECT_HOME."""
    port = free_port()
    env = {key: value for key, value in os.environ.items() if not key.startswith("PREFECT_")}
    env |= {"PREFECT_HOME": str(home), "DEEPFLOYD_ROOTS": str(log.parent)}
    with log.open("wb") as out:
        ui = subprocess.Popen(
            [sys.executable, "-P", "-m", "flows", "ui", "--port", str(port)],
            cwd=project, env=env, stdout=out, stderr=out, start_new_session=True,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 240
        while "Ctrl-C stops everything" not in log.read_text():
            assert ui.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)
        yield port, env
    finally:
        os.killpg(ui.pid, signal.SIGINT)
        ui.wait(120)


SHORT = ["stage1.max_train_steps=2", "stage2.max_train_steps=1", "num_eval_images=1", "num_validation_images=1"]


@pytest.mark.slow
@pytest.mark.browser
@NEEDS_BROWSER
def test_a_deployment_completes_and_its_artifacts_render(
    small_run: SmallRun, tmp_path: Path, prefect_home: Path
) -> None:
    project = small_run.folder
    offered = (ROOT / "prefect.yaml").read_text().replace("flows/configs/demo.toml", small_run.config.name)
    (project / "prefect.yaml").write_text(offered.replace("workspace.demo", f"workspace.{small_run.workspace.name}"))
    with _webhook() as (webhook, told), _ui(project, prefect_home, tmp_path / "ui.log") as (port, env):
        url, login = f"http://127.0.0.1:{port}/api", password(prefect_home)
        deployed = post(url, "deployments/filter", {}, login)
        names = {(entry["name"], entry["entrypoint"]) for entry in deployed}
        assert ("demo", "flows.finetune:finetune") in names and len({name for name, _ in names}) == len(names)
        api = PrefectApi(url, login)
        api.create_webhook("deepfloyd", webhook)
        assert within(60, lambda: "'deepfloyd: version blocked' uses" in _printed(tmp_path), every_s=0.3)
        prefect = [sys.executable, "-P", "-m", "prefect", "deployment", "run"]
        parameters = ["-p", f"config={small_run.config.name}", "-p", f"overrides={json.dumps(SHORT)}", "--watch"]
        outside = subprocess.run([*prefect, "generate/pictures", "-p", "control=/etc/passwd"], cwd=project, env=env)
        done = subprocess.run(
            [*prefect, "finetune/demo", *parameters], cwd=project, env=env,
            capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        failed = post(url, "flow_runs/filter", {"flow_runs": {"state": {"type": {"any_": ["FAILED"]}}}}, login)
        assert outside.returncode == 0 and [run["state"]["message"] for run in failed] == [
            failed[0]["state"]["message"]
        ]
        assert "control is '/etc/passwd', outside of the folders" in failed[0]["state"]["message"]
        assert within(30, lambda: bool(told), every_s=0.2), "a notification of the run that failed"
        assert told[0]["text"].startswith("generate run ") and told[0]["text"].endswith(": Failed")
        assert "outside of the folders" in told[0]["details"]
        assert within(120, lambda: api.count("generate", "COMPLETED") == 1, every_s=0.5), "with the new champion"
        found = post(url, "artifacts/filter", {"limit": 100}, login)
        artifacts = {entry["key"]: entry["id"] for entry in found if entry["key"]}
        page, profile, picture = f"http://127.0.0.1:{port}/artifacts/artifact", tmp_path / "profile", 'src="data:image/'
        assert not shows(f"{page}/{artifacts['cascade-samples-workspace']}", profile, picture), "without a login"
        assert shows(login_link(f"http://127.0.0.1:{port}", prefect_home), profile, deployed[0]["name"])
        assert shows(
            f"{page}/{artifacts['cascade-samples-workspace']}", profile, picture, 2
        )  # the sheet, the held-out pictures
        assert shows(f"{page}/{artifacts['image-index-workspace']}", profile, "unsupported")
        assert shows(f"{page}/{artifacts['image-index-workspace']}", profile, picture, 1), "of the rejected files"
    assert within(60, lambda: not _answers(port), every_s=0.2)
    kept = [path for path in (*prefect_home.rglob("*"), tmp_path / "ui.log") if path.is_file()]
    secret = login.partition(":")[2].encode()
    assert {path.name for path in kept if secret in _read(path)} == {"auth", "profiles.toml"}


def _read(path: Path) -> bytes:
    """The bytes of a file; none of one that is gone, such as the database's log when its last reader ends."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""


def _printed(folder: Path) -> str:
    return " ".join((folder / "ui.log").read_text().split())


@contextmanager
def _webhook() -> Iterator[tuple[str, list[Any]]]:
    """The address of a receiver of notifications, and what it has received."""
    received: list[Any] = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Receiver) as server:
        threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/", received
        finally:
            server.shutdown()


def _answers(port: int) -> bool:
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/api/health", timeout=5)
    except OSError:
        return False
    return True
