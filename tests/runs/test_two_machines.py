"""Two machines that share a wire and nothing else: server, store and data worker on one, the trainer on the other."""

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from machines import Machine, can_make, two_machines
from polling import within
from recipes import DEPLOY, FILLED_IN, compose, example_env
from small_run import RUN_FILE, SmallRun

SHORT = ["stage1.max_train_steps=4", "stage2.max_train_steps=2", "num_eval_images=1", "num_validation_images=1"]
WORKSPACE, LOGIN = "s3://work/stars", "deepfloyd:of-a-test"
PATIENCE_S = 300.0  # a hang, not a measure of speed
DATA = """[{"id": "stars", "type": "aws", "aws_bucket_name": "pictures", "crop": true, "crop_aspect": "square",
  "crop_style": "random", "resolution": 64, "caption_strategy": "textfile", "repeats": 1, "minimum_image_size": 64,
  "maximum_image_size": 64, "target_downsample_size": 64}]"""
FILL = """
import sys, boto3, pathlib
s3 = boto3.resource("s3")
for name in ("pictures", "work"):
    s3.create_bucket(Bucket=name)
for file in pathlib.Path(sys.argv[1]).iterdir():
    s3.Bucket("pictures").upload_file(str(file), file.name)
"""


ASK = "import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=5)"


@dataclass(frozen=True)
class Pair:
    """Both machines, and what every program on them has in its environment."""

    data: Machine  # with the server, and the store of pictures and of the workspace
    trainer: Machine
    environ: dict[str, str]

    def deepfloyd(self, machine: Machine, *arguments: str) -> str:
        """What a command prints there."""
        done = machine.call(sys.executable, "-P", "-m", "flows", *arguments, environ=self.environ)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def prefect(self, *arguments: str) -> str:
        """What Prefect's command prints on the first machine."""
        done = self.data.call("prefect", *arguments, environ=self.environ)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    @contextmanager
    def started(self, machine: Machine, log: str, *command: str, said: str) -> Iterator[None]:
        """A service of a machine, from when it says so."""
        with machine.running(log, *command, environ=self.environ):
            assert within(PATIENCE_S, lambda: said in machine.read(log), every_s=1.0), machine.read(log)
            yield


@pytest.fixture
def pair(tmp_path: Path, small_run: SmallRun) -> Iterator[Pair]:
    """Both, with a project on each, and the server, the store and the workers started."""
    (folder := tmp_path / "machine").mkdir()
    services = compose(example_env() | FILLED_IN | {"CONFIG": "run.toml"})["services"]
    with two_machines(folder) as (one, two), ExitStack() as started:
        pair = Pair(one, two, _environ(one, folder))
        for machine in (one, two):
            machine.put("project/run.toml", _run_file())
            machine.put("project/data.json", DATA)
            machine.put("project/prefect.yaml", (DEPLOY / "prefect.yaml").read_text())
        store = (sys.executable, "-m", "moto.server", "-H", one.address, "-p", "9000")
        started.enter_context(pair.started(one, "store.log", *store, said="Running on"))
        filled = one.call(sys.executable, "-P", "-c", FILL, str(small_run.pictures), environ=pair.environ)
        assert filled.returncode == 0, filled.stderr
        server = ("prefect", "server", "start", "--host", one.address, "--port", "4200")
        started.enter_context(pair.started(one, "server.log", *server, said="Check out the dashboard"))
        asked = (sys.executable, "-c", ASK, f"{pair.environ['PREFECT_API_URL']}/health")
        assert within(PATIENCE_S, lambda: one.call(*asked).returncode == 0, every_s=1.0), one.read("server.log")
        done = one.call("sh", str(DEPLOY / "setup.sh"), "process", environ=pair.environ)
        assert done.returncode == 0, done.stdout + done.stderr
        for machine, service in ((one, "data-worker"), (two, "cpu-worker")):
            command = [word for word in services[service]["command"] if word != "--with-healthcheck"]
            started.enter_context(pair.started(machine, "worker.log", *command, said="started!"))
        yield pair


def _environ(one: Machine, folder: Path) -> dict[str, str]:
    """Of all programs on both machines."""
    known = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "AWS_"))}
    url = f"http://{one.address}:4200/api"
    return known | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "PYTHONSAFEPATH": "1",
        "HOME": str(folder / "home"), "PREFECT_HOME": str(folder / "prefect"), "PREFECT_API_URL": url,
        "PREFECT_API_AUTH_STRING": LOGIN, "PREFECT_SERVER_API_AUTH_STRING": LOGIN, "DO_NOT_TRACK": "1",
        "DEEPFLOYD_PROJECT": str(folder / "project"), "DEEPFLOYD_CONFIG": "run.toml",
        "AWS_ENDPOINT_URL": f"http://{one.address}:9000", "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }  # fmt: skip


def _run_file() -> str:
    text = RUN_FILE.format(folder="HERE")
    return text.replace("HERE/workspace", WORKSPACE).replace("HERE/data.json", "data.json")


@pytest.mark.slow
@pytest.mark.skipif(not can_make(), reason="needs root, ip, unshare and nsenter")
def test_one_machine_cuts_the_crops_and_another_trains_with_a_bucket_between_them(
    pair: Pair, server: str, small_run: SmallRun, tmp_path: Path
) -> None:
    """The version has the weights of a run on one disk."""
    sets = [word for key in SHORT for word in ("--set", key)]
    overrides = str(SHORT).replace("'", '"')
    pair.prefect(
        "deployment", "run", "prepare/data", "-p", "config=run.toml", "-p", f"overrides={overrides}", "--watch"
    )
    ends = "published version 1", "Finished in state Failed"
    assert within(PATIENCE_S, lambda: any(end in pair.trainer.read("worker.log") for end in ends), every_s=1.0)
    made, trained = pair.data.read("worker.log"), pair.trainer.read("worker.log")
    assert "published version 1" in trained, trained[-3000:]
    assert "stage1_pixels" in made and "stage1_lora" not in made
    assert not [line for line in trained.splitlines() if "_pixels" in line and ": built" in line], (
        "made by the other one"
    )
    assert "champion" in pair.deepfloyd(pair.data, "ls", WORKSPACE)
    pair.deepfloyd(pair.data, "verify", WORKSPACE)
    pair.deepfloyd(pair.data, "publish", WORKSPACE, "1", "published")
    there = pair.data.read("published/SHA256SUMS")

    done = small_run.call_here("run", str(small_run.config), *sets)
    assert done.returncode == 0, done.stderr
    assert small_run.call_here("publish", str(small_run.workspace), "1", str(tmp_path / "published")).returncode == 0
    here = (tmp_path / "published" / "SHA256SUMS").read_text()
    weights = [line for line in here.splitlines() if line.endswith(".safetensors")]
    assert len(weights) == 2 and weights == [line for line in there.splitlines() if line.endswith(".safetensors")]
