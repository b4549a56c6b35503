"""Runs on Prefect's task runners: their products, the task runs that the server knows, clusters, and killed workers."""

import hashlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
import pytest
from polling import within
from prefect_api import post
from small_run import SmallRun

# Workers, too, reach a server on loopback past it; nobody listens there.
BEHIND_A_PROXY = {
    **dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), "http://127.0.0.1:9"), "no_proxy": "", "NO_PROXY": ""
}  # fmt: skip
SHARDS = ("image_index/*/index.parquet", "stage?_pixels/*/*.parquet", "stage?_pixels/*/rows.arrow")


def installed(kind: str) -> None:
    if kind in ("ray", "dask"):
        pytest.importorskip(f"prefect_{kind}", reason=f"pip install 'deepfloyd-pipeline[{kind}]'")


def products_of(run: SmallRun, patterns: Sequence[str] = SHARDS) -> dict[str, str]:
    files = [path for pattern in patterns for path in run.workspace.glob(pattern)]
    return {str(path.relative_to(run.workspace)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _found(server: str, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    return list(post(server, f"{path}/filter", {"limit": 200, **body}))


def task_states(server: str, run: SmallRun, since: datetime, products: dict[str, str]) -> list[tuple[str, str]]:
    """The shard and state of each task run since then that the server has; other tests use it as well."""
    names, later = {Path(name).name for name in products}, {"start_time": {"after_": since.isoformat()}}
    flows = _found(server, "flow_runs", {"flow_runs": later})
    own = [entry["id"] for entry in flows if entry["parameters"].get("config") == str(run.config)]
    inner = _found(server, "flow_runs", {"flow_runs": {"parent_flow_run_id": {"any_": own}}})
    ids = {"any_": own + [entry["id"] for entry in inner]}
    found = _found(server, "task_runs", {"flow_runs": {"id": ids}})
    shards = [(entry["name"].rsplit("-", 1)[0], entry["state_type"]) for entry in found]
    return sorted(shard for shard in shards if shard[0] in names)


def all_recorded(server: str, run: SmallRun, since: datetime, products: dict[str, str]) -> None:
    """Each shard once, as completed: some seconds after the run, because the server writes what it is told in batches."""
    expected = [(shard, "COMPLETED") for shard in shards_of(products)]
    within(60, lambda: task_states(server, run, since, products) == expected, every_s=0.5)
    assert task_states(server, run, since, products) == expected


def shards_of(products: dict[str, str]) -> list[str]:
    return sorted(Path(name).name for name in products if name.startswith("stage") and name.endswith(".parquet"))


@contextmanager
def dask_cluster(folder: Path) -> Iterator[tuple[str, int]]:
    """The address and process id of a cluster of two workers. It knows nothing of the run: its environment has no address of
    a Prefect server.
    """
    code = (
        "import sys\nfrom distributed import LocalCluster\n"
        "if __name__ == '__main__':\n"
        "    cluster = LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None)\n"
        "    print(cluster.scheduler_address, flush=True)\n"
        "    sys.stdin.read()\n"
    )
    script = folder / "cluster.py"
    script.write_text(code)
    with subprocess.Popen(
        [sys.executable, "-P", str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"},
    ) as process:  # fmt: skip
        assert process.stdout is not None
        yield process.stdout.readline().strip(), process.pid
        process.terminate()


def kill_a_worker(
    flow: "subprocess.Popen[str]", root: int, is_time: Callable[[], bool], is_worker: Callable[[psutil.Process], bool]
) -> bool:
    """SIGKILL a worker among the descendants of a process when it is time; False: the flow ended before."""
    deadline = time.monotonic() + 300
    while flow.poll() is None and time.monotonic() < deadline:
        if is_time():
            for child in psutil.Process(root).children(recursive=True):
                with suppress(psutil.Error):  # it has ended meanwhile
                    if is_worker(child):
                        child.send_signal(signal.SIGKILL)
                        return True
        time.sleep(0.002)
    return False
