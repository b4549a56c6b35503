"""The Prefect server of a run: shared by all runs with one home, gone with the last, never one that nobody asked for."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flows.server import healthy

HOLD = """
import sys
from pathlib import Path
from flows.server import prefect_server
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
