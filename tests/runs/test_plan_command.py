"""`deepfloyd plan` as a user gives it."""

import subprocess
import sys

import pytest
from releases import deepfloyd
from small_run import SmallRun

from deepfloyd_core.errors import ConfigError
from deepfloyd_core.models.torch_facts import TorchFacts
from deepfloyd_core.models.work import Speed

SPEED = Speed(flops=1e10, bytes=1e9, call_s=1e-5)
CPU = TorchFacts(version="2", build="the CPU", device="cpu", threads=2, cpu_speeds={"no": SPEED, "bf16": SPEED})


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes with torch, which take seconds: tests/doctor and tests/training/test_costs.py."""
    monkeypatch.setattr("deepfloyd_core.planning.plan.ask_torch", lambda threads: CPU)
    monkeypatch.setattr("deepfloyd_core.planning.costs._CALCULATED_BY", "no_such_module")


def test_a_plan_is_printed_and_makes_nothing(small_run: SmallRun, asked: None) -> None:
    told = deepfloyd("plan", str(small_run.config), "--set", "stage1.lora_rank=8", "--set", "stage2.lora_rank=8")
    assert told.exit_code == 0, told.output
    lines = [" ".join(line.split()) for line in told.stdout.splitlines()]
    assert "stars 9 1 unsupported 1 7" in lines
    assert next(line for line in lines if line.startswith("Stage I LoRA made ")).endswith("there is none yet")
    assert "Stage I 12 24 3.4 times 64x64: 14" in lines
    assert lines[-1].startswith("It takes ") and lines[-1].endswith("it fits.")
    assert not small_run.workspace.exists()


def test_a_plan_that_cannot_be_made_is_one_sentence(small_run: SmallRun, asked: None) -> None:
    for file in small_run.pictures.glob("*.png"):
        file.unlink()
    told = deepfloyd("plan", str(small_run.config))
    assert "A run would end here. The only picture was rejected (1 unsupported)." in " ".join(told.stdout.split())
    wrong = deepfloyd("plan", str(small_run.config), "--set", "stage1.lora_rnk=8")
    assert isinstance(wrong.exception, ConfigError) and not small_run.workspace.exists()


def test_no_torch_is_in_the_process_of_a_plan(small_run: SmallRun) -> None:
    code = f"""
import sys
from deepfloyd_core.errors import JobError
from deepfloyd_core.planning import costs, plan
from flows.commands.cli import app

def ask(threads):
    raise JobError("not asked")

plan.ask_torch, costs._CALCULATED_BY = ask, "no_such_module"
app(["plan", {str(small_run.config)!r}], standalone_mode=False)
assert not {{"torch", "diffusers", "transformers", "prefect"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-P", "-c", code], check=True, capture_output=True, cwd=small_run.folder)
