"""Leases of flow runs, and runs that take turns: with processes that are killed."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace
from uuid import uuid4

import pytest
from polling import within

from deepfloyd_core.config.run_machine import Machine
from deepfloyd_core.errors import BusyError, StorageError
from deepfloyd_core.processes.gpu_slot import gpu_slot, slot_of_block
from deepfloyd_core.store.locks import only_run
from flows.runs import gpu, run_lease

HOLDER = """
import sys, time
from pathlib import Path
folder = Path(sys.argv[1])
{block}
    print("held", flush=True)
    time.sleep(60)
"""
WORKSPACE = "from deepfloyd_core.store.locks import only_run\nwith only_run(folder, 'finetune birds', wait=True):"
GPU = """
from deepfloyd_core.processes.gpu_slot import gpu_slot, slot_of_block
with gpu_slot(folder / "gpu-all", "finetune birds"):
    slot_of_block().take()
"""


def _holder(block: str, folder: Path) -> "subprocess.Popen[bytes]":
    code = HOLDER.format(block=block)
    process = subprocess.Popen([sys.executable, "-P", "-c", code, str(folder)], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"held\n"
    return process


def test_a_lease_is_free_when_its_process_is_gone(tmp_path: Path) -> None:
    run = uuid4()
    pid = os.fork()
    if pid == 0:
        run_lease.take_lease(tmp_path, run)
        os.kill(os.getpid(), signal.SIGSTOP)
        os._exit(1)
    os.waitpid(pid, os.WUNTRACED)
    (path,) = run_lease.leases(tmp_path)
    with run_lease.free_lease(path) as found:
        assert found is None
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with run_lease.free_lease(path) as found:
        assert found == run
        with run_lease.free_lease(path) as second:
            assert second is None, "of two that settle runs one gets it"


def test_a_process_holds_the_lease_of_its_newest_run_alone(tmp_path: Path) -> None:
    first, second = uuid4(), uuid4()
    run_lease.take_lease(tmp_path, first)
    run_lease.take_lease(tmp_path, second)
    free = {}
    for path in run_lease.leases(tmp_path):
        with run_lease.free_lease(path) as found:
            free[path.name] = found
    assert free == {str(first): first, str(second): None}
    assert run_lease.has_lease(tmp_path, second) and not run_lease.has_lease(tmp_path, uuid4())


def test_a_run_that_may_not_wait_learns_who_is_at_work_and_the_next_one_after_a_kill_has_the_workspace(
    tmp_path: Path,
) -> None:
    holder = _holder(WORKSPACE, tmp_path)
    refused = pytest.raises(BusyError, match=f"finetune birds is at work in {tmp_path}")
    with refused, only_run(tmp_path, "retrain birds", wait=False):
        pass
    holder.kill()
    holder.wait()
    with only_run(tmp_path, "retrain birds", wait=False):
        assert (tmp_path / ".locks" / "run").read_text() == "retrain birds"


def test_a_workspace_that_a_run_creates_is_its_user_s_alone(tmp_path: Path) -> None:
    with only_run(tmp_path / "new" / "workspace", "finetune birds", wait=True):
        assert (tmp_path / "new" / "workspace").stat().st_mode & 0o777 == 0o700


def test_jobs_wait_for_the_gpu_of_a_run_that_is_killed_then(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    holder = _holder(GPU, tmp_path)

    def kill_when_told() -> None:
        within(30, lambda: "waiting for the GPU" in caplog.text)
        holder.kill()

    killer = threading.Thread(target=kill_when_told)
    killer.start()
    with gpu_slot(tmp_path / "gpu-all", "retrain birds"):
        slot = slot_of_block()
        assert slot is not None and slot.take() == slot.take()
        assert holder.wait(30) == -signal.SIGKILL
    killer.join()
    assert "which is used by finetune birds" in caplog.text
    assert slot_of_block() is None


def test_only_a_run_that_may_use_a_gpu_takes_its_slot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    for device, has_gpu, takes in (
        ("cpu", True, False),
        ("auto", False, False),
        ("auto", True, True),
        ("cuda", False, True),
    ):
        monkeypatch.setattr(gpu, "has_gpu", lambda has_gpu=has_gpu: has_gpu)
        with gpu.gpu_shared(Machine.model_validate({"device": device}), "a run"):
            assert (slot_of_block() is not None) == takes, device
    assert gpu.slot_path() == tmp_path / f"deepfloyd-{os.getuid()}" / "gpu-1"


def test_a_slot_s_folder_that_somebody_else_made_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / f"deepfloyd-{os.getuid()}").symlink_to("elsewhere")
    with pytest.raises(StorageError, match="belongs to another user"):
        gpu.slot_path()


@pytest.mark.parametrize(("before", "after"), [("charcoal-bandicoot", ["retrain birds v7"]), ("my own name", [])])
def test_a_run_is_named_after_what_it_made_unless_a_person_named_it(
    monkeypatch: pytest.MonkeyPatch, before: str, after: list[str]
) -> None:
    named: list[str] = []
    monkeypatch.setattr(run_lease, "show", lambda _, __, name: named.append(name))
    run = SimpleNamespace(id=uuid4(), name=before)
    context = SimpleNamespace(flow_run=run, flow=SimpleNamespace(name="retrain"))
    monkeypatch.setattr(run_lease, "FlowRunContext", SimpleNamespace(get=lambda: context))
    run_lease.rename_run(Path("/somewhere/birds"), 7)
    assert named == after
