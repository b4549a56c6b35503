"""A training step that finds no memory: what it says, and that its run goes on from the checkpoint."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from deepfloyd_core.config.flavours import FLAVOURS
from deepfloyd_core.config.stage import StageConfig
from deepfloyd_core.errors import JobError
from deepfloyd_core.store.counts import size
from deepfloyd_core.training import micro_batches
from deepfloyd_core.training.checkpoints import FOLDER
from deepfloyd_core.training.costs import cost_request, known_costs, step_parts
from deepfloyd_core.training.forward import Prepared, TrainingContext, UNetInput
from deepfloyd_core.training.state import TrainingState
from deepfloyd_core.training.steps import take_step

TINY = Path(FLAVOURS["tiny-i"].repo)


def failing_step(out: Path, **keys: Any) -> str:
    """What a step says that asks a GPU for too much."""
    config = StageConfig.model_validate({"model_flavour": "tiny-i", "mixed_precision": "no", "lora_rank": 8, **keys})
    nothing: Any = None
    context = TrainingContext(1, config, 0, nothing, nothing, None, nothing, torch.device("cpu"), out, model=TINY)
    x = torch.zeros(config.train_batch_size, 3, 64, 64)
    prepared = Prepared(0, [], x, nothing, UNetInput(x, nothing, None, nothing))
    state = SimpleNamespace(optimizer=SimpleNamespace(param_groups=[]))
    ahead: Any = SimpleNamespace(take=lambda number: prepared)
    with pytest.raises(JobError) as told:
        take_step(context, cast(TrainingState, state), ahead, 12)
    return str(told.value)


def test_it_names_the_plan_s_figure_the_checkpoint_and_the_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def batch_loss(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(micro_batches, "batch_loss", batch_loss)
    said = failing_step(tmp_path)
    config = StageConfig.model_validate({"model_flavour": "tiny-i", "mixed_precision": "no", "lora_rank": 8})
    request = cost_request(config, TINY, (64, 64))
    costs = known_costs(request, tmp_path) if request else None
    assert costs is not None  # it is shipped
    figure, halved, both = (
        size(sum(step_parts(config.model_copy(update=keys), costs, on_cpu=True).values()))
        for keys in ({}, {"micro_batch_size": 2}, {"gradient_checkpointing": True, "micro_batch_size": 1})
    )
    assert said.startswith(
        "Stage I's step 13, 4 pictures of 64x64 px, found no memory, and `deepfloyd plan` forecasts "
    )
    assert (
        f"forecasts {figure}. There is no checkpoint yet. Set stage1.micro_batch_size = 2, forecast at {halved}, with which "
        "the next run goes on from there to the same steps, up to the rounding of sums." in said
    )
    kept = tmp_path / FOLDER / "step-00000010"
    kept.mkdir(parents=True)
    again = failing_step(tmp_path, micro_batch_size=1)
    assert "4 pictures of 64x64 px in micro-batches of 1, found no memory" in again
    assert (
        f"The last good checkpoint is {kept}. Set stage1.gradient_checkpointing = true, "
        f"forecast at {both}, with which" in again
    )
    unknown = failing_step(tmp_path, lora_dropout=0.1)
    assert "Set stage1.gradient_checkpointing = true, with which" in unknown and "forecast" not in unknown
    least = failing_step(tmp_path, gradient_checkpointing=True, micro_batch_size=1)
    assert least.endswith("Take a smaller batch, base_model_precision or lora_rank; that is another training.")
