"""Jobs in processes: forks of one that is gone with its flow, each with its log, its lock and its last checkpoint."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from job_functions import Order, Pids

from deepfloyd_core.config.run import RunConfig
from deepfloyd_core.config.run_machine import Machine
from deepfloyd_core.errors import DeepFloydError, JobError, StorageError
from deepfloyd_core.processes import jobs
from deepfloyd_core.processes.fork_server import ForkServer
from deepfloyd_core.processes.jobs import job_starter, run_job, run_parts, warm_job_starter
from deepfloyd_core.store.artifacts import Request, WorkDir, materialise
from deepfloyd_core.text.embeds import EncodeRequest, encode_parts
from deepfloyd_core.types import Report, no_report

TESTS = Path(__file__).parent
SUPPORT = TESTS.parent / "support"
AGAIN = "is tried once more"
CONFIG = RunConfig.model_validate(
    {"workspace": "w", "data_backend_config": "d.json", "stage1": {"model_flavour": "tiny-i"}}
)


@pytest.fixture(autouse=True)
def light(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs without torch."""
    monkeypatch.setenv("PYTHONPATH", str(SUPPORT))
    monkeypatch.setattr(jobs, "ForkServer", lambda *_: ForkServer("job_functions"))


def run(
    name: str,
    workspace: Path,
    number: int = 0,
    how: Callable[[Order, WorkDir, Report], Pids] = run_job,
    words: str = "x",
) -> dict[str, Any]:
    """One job that makes an artifact. Returns its summary."""
    request = Request(name, 0, {"number": number}, {})
    order = Order(machine=CONFIG, function=name, words=words)
    return materialise(workspace, request, lambda work: how(order, work, no_report)).manifest.summary


@pytest.mark.parametrize("words", ["x", "safetensors"])
def test_a_job_on_a_full_disk_is_a_sentence_that_names_its_folder(tmp_path: Path, words: str) -> None:
    with pytest.raises(StorageError) as caught:
        run("full", tmp_path, words=words)
    assert str(caught.value).startswith(f"{tmp_path}/full/") and "Traceback" not in str(caught.value)
    assert " cannot be written: no space left on device" in str(caught.value)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
def test_a_job_whose_result_the_disk_does_not_take_either_is_the_same_sentence(tmp_path: Path, number: int) -> None:
    with pytest.raises(StorageError) as caught:
        run("fuller", tmp_path, words=str(number))
    reason = os.strerror(number)
    assert f" cannot be written: {reason[:1].lower()}{reason[1:]} (" in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path}/fuller/")


def test_a_job_that_may_not_read_a_file_names_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(
        StorageError, match=r"^/models/unet cannot be used: permission denied .* Change its permissions"
    ):
        run("unreadable", tmp_path)
    assert AGAIN not in caplog.text


def napping(workspace: Path) -> psutil.Process:
    """The job, once it has begun."""
    while True:
        for path in workspace.glob("nap/*/.job-work.progress"):
            with suppress(FileNotFoundError, psutil.NoSuchProcess):  # the next try begins
                if text := path.read_text():
                    return psutil.Process(int(text.split('"')[1]))
        time.sleep(0.01)


def starters() -> list[psutil.Process]:
    """Of this process; another test may have other children."""
    return [child for child in psutil.Process().children() if "job_functions" in child.cmdline()]


def test_the_jobs_of_a_block_are_forks_of_one_process_that_ends_with_it(tmp_path: Path) -> None:
    with job_starter():
        first = run("pids", tmp_path, 1)
        with job_starter():
            second = run("pids", tmp_path, 2)
        assert psutil.pid_exists(first["starter"])
    assert first["starter"] == second["starter"] != os.getpid()
    assert first["job"] != second["job"]
    assert not psutil.pid_exists(first["starter"])
    alone = run("pids", tmp_path, 3)
    assert alone["starter"] != first["starter"]
    assert not psutil.pid_exists(alone["starter"])
    assert not starters()


def test_a_process_that_imports_ahead_is_the_one_of_the_jobs_and_ends_without_one(tmp_path: Path) -> None:
    with warm_job_starter(()):
        (ahead,) = starters()
        with warm_job_starter(()):
            made = run("pids", tmp_path, 1)
    assert made["starter"] == ahead.pid and not starters()
    with warm_job_starter(()):
        assert starters()
    assert not starters(), "no job came"


def test_parts_at_once_are_forks_of_the_same_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Pids] = []

    def noted(*given: Any) -> Pids:
        seen.append(run_job(*given))
        return seen[-1]

    monkeypatch.setattr(jobs, "run_job", noted)
    run("pids", tmp_path, how=lambda order, work, report: run_parts(order, [order] * 3, work, report))
    assert len({one.job for one in seen}) == 4
    assert len({one.starter for one in seen}) == 1


def test_a_request_takes_the_memory_of_its_bytes_whatever_signs_its_captions_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captions = ("\N{GRINNING FACE}", *["a red circle"] * 200_000)
    machine = Machine(embed_workers=3)
    order = EncodeRequest(machine=machine, text=CONFIG, captions=captions, encoder_name="t5", encoder=tmp_path)
    assert [part.captions is order.captions for part in encode_parts(order)] == [True] * 3
    written: list[int] = []

    def stopped(path: Path, data: bytes) -> None:
        written.extend((len(data), tracemalloc.get_traced_memory()[1]))
        raise JobError("enough")

    monkeypatch.setattr(jobs, "write_bytes", stopped)
    tracemalloc.start()
    with pytest.raises(JobError, match="enough"):
        run_job(order, WorkDir(tmp_path, 0))
    tracemalloc.stop()
    size, most = written
    assert most < 1.5 * size


def test_what_a_job_prints_is_in_its_log_and_how_it_died_in_the_error(tmp_path: Path) -> None:
    with job_starter():
        with pytest.raises(
            JobError, match=r"(?s)killed by SIGKILL, twice.*too much memory.*the last words\nthe last words"
        ):
            run("die", tmp_path)
        summary = run("pids", tmp_path)  # the next one has nothing of it
    assert summary["job"]


def test_a_job_that_is_asked_to_end_while_it_writes_its_result_writes_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with job_starter():
        assert run("late", tmp_path) == {"late": 1}
        with pytest.raises(JobError, match="was stopped; run it again to continue"):
            run("late", tmp_path, 1, words="stopped")
    assert AGAIN not in caplog.text


def test_a_job_that_died_without_a_word_is_told_so(tmp_path: Path) -> None:
    def kill_twice() -> None:
        first = napping(tmp_path)
        first.kill()
        while (second := napping(tmp_path)) == first:
            time.sleep(0.01)
        second.kill()

    killer = threading.Thread(target=kill_twice)
    killer.start()
    with pytest.raises(JobError, match=r"killed by SIGKILL.*Its log is \S+, which is empty\.$"), job_starter():
        run("nap", tmp_path)
    killer.join()


@pytest.mark.parametrize("code", [1, 120, 127, 255])
def test_an_exit_code_is_not_taken_for_a_file_systems_error(tmp_path: Path, code: int) -> None:
    with pytest.raises(JobError, match=rf"(?s)ended with exit code {code}\. .*the last words"), job_starter():
        run("leave", tmp_path, words=str(code))


def test_a_job_that_fails_was_not_killed_and_no_memory_is_blamed(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"(?s)ended with exit code 1\. Its log .*RuntimeError: the last words$"):
        run("burst", tmp_path)


def test_a_job_that_is_left_writes_its_checkpoint_and_is_gone(tmp_path: Path) -> None:
    class Left(Exception):
        pass

    def leave(done: int, total: int, line: str) -> None:
        raise Left

    def how(order: Order, work: WorkDir, report: Report) -> Pids:
        return run_job(order, work, leave)

    with job_starter(), pytest.raises(Left):
        run("nap", tmp_path, how=how)
    assert list(tmp_path.glob("nap/*/checkpoint"))
    assert not starters()


def test_a_job_that_is_killed_once_goes_on_where_it_was(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert run("die_once", tmp_path)["job"]
    assert caplog.messages[-2:-1] == [f"The work job was killed by SIGKILL; it {AGAIN}, and goes on where it was."]


def test_a_starter_that_is_killed_is_replaced_and_its_job_writes_its_checkpoint_and_goes_on(tmp_path: Path) -> None:
    killer = threading.Thread(target=lambda: os.kill(napping(tmp_path).ppid(), signal.SIGKILL))
    killer.start()
    with job_starter():
        assert run("nap", tmp_path) == {"late": 1}
        killer.join()
        assert list(tmp_path.glob("nap/*/checkpoint"))
        assert run("pids", tmp_path)["starter"] == starters()[0].pid
    assert not starters()


@pytest.mark.parametrize("times", [1, 2])
def test_a_starter_that_is_killed_before_its_first_job_is_replaced_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    slow = tmp_path / "slow"
    slow.mkdir()
    for number in range(times):
        (slow / str(number)).touch()
    monkeypatch.setenv("SLOW_STARTS", str(slow))

    def kill() -> None:
        for number in range(times):
            while (slow / str(number)).exists():
                time.sleep(0.01)
            starters()[-1].kill()

    killer = threading.Thread(target=kill)
    with job_starter():
        killer.start()
        with pytest.raises(JobError, match="starts child processes has ended") if times == 2 else nullcontext():
            assert run("pids", tmp_path)["job"]
        killer.join()
        assert run("pids", tmp_path, 1)["job"]


def test_parts_of_a_run_that_is_asked_to_end_end_with_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Left(BaseException):
        pass

    def leave(done: int, total: int, line: str) -> None:
        if done == 2:
            raise Left

    began = time.monotonic()
    with pytest.raises(Left):
        run("nap", tmp_path, how=lambda order, work, report: run_parts(order, [order] * 2, work, leave))
    assert time.monotonic() - began < 30  # a nap is longer
    assert list(tmp_path.glob("nap/*/checkpoint")) and AGAIN not in caplog.text and not starters()


def test_what_no_job_uses_is_not_there_for_the_imports_and_is_there_for_a_job(tmp_path: Path) -> None:
    (tmp_path / "asks.py").write_text("from importlib.util import find_spec\nfound = find_spec('scipy')")
    ask = """
import sys
from deepfloyd_core.processes.job_worker import import_for_jobs
import_for_jobs(["asks"])
assert sys.modules["asks"].found is None
import scipy
import_for_jobs(["deepfloyd_core.files"])
assert sys.modules["scipy"] is scipy
"""
    subprocess.run([sys.executable, "-c", ask], check=True, env=os.environ | {"PYTHONPATH": str(tmp_path)})


def test_a_starter_that_cannot_begin_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "ForkServer", lambda *_: ForkServer("no_such_module"))
    with pytest.raises(JobError, match="starts child processes has ended"):
        run("pids", tmp_path)
    with warm_job_starter(()), pytest.raises(JobError, match="starts child processes has ended"):
        run("pids", tmp_path, 2)
    logs = sorted(tmp_path.rglob(".job-*.log"))
    assert len(logs) == 2 and all("No module named no_such_module" in log.read_text() for log in logs)


PROGRAM = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_jobs
from deepfloyd_core.processes import jobs
from deepfloyd_core.processes.fork_server import ForkServer
from deepfloyd_core.processes.gpu_slot import gpu_slot
jobs.ForkServer = lambda *_: ForkServer("job_functions")
with gpu_slot(Path(sys.argv[2], "gpu"), "a flow"):
    test_jobs.run("nap", Path(sys.argv[2]))
"""


def test_the_job_of_a_killed_flow_writes_its_checkpoint_and_keeps_lock_and_gpu_until_it_is_gone(tmp_path: Path) -> None:
    flow = subprocess.Popen([sys.executable, "-P", "-c", PROGRAM, str(TESTS), str(tmp_path)])
    job = napping(tmp_path)
    starter = job.parent()
    began = time.monotonic()
    flow.kill()
    flow.wait()
    with (tmp_path / "gpu").open() as slot, pytest.raises(BlockingIOError):
        fcntl.flock(slot, fcntl.LOCK_EX | fcntl.LOCK_NB)
    waiting: list[dict[str, Any]] = []
    other = threading.Thread(target=lambda: waiting.append(run("nap", tmp_path, how=lambda *_: Pids(late=1))))
    other.start()
    other.join(120)
    assert waiting == [{"late": 1}]  # it has the lock now
    assert time.monotonic() - began > 0.25  # while the other wrote
    assert list(tmp_path.glob("nap/*/checkpoint"))
    assert starter is not None
    psutil.wait_procs([job, starter], timeout=60)
    assert not job.is_running()
    assert not starter.is_running()
    with (tmp_path / "gpu").open() as slot:
        fcntl.flock(slot, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.slow
def test_a_job_begins_anew_where_importing_has_reached_for_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A forked CUDA driver refuses every call. The starter here has no real jobs, so a real job's error shows who did it."""
    monkeypatch.setenv("DRIVER", "1")
    order = EncodeRequest(machine=CONFIG, text=CONFIG, captions=("x",), encoder_name="t5", encoder=Path("/nowhere"))
    with job_starter():
        for number in range(2):
            with pytest.raises((JobError, DeepFloydError), match="nowhere"):
                materialise(
                    tmp_path, Request("text_embeds", 0, {"number": number}, {}), lambda work: run_job(order, work)
                )
