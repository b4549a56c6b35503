"""`auto_fit` by the user's door: on a machine with too little memory a training ends with the weights of one with enough."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from releases import deepfloyd, make
from safetensors.torch import load_file
from small_run import SmallRun

from deepfloyd_core.bundle.recipe import recipe_of
from deepfloyd_core.config.stages import Stage
from deepfloyd_core.models import device
from deepfloyd_core.models.device import MOST_SHARE, Device, MachineMemory
from deepfloyd_core.models.torch_facts import TorchFacts
from deepfloyd_core.models.work import Speed
from deepfloyd_core.planning.savings import training_bytes
from deepfloyd_core.preflight.load import load_run
from deepfloyd_core.store.artifacts import Artifact
from deepfloyd_core.training.costs import cost_request, default_cache, known_costs

SPEED = Speed(flops=1e10, bytes=1e9, call_s=1e-5)
CPU = TorchFacts(version="2", build="the CPU", device="cpu", threads=2, cpu_speeds={"no": SPEED, "bf16": SPEED})
KEYS = ("train_batch_size=4", "lora_rank=8", "lora_dropout=0.0", "max_train_steps=2", "checkpoint_step_interval=1")


def options(stage: Stage, *more: str) -> list[str]:
    keys = [*(f"stage{stage}.{key}" for key in (*KEYS, "validation_step_interval=0")), *more]
    return [word for key in keys for word in ("--set", key)]


def memory_for(run: SmallRun, stage: Stage, size: int) -> int:
    """Bytes of memory that a training needs in micro-batches of a size, and not those of twice that."""
    config = load_run(run.config, tuple(options(stage)[1::2])).config.stage(stage)
    request = cost_request(config, Path(config.model), (64, 64) if stage == 1 else (256, 256))
    costs = known_costs(request, default_cache()) if request else None
    assert costs is not None  # it is shipped
    cpu = Device("", True, 0, 0, False, {})
    needed, more = (
        training_bytes(config.model_copy(update={"micro_batch_size": count}), costs, cpu) for count in (size, 2 * size)
    )
    return int((needed + more) / 2 / MOST_SHARE)


def lora_of(run: SmallRun, stage: Stage) -> Artifact:
    (path,) = run.workspace.glob(f"stage{stage}_lora/*")
    return Artifact(path.parent.name, path.name, path)


def weights(lora: Artifact) -> torch.Tensor:
    tensors = load_file(lora.path / "pytorch_lora_weights.safetensors")
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_too_little_memory_makes_the_same_weights_in_micro_batches(
    server: str,
    tmp_path: Path,
    new_small_run: Callable[[Path], SmallRun],
    monkeypatch: pytest.MonkeyPatch,
    stage: Stage,
) -> None:
    run = new_small_run(tmp_path / "run")
    command = f"train-stage{stage}", str(run.config)
    whole = run.call_here(*command, *options(stage))
    assert whole.returncode == 0, whole.stderr
    kept = tmp_path / "whole"
    name = lora_of(run, stage).name
    shutil.move(lora_of(run, stage).path, kept)
    total = memory_for(run, stage, 2)
    monkeypatch.setattr(device, "machine_memory", lambda: MachineMemory(total, total, False))
    for place in ("tasks.fitting", "deepfloyd_core.planning.plan"):
        monkeypatch.setattr(f"{place}.ask_torch", lambda **_: CPU)
    said = f"auto_fit: stage{stage}.micro_batch_size = 2: Stage {'I' * stage}, training takes "
    plan = deepfloyd("plan", str(run.config), *options(stage, "auto_fit=true"))
    assert said in " ".join(plan.output.split())
    fitted = run.call_here(*command, *options(stage, "auto_fit=true"))
    assert fitted.returncode == 0 and said in fitted.stderr + fitted.stdout
    lora = lora_of(run, stage)
    assert lora.name == name and lora.manifest.summary["micro_batches"] == {"0": 2}
    first, second = weights(Artifact(lora.kind, lora.fingerprint, kept)), weights(lora)
    assert 0 < (first - second).norm() < 1e-5 * first.norm()
    loaded = load_run(run.config, tuple(options(stage, "auto_fit=true")[1::2]))
    bundle = make(run.workspace, "lora_bundle", {}, lora)
    assert "micro_batch_size" not in json.dumps(recipe_of(loaded))
    assert recipe_of(loaded, bundle)["run"][f"stage{stage}"]["micro_batch_size"] == 2, "reproduce rounds alike"
