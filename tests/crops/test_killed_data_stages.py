"""The ledger and the shards are the same bytes after SIGKILL at any moment, and nothing of a killed run stays behind.

Driven through the core, in a process that imports nothing heavy: `deepfloyd prepare` costs seconds of imports and
Prefect for each kill, and adds only one kill in each stage, which tests/runs/test_killed_runs.py makes.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_world import DataWorld
from PIL import Image
from polling import within

from deepfloyd_core.files import read_sealed

KILLS = int(os.environ.get("DEEPFLOYD_KILLS", "10"))  # 50 take five minutes
ROOT = Path(__file__).parents[2]
SUPPORT = ROOT / "tests" / "support"


def fill(world: DataWorld) -> None:
    """80 pictures of several sizes and formats, every fifth of them not good for anything."""
    for number in range(80):
        rng = np.random.default_rng(number)
        small = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        size = (40, 40) if number % 10 == 0 else (int(rng.integers(260, 400)), int(rng.integers(260, 400)))
        path = world.add(
            f"{number}.{'jpg' if number % 2 else 'png'}", Image.fromarray(small).resize(size), f"picture {number}"
        )
        if number % 20 == 5:
            path.write_bytes(path.read_bytes()[:1500])
        if number % 20 == 15:
            path.write_bytes(b"not a picture")
    os.mkfifo(world.folder / "pictures" / "pipe.png")


def start(run_file: Path) -> "subprocess.Popen[str]":
    """The data stages in a session of their own, when they begin to work."""
    path = os.pathsep.join([str(SUPPORT), str(SUPPORT.parent), str(ROOT)])
    program = "import sys, child_functions; child_functions.make_data(sys.argv[1])"
    with run_file.with_suffix(".log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", program, str(run_file)], env=os.environ | {"PYTHONPATH": path},
            stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True,
        )  # fmt: skip
    assert process.stdout
    with process.stdout:
        assert process.stdout.readline() == "started\n", run_file.with_suffix(".log").read_text()
    return process


def living(session: int) -> list[int]:
    """The processes of a session, the dead ones left out."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, owner = stat.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(owner) == session and state not in "ZX":
            found.append(int(stat.parent.name))
    return found


def all_ended(session: int, seconds: float = 60) -> bool:
    return within(seconds, lambda: not living(session))


def contents(workspace: Path) -> dict[str, Any]:
    """Every file but the locks; of manifests all that is not said for people; of the scan's notes that they are there."""
    found: dict[str, Any] = {}
    for path in sorted(workspace.rglob("*")):
        name = str(path.relative_to(workspace))
        if path.name == "manifest.json":
            found[name] = {key: value for key, value in read_sealed(path, "").items() if key != "provenance"}
        elif path.is_file() and not name.startswith(".locks"):
            found[name] = "notes" if name.startswith(".scan") else path.read_bytes()
    return found


@pytest.mark.slow
def test_data_stages_killed_at_random_moments_end_with_the_bytes_of_an_unbroken_run(world: DataWorld) -> None:
    fill(world)
    unbroken, broken = run_file(world, "unbroken"), run_file(world, "broken")
    process = start(unbroken)
    began = time.monotonic()
    assert process.wait(120) == 0, unbroken.with_suffix(".log").read_text()
    length = time.monotonic() - began
    expected = contents(world.folder / "unbroken")
    assert any(name.endswith("rejected.png") for name in expected)
    assert sum(name.endswith(".parquet") for name in expected) > 20

    rng, kills, ends = np.random.default_rng(0), 0, 0
    while kills < KILLS or not ends:
        process = start(broken)
        # Kills add up in one workspace until a run comes to its end; the next ones begin in an empty one.
        time.sleep(rng.uniform(0, 0.5 * length) if kills < KILLS else 0)
        if kills < KILLS and process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            kills, ends = kills + 1, 0
        code = process.wait(120)
        assert all_ended(process.pid), f"children outlive a run killed {kills} times"
        if code != -signal.SIGKILL:
            assert code == 0, broken.with_suffix(".log").read_text()
            ends += 1
            check_same(contents(world.folder / "broken"), expected)
            check_verified(world.folder / "broken")
            shutil.rmtree(world.folder / "broken")


def run_file(world: DataWorld, name: str) -> Path:
    """The run file of a workspace of this name."""
    entry = {"crop_style": "random", "crop": True, "crop_aspect": "square", "repeats": 1}
    keys: dict[str, Any] = {"shard_mib": 1.0, "num_eval_images": 4, "max_rejected_share": 0.5, "workers": 2}
    world.load(entry, workspace=str(world.folder / name), **keys)
    return (world.folder / "run.json").rename(world.folder / f"{name}.json")


def check_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert list(found) == list(expected)
    assert [name for name in expected if found[name] != expected[name]] == []


def check_verified(workspace: Path) -> None:
    command = [sys.executable, "-P", "-m", "flows", "verify", str(workspace)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
