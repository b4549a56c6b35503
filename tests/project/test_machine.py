"""The machine that a run file is chosen for, by what torch tells; and without an answer."""

from pathlib import Path

import psutil
import pytest

from deepfloyd_core.config.stage import StageConfig
from deepfloyd_core.errors import JobError
from deepfloyd_core.models.device import Device
from deepfloyd_core.models.torch_facts import TorchFacts
from deepfloyd_core.models.work import Speed
from deepfloyd_core.planning.calibrated import step_s
from deepfloyd_core.project import machine
from deepfloyd_core.project.choose_stages import Fit, stage1_choices
from deepfloyd_core.project.machine import MachineLook, asked_machine, machine_look
from deepfloyd_core.store.counts import duration
from deepfloyd_core.training.costs import cost_request, known_costs

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


def test_the_hours_of_a_training_without_a_gpu_are_those_of_a_plan() -> None:
    speed = Speed(flops=1e11, bytes=1e10, call_s=1e-5)
    cpu = Device("a CPU", True, 24 << 30, 24 << 30, False, {"no": speed, "bf16": speed})
    chosen = stage1_choices(MachineLook("cpu", "", 24 << 30, False, cpu), Fit(10, 1.0, 1.0, False))
    values = {choice.key: choice.value for choice in chosen.keys}
    steps = next(choice for choice in chosen.keys if choice.key == "max_train_steps")
    config = StageConfig.model_validate({**values, "mixed_precision": "no"})
    request = cost_request(config, None, (64, 64))
    costs = known_costs(request, Path("nowhere")) if request else None
    assert costs is not None, "it is shipped"
    each_s = step_s(config, costs, cpu)
    assert each_s > 4 * 2 * costs.sampled_work[0].flops / 1e11, "a forward and a backward pass of four pictures"
    assert f"{duration(each_s * config.steps)} in all" in steps.why
    without = stage1_choices(MachineLook("cpu", "", 24 << 30, False), Fit(10, 1.0, 1.0, False))
    assert any("`deepfloyd plan` tells how long" in choice.why for choice in without.keys)
