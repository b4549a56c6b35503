"""What a run would notice late of this machine is told with the other faults, before a server starts."""

import errno
import fcntl
import os
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import pytest
from releases import deepfloyd
from small_run import SmallRun

from deepfloyd_core.preflight import machine
from deepfloyd_core.preflight.check import check_run
from deepfloyd_core.preflight.machine import machine_faults, machine_notes

MOONS = "--set=eval_dataset_id=moons"
COMMANDS = ["run", "retrain", "prepare", "embed", "train-stage1", "train-stage2"]


def failing(number: int) -> Callable[..., Any]:
    def called(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return called


def refusal(*arguments: str) -> list[str]:
    """The faults of a command that is refused before it has a server."""
    done = deepfloyd(*arguments)
    assert done.exception is not None and done.exit_code == 1, done.output
    return [line.removeprefix("- ") for line in str(done.exception).splitlines()]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_system_without_locks_is_told_with_the_other_faults(
    small_run: SmallRun, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setattr(fcntl, "flock", failing(errno.ENOLCK))
    count, moons, locks = refusal(command, str(small_run.config), MOONS)
    assert count == "2 faults to correct:" and "eval_dataset_id is 'moons'" in moons
    assert locks.startswith(f"{small_run.workspace} cannot be locked: no locks available")
    assert "Set `workspace` to a folder on a local disk" in locks
    assert not small_run.workspace.exists() and not list(small_run.folder.glob(".trial*"))


def test_a_full_disk_is_told_before_anything_is_made(small_run: SmallRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile._os.mkdir", failing(errno.ENOSPC))
    (said,) = refusal("run", str(small_run.config))
    assert said.startswith(f"{small_run.workspace} cannot be written: no space left on device")


def test_a_library_of_the_jobs_that_is_missing_is_told_where_there_are_jobs(
    small_run: SmallRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "find_spec", lambda name: None if name == "peft" else find_spec(name))
    (said,) = refusal("embed", str(small_run.config))
    assert said.startswith("peft cannot be imported. Install it again: pip install ")
    check_run(small_run.config, (), "crops", elsewhere=False)


def test_little_free_disk_is_a_note_and_no_fault(small_run: SmallRun, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not machine_notes(small_run.workspace)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=10**12, used=0, free=300 * 10**6))
    notes = check_run(small_run.config, (), "lora_bundle", elsewhere=False).notes
    assert f"{small_run.workspace} is on a disk with 300 MB free" in notes[-1]


def test_a_workspace_that_can_only_be_read_passes(small_run: SmallRun, monkeypatch: pytest.MonkeyPatch) -> None:
    small_run.workspace.mkdir()
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != small_run.workspace and access(path, mode))
    monkeypatch.setattr("tempfile._os.mkdir", failing(errno.EROFS))
    check_run(small_run.config, (), "lora_bundle", elsewhere=False)


def test_file_systems_without_links_or_flushes_of_folders_pass(
    small_run: SmallRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", failing(errno.EPERM))
    monkeypatch.setattr(os, "fsync", failing(errno.EINVAL))
    check_run(small_run.config, (), "lora_bundle", elsewhere=False)


def test_it_takes_less_than_50_ms(small_run: SmallRun) -> None:
    took = []
    for _ in range(5):
        start = perf_counter()
        machine_faults(small_run.workspace, has_jobs=True)
        machine_notes(small_run.workspace)
        took.append(perf_counter() - start)
    assert min(took) < 0.05
