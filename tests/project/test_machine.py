"""What a child process tells of a GPU, and what becomes of a child that tells nothing."""

import json
import sys
from pathlib import Path

import psutil
import pytest

from deepfloyd_core.project import machine
from deepfloyd_core.project.machine import MachineLook, asked_machine


def told(code: str) -> MachineLook:
    return asked_machine((sys.executable, "-S", "-c", code))()


def test_a_gpu_is_told_with_its_memory() -> None:
    facts = json.dumps({"kind": "cuda", "name": "NVIDIA Test", "bytes": 24 << 30, "bf16": True})
    assert told(f"print({facts!r})") == MachineLook("cuda", "NVIDIA Test", 24 << 30, True)
    assert told('print(\'{"kind": "mps"}\')').device == "mps"


@pytest.mark.parametrize(
    "code", ["", "import no_torch", "print('{')", "print('[]')", 'print(\'{"kind": "cuda"}\')', "import os; os.abort()"]
)
def test_a_child_without_an_answer_is_a_machine_without_a_gpu(code: str) -> None:
    found = told(code)
    assert (found.device, found.name) == ("cpu", "")
    assert 0 < found.memory_bytes <= psutil.virtual_memory().total


def test_a_child_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "PATIENCE_S", 0.2)
    before = set(psutil.Process().children(recursive=True))
    assert told("import time; time.sleep(60)").device == "cpu"
    assert set(psutil.Process().children(recursive=True)) <= before


def test_a_container_with_less_memory_than_its_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "none").write_text("max\n")
    (tmp_path / "limit").write_text(f"{4 << 30}\n")
    monkeypatch.setattr(machine, "_LIMITS", tuple(map(str, (tmp_path / "none", tmp_path / "limit", tmp_path / "lost"))))
    assert told("").memory_gib == 4


def test_the_real_child_answers() -> None:
    assert asked_machine()().device in ("cuda", "mps", "cpu")
