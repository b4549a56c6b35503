"""Embeds, samples and generated pictures in parts: the same bytes here and on Ray and Dask, also when workers are killed."""

import os
import shutil
import subprocess
import threading
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import psutil
import pytest
from polling import within
from runner_runs import BEHIND_A_PROXY, SHARDS, all_recorded, dask_cluster, installed, kill_a_worker, products_of
from small_run import NewSmallRun, SmallRun

from deepfloyd_core.processes.gpu_slot import free_gpu

PARTS = ("text_embeds/*/*.arrow", "text_embeds/*/*.png", "cascade_samples/**/*.p*")
MADE_ANEW = ("text_embeds", "cascade_samples")
CHANGED = (
    "embed_file_mib=0.1", "text_encoder_streaming=true",  # many files, each of which takes a while
    "num_validation_images=5", "num_upscaled_images=3", 'validation_resolution="64,96x64"', "forgetting_probes=2",
    "stage1.sample_batch_size=2", "stage2.low_res_noise=40", "stage2.validation_noise_levels=[0, 20]",
    "stage1.max_train_steps=1", "stage2.max_train_steps=1", "stage1.validation_step_interval=0",
)  # fmt: skip


def _settings(*more: str) -> list[str]:
    return [word for setting in (*CHANGED, *more) for word in ("--set", setting)]


@pytest.fixture(scope="module")
def finished(
    server: str, tmp_path_factory: pytest.TempPathFactory, new_small_run: NewSmallRun
) -> tuple[SmallRun, dict[str, str]]:
    """A run with some hundred captions, and all that one process each made of it."""
    run = new_small_run(tmp_path_factory.mktemp("parts") / "run", 8)
    for number, file in enumerate(sorted(run.pictures.glob("*.txt"))):
        file.write_text("".join(f"a purple star, {number} times {times} as bright\n" for times in range(25)))
    done = run.call_here("run", str(run.config), *_settings())
    assert done.returncode == 0, done.stderr
    products = products_of(run, (*SHARDS, *PARTS))
    assert sum("embeds-" in name for name in products) > 30
    assert sum(name.startswith("cascade_samples") for name in products) > 30
    return run, products


def _without(run: SmallRun, *kinds: str) -> SmallRun:
    for kind in kinds:
        shutil.rmtree(run.workspace / kind)
    return run


def _is_busy(process: psutil.Process) -> bool:
    """Whether a worker of a cluster, and no process above it, has a part's job."""
    return any(map(_has_job, process.children())) and process.cmdline()[2] != "flows"


def _has_job(process: psutil.Process) -> bool:
    with suppress(psutil.Error):  # it has ended meanwhile
        return "job_worker" in " ".join(process.cmdline())
    return False


def _killed_twice(flow: "subprocess.Popen[str]", root: int, run: SmallRun, embed_files: int) -> list[bool]:
    """SIGKILL a worker in the middle of the embeds, and one in the middle of the samples."""

    def is_time(pattern: str, least: int, most: int) -> bool:
        return least <= len(list(run.workspace.glob(pattern))) < most

    embeds, samples = "text_embeds/*/.part-embeds*", "cascade_samples/*/.drawn/.part-*"
    return [
        kill_a_worker(flow, root, lambda: is_time(embeds, 2, embed_files), _is_busy),
        kill_a_worker(flow, root, lambda: is_time(samples, 2, 12), _is_busy),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ray", "dask"])
def test_parts_on_a_cluster_make_the_same_bytes_and_a_killed_worker_costs_what_its_part_was_making(
    finished: tuple[SmallRun, dict[str, str]], server: str, kind: str
) -> None:
    """On Dask, shards as well, on a cluster elsewhere; it is ended only when the flow is over."""
    installed(kind)
    run, expected = finished
    settings = [f"task_runner={kind}", "workers=2", "embed_workers=3", "sample_workers=3"]
    if kind == "ray":
        _run_and_kill(_without(run, *MADE_ANEW), expected, settings, None)
        return
    start = datetime.now(UTC)
    with dask_cluster(run.folder) as (address, process_id):
        _without(run, *MADE_ANEW, "stage1_pixels", "stage2_pixels")
        _run_and_kill(run, expected, [*settings, f"task_runner_address={address}"], process_id)
        all_recorded(server, run, start, expected)
        _a_flow_that_is_killed_leaves_no_part(_without(run, "text_embeds"), address, process_id)


def _run_and_kill(run: SmallRun, expected: dict[str, str], settings: list[str], cluster: int | None) -> None:
    with (run.folder / "killed.log").open("w+") as log:
        flow = subprocess.Popen(
            run.command("run", str(run.config), *_settings(*settings)), cwd=run.folder, stdout=log, stderr=log,
            text=True, env=os.environ | BEHIND_A_PROXY,
        )  # fmt: skip
        embed_files = sum("embeds-" in name for name in expected)
        killed = _killed_twice(flow, cluster or flow.pid, run, embed_files)
        code = flow.wait(300)
        log.seek(0)
        printed = log.read()
    assert (killed, code) == ([True, True], 0), printed
    assert products_of(run, (*SHARDS, *PARTS)) == expected
    assert "in each of 3 parts" in printed
    assert not list(run.workspace.glob("*/*/.*")), "no working state is left"


def _a_flow_that_is_killed_leaves_no_part(run: SmallRun, address: str, cluster: int) -> None:
    """The jobs of the parts are gone as soon as Dask notices it, and do not go on for hours."""
    settings = _settings("task_runner=dask", f"task_runner_address={address}", "embed_workers=2")
    flow = subprocess.Popen(run.command("embed", str(run.config), *settings), cwd=run.folder)

    def jobs() -> int:
        return sum(_has_job(one) for one in psutil.Process(cluster).children(recursive=True))

    assert within(120, lambda: any(run.workspace.glob("text_embeds/*/.part-embeds*")), every_s=0.01)
    assert jobs()
    flow.kill()
    flow.wait()
    assert within(60, lambda: not jobs(), every_s=0.1)


@pytest.mark.slow
def test_processes_of_this_machine_draw_parts_with_the_same_bytes(
    finished: tuple[SmallRun, dict[str, str]], tmp_path: Path
) -> None:
    run, expected = finished
    done = _without(run, "cascade_samples").call_here("run", str(run.config), *_settings("sample_workers=3"))
    assert done.returncode == 0, done.stderr
    assert products_of(run, (*SHARDS, *PARTS)) == expected
    asked = ("--prompt", "a purple star", "--prompt", "a red circle", "--seeds", "3-5", "--sizes", "64,72x64")
    drawn = []
    for workers in (1, 3):
        done = run.call_here(
            "generate", str(run.config), *asked, "--version", "base", *_settings(f"sample_workers={workers}")
        )
        assert done.returncode == 0, done.stderr
        drawn.append(products_of(run, ("generated/*/*.p*",)))
        shutil.move(run.workspace / "generated", tmp_path / f"by-{workers}")
    assert drawn[0] == drawn[1] and len(drawn[0]) == 2 * 2 * 3 * 2 + 2


def test_each_part_of_a_machine_gets_a_gpu_that_no_other_has_and_waits_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    got: list[int] = []

    def third() -> None:
        with free_gpu(["GPU-a", "GPU-b"]) as (number, _):
            got.append(number)

    waiting = threading.Thread(target=third)
    with free_gpu(["GPU-a", "GPU-b"]) as (first, _):
        with free_gpu(["GPU-a", "GPU-b"]) as (second, _):
            waiting.start()
            waiting.join(0.2)
            assert (first, second, got) == (0, 1, [])
        waiting.join(30)
        assert got == [1]
    with free_gpu(["GPU-b"]) as (number, _):
        assert number == 0, "the number is among those that a worker sees"
