"""The machine that a run file is chosen for, by what torch tells; and without an answer."""

import psutil
import pytest

from deepfloyd_core.errors import JobError
from deepfloyd_core.models.torch_facts import TorchFacts
from deepfloyd_core.models.work import Speed
from deepfloyd_core.project import machine
from deepfloyd_core.project.machine import MachineLook, asked_machine, machine_look

GPU = TorchFacts(
    version="2", build="CUDA 12.8", device="cuda", device_name="NVIDIA Test", threads=4, total_bytes=24 << 30,
    free_bytes=20 << 30,
)  # fmt: skip


def test_a_gpu_is_told_with_its_memory() -> None:
    assert machine_look(GPU) == MachineLook("cuda", "NVIDIA Test", 24 << 30, True)
    assert not machine_look(GPU.model_copy(update={"bf16": "emulated"})).bf16
    assert machine_look(GPU.model_copy(update={"device": "mps"})).device == "mps"
    speed = {flops: Speed(flops=flops, bytes=1.0, call_s=1.0) for flops in (1.0, 2.0, 3.0)}
    quick, slow = ({"device": "cpu", "cpu_speeds": {"no": speed[2.0], "bf16": speed[bf16]}} for bf16 in (3.0, 1.0))
    assert [machine_look(GPU.model_copy(update=facts)).bf16 for facts in (quick, slow)] == [True, False]


def test_without_an_answer_it_is_a_machine_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask_torch() -> TorchFacts:
        raise JobError("torch was ended by SIGILL")

    monkeypatch.setattr(machine, "ask_torch", ask_torch)
    found = asked_machine()()
    assert (found.device, found.name) == ("cpu", "")
    assert 0 < found.memory_bytes <= psutil.virtual_memory().total
