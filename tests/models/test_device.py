"""The device of a plan: the GPU that torch sees, or the machine, with the limit of its container."""

from pathlib import Path

import psutil
import pytest

from deepfloyd_core.models import device
from deepfloyd_core.models.device import device_of, machine_memory
from deepfloyd_core.models.torch_facts import TorchFacts
from deepfloyd_core.models.work import Speed, Work


def speed(flops: float) -> Speed:
    return Speed(flops=flops, bytes=2.0, call_s=0.25)


GPU = TorchFacts(
    version="2", build="CUDA 12.8", device="cuda", device_name="NVIDIA Test", threads=4, total_bytes=24 << 30,
    free_bytes=20 << 30, cpu_has_bf16=False, cpu_speeds={"no": speed(1.0), "bf16": speed(0.5)},
    gpu_speeds={"no": speed(10.0), "bf16": speed(80.0)},
)  # fmt: skip


def test_the_run_files_device_decides() -> None:
    on_gpu, on_cpu = device_of(GPU, "auto"), device_of(GPU, "cpu")
    assert (on_gpu.name, on_gpu.total, on_gpu.free, on_gpu.speeds["bf16"].flops) == (
        "NVIDIA Test",
        24 << 30,
        20 << 30,
        80.0,
    )
    assert on_cpu.is_cpu and not on_cpu.has_bf16 and on_cpu.speeds["no"].flops == 1.0
    assert on_cpu.total == machine_memory().total <= psutil.virtual_memory().total


def test_a_container_with_less_memory_than_its_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "none").write_text("max\n")
    (tmp_path / "limit").write_text(f"{4 << 30}\n")
    monkeypatch.setattr(device, "_CGROUPS", tuple(map(str, (tmp_path / "none", tmp_path / "limit", tmp_path / "lost"))))
    assert machine_memory().total == 4 << 30 and machine_memory().is_limited


def test_a_gpu_computes_while_its_next_operations_are_called() -> None:
    work = Work(flops=8.0, bytes=4.0, calls=3.0)
    assert device_of(GPU, "cpu").seconds(work, "no") == 8.0 + 2.0 + 0.75
    assert device_of(GPU, "auto").seconds(work, "no") == 0.8 + 2.0
    assert device_of(GPU, "auto").seconds(work.times(100) + Work(calls=1e6), "no") == 0.25 * (1e6 + 300)
