"""The compose file, played by hand: its services' commands and environments, against a real PostgreSQL, on this machine.

Only what containers would give is replaced: names of hosts, ports, folders.
"""

import json
import os
import subprocess
import sys
import urllib.error
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from polling import within
from postgresql import NEEDS_POSTGRESQL, database
from prefect_api import PrefectApi
from recipes import DEPLOY, FILLED_IN, compose, example_env, pool
from small_run import SmallRun

from flows.serving.server import free_port

SHORT = ["stage1.max_train_steps=2", "stage2.max_train_steps=1", "num_eval_images=1", "num_validation_images=1"]
PATIENCE_S = 300.0  # a hang, not a measure of speed


@dataclass(frozen=True)
class Played:
    """The services of the compose file on this machine."""

    folder: Path
    services: dict[str, Any]
    ports: dict[str, int]  # of the server, the database and each worker

    @property
    def api(self) -> PrefectApi:
        """The server's API."""
        return PrefectApi(f"http://127.0.0.1:{self.ports['server']}/api", FILLED_IN["LOGIN"])

    def here(self, service: str, text: str) -> str:
        """A word of a command, or a value of an environment, as it is on this machine."""
        if text in ("4200", "5432"):
            return str(self.ports["server" if text == "4200" else "postgres"])
        for there, place in {
            "0.0.0.0": "127.0.0.1",
            "server:4200": f"127.0.0.1:{self.ports['server']}",
            "127.0.0.1:4200": f"127.0.0.1:{self.ports['server']}",
            "127.0.0.1:8080": f"127.0.0.1:{self.ports.get(service, 0)}",
            "/opt/deploy/": f"{DEPLOY}/",
            "/home/deepfloyd/": f"{self.folder}/{service}/",
            "/tmp/": f"{self.folder}/{service}/",
        }.items():
            if text.startswith(there) or f"/{there}" in text:
                return text.replace(there, place)
        return {"postgres": "127.0.0.1", "/project": str(self.folder / "project")}.get(text, text)

    def environ(self, service: str) -> dict[str, str]:
        """Of a service: what the image has, then its own."""
        known = {key: value for key, value in os.environ.items() if not key.startswith("PREFECT_")}
        known |= {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "PYTHONSAFEPATH": "1"}
        known |= {"PREFECT_WORKER_WEBSERVER_PORT": str(self.ports.get(service, 0)), "DO_NOT_TRACK": "1"}
        own = self.services[service]["environment"]
        return known | {key: self.here(service, value) for key, value in own.items()}

    def call(self, service: str, *command: str) -> "subprocess.CompletedProcess[str]":
        """What a command returns and prints in a service's environment."""
        words = [self.here(service, word) for word in command]
        environ, cwd = self.environ(service), self.folder / "project"
        return subprocess.run(words, env=environ, cwd=cwd, capture_output=True, text=True, timeout=PATIENCE_S)

    def is_healthy(self, service: str) -> bool:
        """Whether the health check of a service passes."""
        return self.call(service, *self.services[service]["healthcheck"]["test"][1:]).returncode == 0

    @contextmanager
    def started(self, service: str) -> Iterator[None]:
        """A service, from the moment when it is healthy to the end of the block."""
        words = [self.here(service, word) for word in self.services[service]["command"]]
        log = self.folder / f"{service}.log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                words, env=self.environ(service), cwd=self.folder, stdout=out, stderr=out, start_new_session=True
            )
        try:
            assert within(PATIENCE_S, lambda: self.is_healthy(service), every_s=1.0), log.read_text()
            yield
        finally:
            process.terminate()
            process.wait(60)


@pytest.fixture
def played(small_run: SmallRun, tmp_path: Path) -> Iterator[Played]:
    """The services, with the server started."""
    folder = tmp_path / "played"
    folder.mkdir()
    (folder / "project").symlink_to(small_run.folder)
    services = compose(example_env() | FILLED_IN | {"CONFIG": small_run.config.name})["services"]
    ports = {name: free_port() for name in ("server", "data-worker", "cpu-worker")}
    with database(FILLED_IN["POSTGRES_PASSWORD"]) as port:
        played = Played(folder, services, ports | {"postgres": port})
        with played.started("server"):
            yield played


@pytest.mark.slow
@NEEDS_POSTGRESQL
def test_pictures_go_from_the_pool_of_data_to_that_of_the_gpu_and_become_a_version(
    played: Played, small_run: SmallRun
) -> None:
    api, setup = played.api, played.services["setup"]["command"]
    with pytest.raises(urllib.error.HTTPError, match="401"):
        PrefectApi(api.url, "deepfloyd:guessed").get("work_pools/data")
    _make_pools_of_kubernetes(played)
    for _ in range(2):  # a second one changes nothing
        done = played.call("setup", *setup)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert {name: api.get(f"work_pools/{name}")["type"] for name in ("data", "gpu")} == dict.fromkeys(
        ("data", "gpu"), "process"
    )
    assert api.get("work_pools/gpu/queues/training")["concurrency_limit"] == 1
    assert sorted(one["name"] for one in api.post("automations/filter", {})) == [
        "after-data__automation_1", "deepfloyd: run lost",
    ]  # fmt: skip
    with ExitStack() as workers:
        for service in ("data-worker", "cpu-worker"):
            workers.enter_context(played.started(service))
        prepared = api.run("prepare/data", {"config": small_run.config.name, "overrides": SHORT})
        assert within(PATIENCE_S, lambda: api.state(prepared) not in ("SCHEDULED", "PENDING", "RUNNING"), every_s=1.0)
        assert api.state(prepared) == "COMPLETED", (played.folder / "data-worker.log").read_text()[-3000:]
        assert within(PATIENCE_S, lambda: api.count("retrain", "COMPLETED") == 1, every_s=1.0), (
            played.folder / "cpu-worker.log"
        ).read_text()[-3000:]
    (trained,) = api.post("flow_runs/filter", {"flows": {"name": {"any_": ["retrain"]}}})
    assert (trained["work_pool_name"], trained["work_queue_name"]) == ("gpu", "training")
    assert trained["parameters"] == {"config": small_run.config.name, "overrides": SHORT}
    assert (small_run.workspace / "versions" / "0001.json").exists()
    log = (played.folder / "cpu-worker.log").read_text()
    assert all(f"{kind} " in log for kind in ("image_index", "stage1_pixels", "stage2_pixels"))
    assert not [line for line in log.splitlines() if "_pixels" in line and "built" in line], "made by the other worker"


def _make_pools_of_kubernetes(played: Played) -> None:
    """By the command of setup.yaml; they are removed afterwards."""
    done = played.call("setup", "/opt/deploy/setup.sh", "kubernetes")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    for name in ("data", "gpu"):
        made = played.api.get(f"work_pools/{name}")
        assert made["type"] == "kubernetes" and json.dumps(made["base_job_template"], sort_keys=True) == json.dumps(
            pool(name), sort_keys=True
        )
        assert played.call("setup", "prefect", "--no-prompt", "work-pool", "delete", name).returncode == 0
    done = played.call("setup", "/opt/deploy/setup.sh", "machines")
    assert done.returncode == 2 and "machines is neither process nor kubernetes" in done.stderr


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"PREFECT_API_AUTH_STRING": "deepfloyd:guessed"}, "refuses the user and password in PREFECT_API_AUTH_STRING"),
        ({"PREFECT_API_URL": "http://127.0.0.1:9/api"}, "no Prefect server answers there"),
        ({"DEEPFLOYD_CONFIG": ""}, "DEEPFLOYD_CONFIG"),
        ({}, "prefect.yaml lists no deployments"),
    ],
)
def test_setup_says_in_one_sentence_what_is_wrong(
    server: str, tmp_path: Path, changed: dict[str, str], said: str
) -> None:
    (tmp_path / "prefect.yaml").write_text("[")
    environ = {
        **os.environ,
        "PREFECT_API_URL": server,
        "DEEPFLOYD_PROJECT": str(tmp_path),
        "DEEPFLOYD_CONFIG": "run.toml",
    }
    environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = ["sh", str(DEPLOY / "setup.sh"), "process"]
    done = subprocess.run(command, env=environ | changed, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode != 0 and said in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
