"""Leases of a workspace, where runs begin while others look."""

import errno
import fcntl
import os
import threading
from pathlib import Path
from typing import IO

import pytest

from deepfloyd_core.store import leases
from deepfloyd_core.store.file_faults import flock
from deepfloyd_core.store.leases import FOLDER, drop_ended_leases, leased, running_leases, take_lease
from deepfloyd_core.store.locks import create_workspace


def test_a_run_begins_while_somebody_lists_the_leases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create_workspace(tmp_path)
    lock = flock

    def looked_at(file: IO[str], operation: int, path: Path) -> None:
        """`running_leases` of another process has the new file just before its run locks it."""
        monkeypatch.setattr(leases, "flock", lock)
        other = next((tmp_path / FOLDER).iterdir()).open()
        fcntl.flock(other, fcntl.LOCK_SH)
        threading.Timer(0.1, other.close).start()
        lock(file, operation, path)

    @leased
    def run() -> dict[str, str]:
        monkeypatch.setattr(leases, "flock", looked_at)
        take_lease(tmp_path, "image_index/0123456789abcdef")
        return running_leases(tmp_path)

    assert list(run()) == ["image_index/0123456789abcdef"]


def test_a_run_whose_lease_cannot_be_removed_has_done_its_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create_workspace(tmp_path)

    @leased
    def run() -> str:
        take_lease(tmp_path, "image_index/0123456789abcdef")
        monkeypatch.setattr(Path, "unlink", refused)
        return "done"

    def refused(path: Path, missing_ok: bool = False) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    assert run() == "done"
    monkeypatch.undo()
    assert not running_leases(tmp_path), "its lock is free"
    drop_ended_leases(tmp_path)
    assert not list((tmp_path / FOLDER).iterdir())
