"""Pictures of `generate` and `upscale` have the same bytes in one go, after SIGKILLs, and by the real deployment."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from narrowing import known
from PIL import Image
from prefect.deployments.runner import RunnerDeployment
from prefect_api import PrefectApi
from small_run import NewSmallRun, SmallRun

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PROMPTS, SEEDS, PICTURES = ("a purple star", "a red circle"), "3-4", 4
STEPS = ("stage1.validation_num_inference_steps=20", "stage2.validation_num_inference_steps=4")  # 0.2 s a picture
COMMAND = (
    *(word for prompt in PROMPTS for word in ("--prompt", prompt)), "--seeds", SEEDS, "--version", "base",
    *(word for key in STEPS for word in ("--set", key)),
)  # fmt: skip


@pytest.fixture(scope="module")
def whole(server: str, tmp_path_factory: pytest.TempPathFactory, new_small_run: NewSmallRun) -> dict[str, bytes]:
    """The pictures of an unbroken command, by name."""
    run = new_small_run(tmp_path_factory.mktemp("whole") / "run", 0)
    done = run.call_here("generate", str(run.config), *COMMAND)
    assert done.returncode == 0, done.stderr
    drawn = _pictures(run)
    assert len(drawn) == 2 * PICTURES
    return drawn


def _pictures(run: SmallRun) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in run.workspace.glob("*/*/*.png") if file.name != "sheet.png"}


def _finished(run: SmallRun) -> dict[Path, int]:
    """The pictures that an unfinished request has recorded as whole, and when each was written."""
    records = run.workspace.glob("*/*/.part-*.png.json")
    files = [file.with_name(file.name.removeprefix(".part-").removesuffix(".json")) for file in records]
    return {file: file.stat().st_mtime_ns for file in files}


def _killed(run: SmallRun, command: tuple[str, ...], after: int, before: int) -> dict[Path, int]:
    """Begin a command in a session of its own and SIGKILL all its processes when some pictures are finished. Returns those.

    before: so many are.
    """
    process = run.start_here(run.folder / "killed.log", *command)
    deadline = time.monotonic() + 300
    while process.is_alive() and time.monotonic() < deadline and len(_finished(run)) < after:
        time.sleep(0.002)
    os.killpg(known(process.pid), signal.SIGKILL)
    process.join()
    finished = _finished(run)
    assert after <= len(finished) < before, (run.folder / "killed.log").read_text()
    return finished


def test_after_a_kill_in_each_stage_the_pictures_are_the_same_and_none_is_drawn_twice(
    whole: dict[str, bytes], new_small_run: NewSmallRun, tmp_path: Path
) -> None:
    run = new_small_run(tmp_path / "run", 0)
    command = "generate", str(run.config), *COMMAND
    first = _killed(run, command, 1, PICTURES)
    second = _killed(run, command, PICTURES + 1, 2 * PICTURES)
    assert first.items() <= second.items()
    done = run.call_here(*command)
    assert done.returncode == 0, done.stderr
    assert {file: file.stat().st_mtime_ns for file in second} == second
    assert _pictures(run) == whole


def test_a_kill_while_a_large_picture_is_upscaled_costs_that_alone(
    server: str, new_small_run: NewSmallRun, tmp_path: Path
) -> None:
    runs = [new_small_run(tmp_path / name, 0) for name in ("whole", "broken")]
    for run in runs:
        (run.folder / "own").mkdir()
        for name, width in (("1.png", 16), ("2.png", 1100)):
            Image.linear_gradient("L").resize((width, 8)).convert("RGB").save(run.folder / "own" / name)
    whole, killed = (("upscale", str(run.config), str(run.folder / "own"), "--version", "base") for run in runs)
    assert runs[0].call_here(*whole).returncode == 0
    finished = _killed(runs[1], killed, 1, 2)
    done = runs[1].call_here(*killed)
    assert done.returncode == 0, done.stderr
    assert {file: file.stat().st_mtime_ns for file in finished} == finished
    assert _pictures(runs[1]) == _pictures(runs[0]) and len(_pictures(runs[0])) == 2


def test_the_deployment_draws_the_same_pictures(
    server: str, whole: dict[str, bytes], new_small_run: NewSmallRun, tmp_path: Path
) -> None:
    """The one of prefect.yaml; its run in a process of its own, as that of a worker."""
    project, api = new_small_run(tmp_path / "project", 0), PrefectApi(server)
    entries = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
    (entry,) = (one for one in entries if one["entrypoint"] == "flows.generate:generate" and one["name"] == "pictures")
    (project.folder / "prefect.yaml").write_text("deployments: []\n")
    RunnerDeployment.from_entrypoint(entry["entrypoint"], name="same-bytes").apply()
    parameters = {
        **entry["parameters"], "config": "run.toml", "prompt": list(PROMPTS), "seeds": SEEDS, "version": "base",
        "overrides": list(STEPS),
    }  # fmt: skip
    flow_run = api.run("generate/same-bytes", parameters)
    done = subprocess.run(
        [sys.executable, "-P", "-m", "prefect.engine", flow_run], cwd=project.folder,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert api.state(flow_run) == "COMPLETED", done.stdout + done.stderr
    assert _pictures(project) == whole
