"""SIGINT, SIGTERM and SIGHUP end a command at any moment: one sentence, 128 + the signal, within 5 s, nothing left."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil
import pytest
from polling import slowness, within
from small_run import SmallRun

MARK = "DEEPFLOYD_TEST_MARK"  # in the environment of a command, and so in that of all it starts
LIMIT_S = 5.0
SERVER_LIMIT_S = 10.0  # from the end of its last user, on a busy machine


class Command:
    """A `deepfloyd` command in a session of its own, and every process that came of it."""

    def __init__(self, folder: Path, *arguments: str, program: tuple[str, ...] = ("-m", "flows"), **env: str) -> None:
        self._mark = f"{folder}-{time.monotonic_ns()}"
        self.log = folder / "command.log"
        kept = {key: value for key, value in os.environ.items() if env.get(key) != ""}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-P", *program, *arguments], cwd=folder, stdout=log, stderr=log,
                start_new_session=True, env={**kept, **{k: v for k, v in env.items() if v}, MARK: self._mark},
            )  # fmt: skip

    def wait_for(self, there: Callable[[], bool]) -> None:
        """Until something is there, while the command runs."""
        deadline = time.monotonic() + 300
        while not there():
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.01)

    def takes_signals(self) -> bool:
        """Whether it answers SIGTERM itself; on Linux, from the first moment that it does."""
        status = Path(f"/proc/{self.process.pid}/status")
        if not status.exists():
            time.sleep(3)
            return True
        caught = next(line for line in status.read_text().splitlines() if line.startswith("SigCgt:"))
        return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)

    def stop(self, *signals: signal.Signals) -> str:
        """Send signals, half a second apart; check how it ends; return what it printed."""
        slow, began = slowness(), time.monotonic()
        for number, each in enumerate(signals):
            time.sleep(0.5 if number else 0)
            with suppress(ProcessLookupError):
                self.process.send_signal(each)
        code = self.process.wait(240)
        took_s = time.monotonic() - began
        slow = max(slow, slowness())
        assert took_s < LIMIT_S * (slow if slow < 1.3 else 2 * slow), f"on a machine that is {slow:.1f} times slower"
        printed = self.log.read_text()
        assert code == 128 + signals[0], printed
        assert printed.count(f"Stopped by {signals[0].name}. ") == 1 and "Traceback" not in printed, printed
        return printed

    def processes(self) -> list[psutil.Process]:
        """Those that are still there."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get(MARK) == self._mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def left(self) -> list[str]:
        """Their command lines."""
        found = []
        for process in self.processes():
            with suppress(psutil.Error):
                found.append(" ".join(process.cmdline()))
        return found

    def nothing_is_left(self, limit_s: float = 1.0) -> None:
        """Assert it, within a time that is longer on a busy machine."""
        assert within(limit_s * 4 * slowness(), lambda: not self.left(), every_s=0.1), self.left()


@pytest.fixture
def commands() -> Iterator[list[Command]]:
    """What a failed test leaves is killed."""
    started: list[Command] = []
    yield started
    for command in started:
        for process in command.processes():
            with suppress(psutil.Error):
                process.kill()
        command.process.wait()


STUBBORN = """
import subprocess, sys, time
from tasks.terminal import console
from flows.commands import stopping
stopping.GRACE_S = 1.0
stop = stopping.Stopping(console(stderr=True))
stop.take_signals()
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
print("ready", flush=True)
while True:
    try:
        time.sleep(60)
    except BaseException:
        pass
"""


@pytest.mark.parametrize("signals", [(signal.SIGTERM,), (signal.SIGINT, signal.SIGINT), (signal.SIGHUP,)])
def test_a_command_that_does_not_hear_is_ended_with_what_it_started(
    tmp_path: Path, commands: list[Command], signals: tuple[signal.Signals, ...]
) -> None:
    command = Command(tmp_path, program=("-c", STUBBORN))
    commands.append(command)
    command.wait_for(lambda: "ready" in command.log.read_text())
    assert "Nothing was changed." in command.stop(*signals)
    command.nothing_is_left()


JOB = """
import subprocess, sys
NAP = "import sys, time; print('ready', flush=True); time.sleep(60)"
STARTER = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[2]])"
subprocess.Popen([sys.executable, "-c", STARTER, "deepfloyd_core.processes.job_worker", NAP])
"""


def both_ready(command: Command) -> bool:
    return command.log.read_text().count("ready") == 2


def is_there(folder: Path, pattern: str) -> bool:
    return any(folder.glob(pattern))


def test_a_job_may_finish_its_step_but_not_after_a_second_ctrl_c(tmp_path: Path, commands: list[Command]) -> None:
    program = ("-c", JOB + STUBBORN)
    for signals, spared in (((signal.SIGTERM,), 2), ((signal.SIGINT, signal.SIGINT), 0)):
        command = Command(tmp_path, program=program)
        commands.append(command)
        command.wait_for(partial(both_ready, command))
        printed = command.stop(*signals)
        assert ("A job still writes its checkpoint" in printed) == bool(spared)
        assert len(command.left()) == spared, command.left()


ENDING = (
    STUBBORN.split("while True")[0]
    + """
stop.finish(0)
print("over", flush=True)
time.sleep(120)
"""
)


def test_a_command_that_is_over_keeps_its_exit_code(tmp_path: Path, commands: list[Command]) -> None:
    """While Python waits for its threads, say."""
    command = Command(tmp_path, program=("-c", ENDING))
    commands.append(command)
    command.wait_for(lambda: "over" in command.log.read_text())
    command.process.send_signal(signal.SIGINT)
    assert command.process.wait(60) == 0
    assert "Stopped" not in command.log.read_text()


def test_nohup_is_obeyed(tmp_path: Path, commands: list[Command]) -> None:
    nohup = f"import signal, subprocess, sys\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n{STUBBORN}"
    command = Command(tmp_path, program=("-c", nohup))
    commands.append(command)
    command.wait_for(lambda: "ready" in command.log.read_text())
    command.process.send_signal(signal.SIGHUP)
    time.sleep(1.3)
    assert command.process.poll() is None
    command.stop(signal.SIGTERM)


def test_a_command_without_a_run_says_that_nothing_was_changed(tmp_path: Path, commands: list[Command]) -> None:
    (tmp_path / "lora_bundle" / ("0" * 16)).mkdir(parents=True)
    os.mkfifo(tmp_path / "lora_bundle" / ("0" * 16) / "manifest.json")  # reading it takes for ever
    for later_s in (0, 0.3, 0.8, 1.5):  # during the imports, and after them
        command = Command(tmp_path, "verify", str(tmp_path))
        commands.append(command)
        command.wait_for(command.takes_signals)
        time.sleep(later_s)
        assert "Nothing was changed." in command.stop(signal.SIGINT if later_s else signal.SIGTERM)
        command.nothing_is_left()


def test_a_command_whose_interpreter_ends_keeps_its_exit_code(tmp_path: Path, commands: list[Command]) -> None:
    """A signal that comes while the interpreter ends changes nothing."""
    ends = """
import atexit, sys, time
from flows.__main__ import main
from flows.commands.session import stopping
takes = stopping.take_signals
def take_signals():
    takes()
    atexit.register(lambda: (print("at exit", flush=True), time.sleep(0.5)))
stopping.take_signals = take_signals
sys.argv = ["deepfloyd", "--help"]
main()
"""
    command = Command(tmp_path, program=("-c", ends))
    commands.append(command)
    command.wait_for(lambda: "at exit" in command.log.read_text())
    for number in (signal.SIGTERM, signal.SIGINT):
        command.process.send_signal(number)
    assert command.process.wait(60) == 0
    printed = command.log.read_text()
    assert "Stopped" not in printed and "Traceback" not in printed


def test_a_signal_during_an_import_waits_for_its_end(tmp_path: Path) -> None:
    (tmp_path / "catches_all.py").write_text(
        "import time\n"
        "try:\n    print('importing', flush=True)\n    time.sleep(1.5)\n"
        "except BaseException as error:\n    print(f'caught {error!r}', flush=True)\n"
    )
    script = (
        "import time\nfrom flows.commands.session import stopping\nfrom flows.commands.stopping import Stopped\n"
        "stopping.take_signals()\n"
        "try:\n    import catches_all\n    time.sleep(60)\n"
        "except Stopped as end:\n    print('stopped by', end, flush=True)\n"
        "stopping.finish(1)\n"
    )
    environ = {**os.environ, "PYTHONPATH": f"{tmp_path}:{Path.cwd()}"}
    for again, before in ((False, "stopped by SIGTERM\n"), (True, "")):  # a second signal ends it at once
        with subprocess.Popen(
            [sys.executable, "-c", script], env=environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as process:
            assert process.stdout is not None and process.stdout.readline() == "importing\n"
            process.send_signal(signal.SIGTERM)
            if again:
                time.sleep(0.5)
                process.send_signal(signal.SIGTERM)
            printed = process.stdout.read()
        assert printed == f"{before}Stopped by SIGTERM. Nothing was changed.\n"
        assert process.returncode == 128 + signal.SIGTERM


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_command_that_ends_while_its_server_starts_leaves_no_server(
    small_run: SmallRun, commands: list[Command], number: signal.Signals
) -> None:
    home = small_run.folder / "home"
    command = Command(small_run.folder, "run", str(small_run.config), PREFECT_HOME=str(home), PREFECT_API_URL="")
    commands.append(command)
    command.wait_for(lambda: any("server" in line for line in command.left()))
    time.sleep(1)
    if number == signal.SIGKILL:
        command.process.kill()
        command.process.wait()
    else:
        assert f"kept in {small_run.workspace}; the same command resumes" in command.stop(number)
    command.nothing_is_left(SERVER_LIMIT_S)


MOMENTS = {
    "import": (signal.SIGTERM, "none"),
    "index": (signal.SIGTERM, ".locks/image_index-*"),
    "job's imports": (signal.SIGINT, "text_embeds/*/.job-embed.request"),
    "training": (signal.SIGHUP, "stage1_lora/*/.checkpoints/*/checkpoint.json"),
    "sampling": (signal.SIGTERM, "cascade_samples/*/.job-sample.log"),
}


@pytest.mark.slow
def test_a_run_is_stopped_at_every_moment_and_goes_on(
    server: str, small_run: SmallRun, commands: list[Command]
) -> None:
    steps = (
        "--set", "stage1.max_train_steps=4", "--set", "stage1.validation_step_interval=0", "--set", "stage2=",
        "--set", "num_validation_images=4",
    )  # fmt: skip
    for moment, (number, pattern) in MOMENTS.items():
        command = Command(small_run.folder, "run", str(small_run.config), *steps)
        commands.append(command)
        if moment == "import":
            command.wait_for(command.takes_signals)
        else:
            command.wait_for(partial(is_there, small_run.workspace, pattern))
        printed = command.stop(number)
        command.nothing_is_left(120 if "A job still writes" in printed else 1)
    assert small_run.call_here("run", str(small_run.config), *steps).returncode == 0


@pytest.mark.slow
def test_a_second_ctrl_c_leaves_nothing_at_all(
    small_run: SmallRun, prefect_home: Path, commands: list[Command]
) -> None:
    command = Command(
        small_run.folder, "train-stage1", str(small_run.config), "--set", "stage1.max_train_steps=500",
        PREFECT_HOME=str(prefect_home), PREFECT_API_URL="",
    )  # fmt: skip
    commands.append(command)
    command.wait_for(lambda: any(small_run.workspace.glob(MOMENTS["training"][1])))
    command.stop(signal.SIGINT, signal.SIGINT)
    command.nothing_is_left(SERVER_LIMIT_S)


@pytest.mark.slow
def test_a_pool_ends_with_its_flow_that_was_killed(server: str, small_run: SmallRun, commands: list[Command]) -> None:
    runner = "--set", "task_runner=processes", "--set", "workers=2"
    command = Command(small_run.folder, "prepare", str(small_run.config), *runner)
    commands.append(command)
    command.wait_for(lambda: any(small_run.workspace.glob("stage2_pixels/*/.part-*")))
    command.process.kill()
    command.process.wait()
    command.nothing_is_left(5.0)
