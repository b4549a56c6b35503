"""Shards on Prefect's task runners: the same bytes from any of them, for any number of workers, also when a worker dies."""

import os
import socket
import subprocess
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_world import DataWorld
from polling import within
from runner_runs import BEHIND_A_PROXY, all_recorded, installed, kill_a_worker, products_of, shards_of, task_states
from small_run import NewSmallRun, SmallRun

from deepfloyd_core.config.cluster import reach
from deepfloyd_core.crops.identity import pixels_request
from deepfloyd_core.crops.pixels import in_groups, plan_shards
from deepfloyd_core.errors import ConfigError
from deepfloyd_core.preflight.load import load_run
from deepfloyd_core.store.artifacts import WorkDir


def _arguments(run: SmallRun, kind: str, workers: int, *more: str) -> list[str]:
    # 0.2 MiB: one picture of 256 px in a shard, so that there are enough of them to kill a worker in the middle.
    settings = (f"task_runner={kind}", f"workers={workers}", *more)
    return ["prepare", str(run.config), *(word for setting in settings for word in ("--set", setting))]


@pytest.fixture(scope="module")
def copies(
    server: str, tmp_path_factory: pytest.TempPathFactory, new_small_run: NewSmallRun
) -> tuple[SmallRun, dict[str, str]]:
    """A small run and what two threads made of it; its workspace is emptied by whoever runs it again."""
    run = new_small_run(tmp_path_factory.mktemp("runners") / "run", 14)
    done = run.call_here(*_arguments(run, "threads", 2))
    assert done.returncode == 0, done.stderr
    products = products_of(run)
    assert len(shards_of(products)) > 12
    return run, products


@pytest.fixture
def again(copies: tuple[SmallRun, dict[str, str]], tmp_path: Path) -> tuple[SmallRun, dict[str, str]]:
    """The same run with an empty workspace."""
    run, expected = copies
    if run.workspace.exists():
        run.workspace.rename(tmp_path / "earlier")
    return run, expected


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 4])
def test_any_number_of_threads_makes_the_same_bytes_and_its_task_runs_are_recorded(
    again: tuple[SmallRun, dict[str, str]], server: str, workers: int
) -> None:
    run, expected = again
    start = datetime.now(UTC)
    done = run.call_here(*_arguments(run, "threads", workers))
    assert done.returncode == 0, done.stderr
    assert "Task run" not in done.stderr, "the workers' records go to the server, not to the terminal"
    assert products_of(run) == expected
    all_recorded(server, run, start, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "is_worker"),
    [
        ("processes", lambda command: "spawn_main" in command),
        ("ray", lambda command: command.startswith("ray::stage2")),
        ("dask", lambda command: "spawn_main" in command),
    ],
    ids=["processes", "ray", "dask"],
)
def test_every_other_runner_makes_the_same_bytes_and_a_killed_worker_costs_its_shards_a_retry(
    again: tuple[SmallRun, dict[str, str]], server: str, kind: str, is_worker: Callable[[str], bool]
) -> None:
    installed(kind)
    run, expected = again
    start = datetime.now(UTC)
    with (run.folder / "killed.log").open("w+") as log:
        process = subprocess.Popen(
            run.command(*_arguments(run, kind, 2)), cwd=run.folder, stdout=log, stderr=log, text=True,
            env=os.environ | BEHIND_A_PROXY,
        )  # fmt: skip
        killed = kill_a_worker(
            process,
            process.pid,
            lambda: len(list(run.workspace.glob("stage2_pixels/*/.part-*"))) >= 3,
            lambda child: is_worker(" ".join(child.cmdline())),
        )
        code = process.wait(300)
        log.seek(0)
        printed = log.read()
    assert (killed, code) == (True, 0), printed
    assert products_of(run) == expected

    def completed() -> Counter[str]:
        return Counter(shard for shard, state in task_states(server, run, start, expected) if state == "COMPLETED")

    assert within(60, lambda: sorted(completed()) == shards_of(expected), every_s=0.5), completed()
    # A worker tells the server before the flow: what was told of just before the pool went down is run once more.
    assert completed().total() <= len(completed()) + 2
    assert "Task run" not in printed, "the workers' records go to the server, not to the terminal"


@pytest.mark.slow
def test_a_cluster_that_does_not_answer_is_named_before_any_work(again: tuple[SmallRun, dict[str, str]]) -> None:
    installed("dask")
    run, _ = again
    done = run.call_here(*_arguments(run, "dask", 2, "task_runner_address=tcp://127.0.0.1:1"))
    assert done.returncode == 2
    assert "no Dask cluster can be reached there (Connection refused)" in done.stderr
    assert not list(run.workspace.glob("image_index/*"))


@pytest.mark.parametrize(
    ("runner", "address", "said"),
    [
        ("threads", "10.0.0.1:8786", "threads run on this machine"),
        ("processes", "10.0.0.1:8786", "processes run on this machine"),
        ("ray", "tcp://10.0.0.1:8786", "ray takes for example 10.0.0.1:6379 or ray://"),
        ("ray", "auto", "ray takes for example"),
        ("dask", "10.0.0.1", "dask takes for example tcp://10.0.0.1:8786"),
        ("dask", "tcp://10.0.0.1:port", "dask takes for example"),
        ("dask", "tcp://10.0.0.1:8786/path", "dask takes for example"),
        ("slurm", None, "task_runner"),
    ],
)
def test_an_address_that_cannot_be_is_refused(small_run: SmallRun, runner: str, address: str | None, said: str) -> None:
    installed(runner)
    overrides = [f"task_runner={runner}"] + ([f"task_runner_address={address}"] if address else [])
    with pytest.raises(ConfigError, match=said):
        load_run(small_run.config, tuple(overrides))


@pytest.mark.parametrize("runner", ["ray", "dask"])
def test_a_missing_package_is_named_with_the_command_that_installs_it(
    small_run: SmallRun, runner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError) as error:
        load_run(small_run.config, (f"task_runner={runner}",))
    assert f"pip install 'deepfloyd-pipeline[{runner}]'" in str(error.value)
    assert len(str(error.value).splitlines()) <= 2


def test_reaching_a_cluster_is_one_connection_or_one_clear_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        reach("ray", f"127.0.0.1:{port}")
        reach("dask", f"tcp://127.0.0.1:{port}")
    with pytest.raises(ConfigError, match="no Ray cluster can be reached there"):
        reach("ray", f"ray://127.0.0.1:{port}")


def test_the_task_runner_is_in_no_fingerprint_and_changes_no_plan(world: DataWorld) -> None:
    world.add("a.png", np.zeros((300, 300, 3), np.uint8))
    world.add("b.png", np.ones((300, 300, 3), np.uint8))
    index = world.index(world.load())
    found = set()
    others: dict[str, Any] = {"task_runner": "processes", "workers": 7}
    for run in (world.load(), world.load(**others)):
        work = WorkDir(run.workspace / "stage1_pixels" / "work", 0)
        work.path.mkdir(parents=True, exist_ok=True)
        names = tuple(shard.name for shard in plan_shards(run, index, 1, work).made)
        found.add((pixels_request(run, index, 1).fingerprint, names))
    assert len(found) == 1


def test_more_shards_than_task_runs_go_in_groups_in_their_order(world: DataWorld) -> None:
    for number in range(8):
        world.add(f"{number}.png", np.full((300, 300, 3), number, np.uint8))
    run = world.load(shard_mib=0.2)
    work = WorkDir(run.workspace / "stage2_pixels" / "work", 0)
    work.path.mkdir(parents=True)
    shards = plan_shards(run, world.index(run), 2, work).made
    assert len(shards) == 8
    assert [len(group) for group in in_groups(shards, 3)] == [3, 3, 2]
    assert [shard for group in in_groups(shards, 3) for shard in group] == list(shards)
    assert [len(group) for group in in_groups(shards, 500)] == [1] * 8
    assert in_groups((), 500) == []
