"""Functions in child processes: real processes, real signals; what one item does to its child is lost, nothing else."""

import contextlib
import io
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import child_functions as functions
import numpy as np
import psutil
import pytest
from PIL import Image

from deepfloyd_core.errors import JobError
from deepfloyd_core.pictures.faults import Unreadable
from deepfloyd_core.processes import pool as module
from deepfloyd_core.processes.pool import Children, Limits, Lost

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "tests" / "support"
LIMITS = Limits(memory_mib=None, seconds=120)
PATIENCE_S = 60.0  # a hang, not a measure of speed: the machine may be busy with other tests
PRELOAD = ("child_functions",)


@pytest.fixture(scope="module")
def children() -> Iterator[Children]:
    with Children(2, LIMITS, PRELOAD) as pool:
        yield pool


def family(pool: Children) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):  # it is replaced just now
        starter = psutil.Process(pool.fork_server.pid)
        return [starter, *starter.children()]
    return []


def alive(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    return [one for one in processes if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]


def gone(processes: Iterable[psutil.Process]) -> bool:
    return not alive(processes)


def wait_for(condition: Callable[[], object], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return bool(condition())


def program(*command: str, cwd: Path | None = None, text: str | None = None) -> "subprocess.Popen[str]":
    """A Python of its own that finds the test functions; the leader of a process group, as in a terminal."""
    path = os.pathsep.join([str(FOLDER), str(ROOT)])
    process = subprocess.Popen(
        [sys.executable, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": path}, cwd=cwd, process_group=0,
    )  # fmt: skip
    if text is not None:
        assert process.stdin
        process.stdin.write(text)
        process.stdin.close()
        process.stdin = None
    return process


def hanging_program(tmp_path: Path) -> "tuple[subprocess.Popen[str], list[psutil.Process]]":
    note = tmp_path / "note"
    process = program("-c", f"from child_functions import hang_forever; hang_forever({str(note)!r})")
    assert wait_for(note.exists, PATIENCE_S), process.communicate()
    assert wait_for(lambda: len(psutil.Process(process.pid).children(recursive=True)) == 3, PATIENCE_S)
    time.sleep(0.3)  # until both children are inside the call that hangs
    return process, psutil.Process(process.pid).children(recursive=True)


def test_results_come_in_the_order_of_the_items(children: Children) -> None:
    naps = [0.1, 0.0, 0.05, *[0.0] * 200, 0.02]
    assert list(children.map(functions.nap, naps)) == naps


@pytest.mark.parametrize(
    ("way", "detail"),
    [
        ("SIGKILL", "the child process died of signal 9 (SIGKILL)"),
        ("segfault", "the child process died of signal 11 (SIGSEGV)"),
        ("abort", "the child process died of signal 6 (SIGABRT)"),
        ("exit code", "the child process ended with exit code 3"),
        ("sys.exit", "the child process ended with exit code 1"),
    ],
)
def test_a_death_costs_its_item_and_is_named(children: Children, way: str, detail: str) -> None:
    assert list(children.map(functions.die, ["a", way, "b"])) == ["A", Lost("killed_decoder", detail), "B"]


def test_five_killers_among_two_hundred_items_are_the_only_ones_lost(children: Children) -> None:
    items = ["fine"] * 200
    for place, way in ((0, "abort"), (60, "SIGKILL"), (61, "segfault"), (130, "exit code"), (199, "SIGKILL")):
        items[place] = way
    results = list(children.map(functions.die, items))
    assert [isinstance(result, Lost) for result in results] == [item != "fine" for item in items]
    assert results.count("FINE") == 195


def test_a_child_that_died_of_bad_luck_costs_nothing(children: Children, tmp_path: Path) -> None:
    assert all(isinstance(result, int) for result in children.map(functions.dies_where_told, [str(tmp_path)] * 20))


def test_an_item_without_an_answer_in_time_is_lost_even_if_its_decoder_never_comes_back() -> None:
    with Children(2, Limits(None, seconds=1.0), PRELOAD) as children:
        began = time.monotonic()
        results = list(children.map(functions.die, ["a", "hang", *"bcdefghijklm", "hang", "n"]))
        assert time.monotonic() - began < 30  # each hangs for ten minutes
    lost = Lost("timeout", "no answer in 1 s")
    assert results == ["A", lost, *"BCDEFGHIJKLM", lost, "N"]


def test_the_clock_runs_for_an_item_and_not_for_its_chunk_nor_for_a_slow_consumer() -> None:
    with Children(1, Limits(None, seconds=1.0), PRELOAD) as children:
        results = children.map(functions.nap, [0.06] * 24)
        first = next(results)
        time.sleep(1.1)
        assert [first, *results] == [0.06] * 24


def test_memory_above_the_limit_is_refused_inside_the_function() -> None:
    with Children(1, Limits(memory_mib=256), PRELOAD) as children:
        assert list(children.map(functions.allocate, [100, 1024, 100])) == ["100 MiB", "refused", "100 MiB"]
        # A function that does not expect it loses its item.
        lost = Lost("killed_decoder", "the child process ran out of memory")
        assert list(children.map(functions.allocate_rashly, [100, 1024, 100])) == ["100 MiB", lost, "100 MiB"]


def test_an_endless_iterable_is_pulled_as_results_are_taken(children: Children) -> None:
    pulled = itertools.count()
    results = children.map(functions.nap, (0.0 * next(pulled) for _ in itertools.repeat(None)))
    assert next(results) == 0
    assert next(pulled) <= 8  # 4 of one item each, for 2 children
    for _ in range(500):
        next(results)
    assert next(pulled) <= 501 + 2 * 64 + 16


def test_a_few_items_are_spread_over_all_children() -> None:
    with Children(3, LIMITS, PRELOAD) as children:
        assert len(set(children.map(functions.process, range(6)))) == 3


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("ValueError", ValueError, "a bug"),
        ("Unreadable", Unreadable, "no such chunk"),
        ("FileNotFoundError", FileNotFoundError, "No such file or directory: '/nowhere/at all'"),
        ("UnicodeDecodeError", UnicodeDecodeError, "invalid start byte"),
    ],
)
def test_what_the_function_raises_is_raised_as_itself_with_the_childs_traceback(
    children: Children, kind: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        list(children.map(functions.fail, [kind]))
    assert type(caught.value) is error
    assert "child_functions.py" in caught.value.__notes__[0]
    if isinstance(caught.value, Unreadable):
        assert caught.value.reason == "corrupt"
    assert list(children.map(functions.nap, [0.0])) == [0.0]


def test_an_exception_that_cannot_be_sent_is_told_in_words(children: Children) -> None:
    with pytest.raises(RuntimeError, match=r"ValueError: <function fail.<locals>.<lambda>"):
        list(children.map(functions.fail, ["unsendable"]))


def test_a_result_that_cannot_be_sent_is_an_error_and_not_a_lost_item(children: Children) -> None:
    with pytest.raises((TypeError, AttributeError), match="pickle"):
        list(children.map(functions.lambdas, [1]))


def test_pictures_are_judged_in_children_as_they_are_here() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    files = []
    for kind in ("PNG", "JPEG", "WEBP", "AVIF", "GIF"):
        stream = io.BytesIO()
        Image.fromarray(noise).save(stream, kind)
        files += [stream.getvalue(), stream.getvalue()[: len(stream.getvalue()) // 2]]
    with Children(2, Limits(), PRELOAD) as limited:
        verdicts = list(limited.map(functions.verdict, [*files, b"no picture"]))
    assert verdicts == [functions.verdict(data) for data in [*files, b"no picture"]]
    assert verdicts.count("good") >= 5 and "truncated" in verdicts and "unsupported" in verdicts


def in_threads(*works: Callable[[], object]) -> None:
    threads = [threading.Thread(target=work, daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert not any(thread.is_alive() for thread in threads)


def test_two_pools_work_at_once_in_threads_that_are_not_the_main_one() -> None:
    found = []

    def work() -> None:
        with Children(2, LIMITS, PRELOAD) as children:
            found.append(list(children.map(functions.die, ["a", "SIGKILL", "b"] * 5)))

    in_threads(work, work)
    lost = Lost("killed_decoder", "the child process died of signal 9 (SIGKILL)")
    assert found == [["A", lost, "B"] * 5] * 2


def test_children_outlive_the_thread_that_opened_them() -> None:
    with contextlib.ExitStack() as stack:
        opened: list[tuple[Children, list[int | Lost]]] = []

        def work() -> None:
            children = stack.enter_context(Children(1, LIMITS, PRELOAD))
            opened.append((children, list(children.map(functions.process, [0]))))

        in_threads(work)
        ((children, pids),) = opened
        assert list(children.map(functions.process, [0])) == pids


def test_a_child_is_replaced_before_what_decoders_leak_adds_up(
    children: Children, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_REQUESTS", 2)
    assert len(set(children.map(functions.process, range(200)))) >= 5
    assert len(family(children)) <= 3


def test_leaving_the_block_ends_children_that_hang() -> None:
    with Children(2, LIMITS, PRELOAD) as children:
        results = children.map(functions.die, ["a", "hang", "hang", *["a"] * 100])
        assert next(results) == "A"
        assert wait_for(lambda: len(family(children)) == 3, PATIENCE_S)
        processes = family(children)
        began = time.monotonic()
    assert time.monotonic() - began < 30  # they hang for ten minutes
    assert not alive(processes)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_consumer_that_raises_leaves_no_child(error: type[BaseException]) -> None:
    processes: list[psutil.Process] = []
    with pytest.raises(error), Children(2, LIMITS, PRELOAD) as children:
        for _ in children.map(functions.die, ["a", "hang", "hang", *["a"] * 100]):
            processes += family(children)
            raise error
    assert processes and not alive(processes)


def test_an_iterable_that_raises_raises_here(children: Children) -> None:
    def items() -> Iterator[float]:
        yield from [0.0] * 20
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        list(children.map(functions.nap, items()))
    assert list(children.map(functions.nap, [0.0])) == [0.0]


def test_deaths_leave_no_open_file_behind(children: Children) -> None:
    def open_files(items: list[str]) -> int:
        list(children.map(functions.die, items))
        return int(psutil.Process().num_fds())

    before = open_files(["a"] * 20)
    assert open_files(["SIGKILL", "a"] * 10) <= before + 2  # one connection a child


def test_a_parent_that_is_killed_leaves_no_child_even_if_they_hang(tmp_path: Path) -> None:
    process, processes = hanging_program(tmp_path)
    process.kill()
    process.communicate()
    assert wait_for(lambda: not alive(processes), PATIENCE_S)


def test_a_starter_that_is_killed_takes_its_children_along_is_replaced_and_blames_no_item(children: Children) -> None:
    answers = children.map(functions.nap, [0.01] * 450)
    for _ in range(3):
        assert list(itertools.islice(answers, 120)) == [0.01] * 120
        processes = family(children)
        processes[0].kill()
        assert wait_for(partial(gone, processes), PATIENCE_S)
    assert list(answers) == [0.01] * 90
    assert len(family(children)) > 1


def test_ctrl_c_ends_the_parent_which_ends_the_children(tmp_path: Path) -> None:
    process, processes = hanging_program(tmp_path)
    for child in processes:
        child.send_signal(signal.SIGINT)
    time.sleep(0.2)
    assert len(alive(processes)) == 3
    os.killpg(process.pid, signal.SIGINT)
    assert "KeyboardInterrupt" in process.communicate(timeout=PATIENCE_S)[1]
    assert not alive(processes)


def test_a_module_that_cannot_be_imported_is_an_error_and_not_a_lost_item(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(JobError), Children(1, LIMITS, ("no_such_module",)) as children:
        list(children.map(abs, [-1]))
    assert "No module named 'no_such_module'" in capfd.readouterr().err


PROGRAM = """
from deepfloyd_core.processes.pool import Children, Limits
with Children(1, Limits()) as children:
    print(list(children.map(abs, [-1, -2])))
"""


@pytest.mark.parametrize("way", ["stdin", "-c", "-m", "console script"])
def test_however_the_parent_was_started_its_main_module_is_left_alone(way: str, tmp_path: Path) -> None:
    script = tmp_path / ("program.py" if way == "-m" else "program")
    script.write_text(PROGRAM)
    match way:
        case "stdin":
            process = program("-", text=PROGRAM)
        case "-c":
            process = program("-c", PROGRAM)
        case "-m":
            process = program("-m", "program", cwd=tmp_path)
        case _:
            process = program(str(script))
    assert process.communicate(timeout=PATIENCE_S) == ("[1, 2]\n", "")
