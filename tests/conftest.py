"""Fixtures that several files share: a world of pictures, a small run on the tiny cascade, one real Prefect server."""

import fcntl
import gc
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from data_world import DataWorld
from small_run import NewSmallRun, SmallRun, make_small_run

from deepfloyd_core.processes.pool import Children, Limits
from flows.serving.server import prefect_server, see_environment

gc.disable()  # until all is imported, of which nothing is garbage
# One thread: two would spin against the other processes of a test, and rounding would differ between their counts.
os.environ["OMP_NUM_THREADS"] = "1"
# What a test writes need not survive a power cut; the tests of what is forced to the disk look for the calls.
os.fsync = lambda fd: None
# Tests call the core outside of flow runs, in processes where another test may have imported Prefect.
os.environ["PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW"] = "ignore"
# A shell script starts its `&` jobs with SIGINT ignored, nohup with SIGHUP; what a test starts would then ignore it as well.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

_LONGEST = (
    "test_year", "test_flows", "test_demo", "test_unattended", "test_runners", "test_killed_runs", "test_trainer", "test_ui",
    "test_compose", "test_stopping", "test_gpu_day", "test_gc_runs", "test_postgresql", "test_embeds",
    "test_quantized", "test_server", "test_outbox", "test_remakes", "test_random_weights", "test_compiled",
    "test_cascade", "test_warm", "test_web_server", "test_history_kept", "test_killed_training", "test_tiny_cascade",
    "test_controlnet", "test_hostile_pictures", "test_pool", "test_data_stages", "test_sources", "test_bitfit",
    "test_data_options", "test_full", "test_lora", "test_killed_data_stages", "test_start_from",
)  # fmt: skip


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Two processes more than cores: tests also wait, for servers and for what they started."""
    return len(os.sched_getaffinity(0)) + 2 if hasattr(os, "sched_getaffinity") else os.cpu_count() or 2


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest come first, so that no core waits for the other at the end."""
    items.sort(key=lambda item: _LONGEST.index(item.path.stem) if item.path.stem in _LONGEST else len(_LONGEST))


def pytest_collection_finish() -> None:
    """What was imported stays: the collector need not look at it again, nor copy its pages into forks."""
    gc.enable()
    gc.freeze()


@pytest.fixture
def small_run(tmp_path: Path) -> SmallRun:
    """A fresh small run."""
    return make_small_run(tmp_path)


@pytest.fixture(scope="session")
def children() -> Iterator[Children]:
    """Two processes that judge pictures, for all tests: starting them takes half a second."""
    with Children(2, Limits(), ("deepfloyd_core.index.index",)) as children:
        yield children


@pytest.fixture
def world(tmp_path: Path, children: Children) -> DataWorld:
    """An empty world of pictures."""
    (tmp_path / "pictures").mkdir()
    return DataWorld(tmp_path, children)


@pytest.fixture(scope="session")
def new_world(children: Children) -> Callable[[Path], DataWorld]:
    """Make further worlds, for fixtures of a wider scope."""
    return lambda folder: DataWorld(folder, children)


@pytest.fixture(scope="session")
def new_small_run() -> NewSmallRun:
    """Make further small runs, for fixtures of a wider scope."""
    return make_small_run


def _session_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of a test session share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real Prefect server on a free loopback port with a home of its own; child processes find it by PREFECT_API_URL.

    All processes of a test session share it: the first to need it starts it.
    """
    with prefect_server(_session_folder(tmp_path_factory) / "prefect-home") as url:
        yield url


@pytest.fixture
def server_here(server: str) -> str:
    """The same server, for flows that the test itself calls: Prefect has read the environment in an earlier test."""
    see_environment()
    return server


@pytest.fixture
def prefect_home(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home of Prefect with an empty database, for a server of a test's own, which takes 5 s to make one."""
    made, home = _session_folder(tmp_path_factory) / "prefect-database", tmp_path / "home"
    made.mkdir(exist_ok=True)
    with (made / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (made / "is_whole").exists():
            command = [sys.executable, "-P", "-m", "prefect", "server", "database", "upgrade", "--yes"]
            environ = {key: value for key, value in os.environ.items() if not key.startswith("PREFECT_")}
            subprocess.run(command, env=environ | {"PREFECT_HOME": str(made)}, check=True, capture_output=True)
            (made / "is_whole").touch()
    home.mkdir(mode=0o700)
    shutil.copy(made / "prefect.db", home)
    return home
