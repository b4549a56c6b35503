"""A training with every kind of state, killed at random moments, ends with the bytes of one that was not."""

import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from training_parts import fewer_losses, forked, prepared, run_here, stage_text, train_stage

from deepfloyd_core.config import Run

KILLS = int(os.environ.get("DEEPFLOYD_KILLS", "3"))  # 50 take some ten minutes
STAGE = {
    "model_flavour": "tiny-i", "lora_rank": 4, "lora_dropout": 0.1, "use_ema": True, "optimizer": "adamw_bf16",
    "train_batch_size": 1, "gradient_accumulation_steps": 2, "caption_dropout_probability": 0.3, "random_flip": True,
    "offset_noise": True, "mixed_precision": "bf16", "learning_rate": 1e-3, "checkpointing_steps": 1, "validation_steps": 7,
    "validation_num_inference_steps": 1, "validation_guidance": 3.0,
}  # fmt: skip


def workers(run: Run, count: int) -> Run:
    """The run with so many threads that prepare batches, which decide nothing."""
    stage1 = run.config.stage(1).model_copy(update={"dataloader_num_workers": count})
    return replace(run, config=run.config.model_copy(update={"stage1": stage1}))


def checkpoints(workspace: Path) -> set[str]:
    return {path.parent.name for path in workspace.glob("stage1_lora/*/.checkpoints/*/checkpoint.json")}


@pytest.mark.slow
def test_a_training_killed_at_random_moments_ends_with_the_bytes_of_an_unbroken_one(
    world: "object", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fewer_losses(monkeypatch)
    rng, chance = np.random.default_rng(0), random.Random(1)
    for number, shape in enumerate([(64, 64, 3)] * 7 + [(64, 96, 3)] * 5):  # two buckets
        world.add(f"{number}.png", rng.integers(0, 256, shape, dtype=np.uint8), f"caption {number}")
    steps = {"max_train_steps": 4 * KILLS // 3 + 4}
    keys = {"text_encoder_dtype": "fp32", "device": "cpu", "num_validation_images": 1}
    run = world.load(stages=(1,), stage1={**STAGE, **steps}, num_threads=1, validation_prompt="caption 1", **keys)
    made = prepared(run, world)
    stage_text(run, 1, made["text_embeds"])
    whole = train_stage(workers(run, 0), made, 1, tmp_path / "whole", how=run_here)
    broken, kills = tmp_path / "broken", 0
    while kills < KILLS:
        before, process = checkpoints(broken), forked(workers(run, kills % 3), made, broken)
        if chance.random() < 0.8:  # else while it is being set up
            while process.is_alive() and checkpoints(broken) <= before:
                time.sleep(0.01)
        time.sleep(chance.uniform(0, 1.0))
        assert process.is_alive(), "it was over before it could be killed often enough"
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        kills += 1
    assert len(checkpoints(broken)) > 0
    lora = train_stage(workers(run, 2), made, 1, broken, how=run_here)
    assert lora.hashes == whole.hashes
    assert lora.summary["steps_of_this_process"] < run.config.stage(1).max_train_steps
    sizes = {name.split("/")[0] for name in lora.hashes}
    assert {"pytorch_lora_weights.safetensors", "metrics.parquet", "validation.parquet", "validation"} <= sizes
