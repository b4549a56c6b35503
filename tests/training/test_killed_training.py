"""A training with every kind of state, killed at random moments, ends with the bytes of one that was not."""

import errno
import os
import random
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_world import DataWorld
from small_disk import PAGE, small_disk
from training_parts import break_in_step, forked, prepared, run_here, stage_text, train_stage

from deepfloyd_core.config.run import Run
from deepfloyd_core.config.stages import Stage
from deepfloyd_core.errors import StorageError
from deepfloyd_core.files import sha256_file, write_sealed
from deepfloyd_core.store import artifacts
from deepfloyd_core.store.artifacts import Artifact
from deepfloyd_core.store.manifest import MANIFEST
from deepfloyd_core.training import state as training_state
from deepfloyd_core.training.checkpoints import Checkpoint, load_checkpoint, save_checkpoint
from deepfloyd_core.types import Json

KILLS = int(os.environ.get("DEEPFLOYD_KILLS", "3"))  # of each stage; 50 take three minutes each
COMMON = {
    "lora_rank": 4, "lora_dropout": 0.1, "use_ema": True, "train_batch_size": 1, "gradient_accumulation_steps": 2,
    "caption_dropout_probability": 0.3, "random_flip": True, "learning_rate": 1e-3, "checkpoint_step_interval": 1,
    "validation_num_inference_steps": 1, "validation_guidance": 3.0,
}  # fmt: skip
STAGES = {
    1: {
        **COMMON, "model_flavour": "tiny-i", "optimizer": "adamw_bf16", "mixed_precision": "bf16", "offset_noise": True,
        "validation_step_interval": 7, "scheduled_sampling_max_step_offset": 500,
        "scheduled_sampling_probability": 1.0, "snr_gamma": 5.0,
    },
    2: {  # its pictures of 256 px are slow: windows, and validation at the start and the end alone
        **COMMON, "model_flavour": "tiny-ii", "mixed_precision": "no", "stage2_patch": 64, "low_res_blur": 0.5,
        "low_res_noise": 4.0, "low_res_jpeg_quality": 50, "low_res_degraded_share": 0.7, "train_variance": True,
        "lora_target_modules": ["to_q", "to_out.0", "add_k_proj", "add_v_proj", "conv1"],
        "validation_step_interval": 1000, "scheduled_sampling_max_step_offset": 700, "scheduled_sampling_probability": 0.5,
        "snr_gamma": 5.0, "validation_back_projection": True,
    },
}  # fmt: skip


def workers(run: Run, stage: Stage, count: int) -> Run:
    """The run with so many threads that prepare batches, which decide nothing."""
    settings = run.config.stage(stage).model_copy(update={"dataloader_num_workers": count})
    return replace(run, config=run.config.model_copy(update={f"stage{stage}": settings}))


def recorded(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, str]]:
    """Hashes of the last checkpoint that this process wrote, for each workspace: they are gone when a training ends."""
    last: dict[str, dict[str, str]] = {}

    def save(out: Path, checkpoint: Checkpoint, limit: int) -> None:
        save_checkpoint(out, checkpoint, limit)
        folder = out / ".checkpoints" / f"step-{checkpoint.step:08d}"
        last[out.parent.parent.name] = {file.name: sha256_file(file) for file in sorted(folder.iterdir())}

    monkeypatch.setattr(training_state, "save_checkpoint", save)
    return last


def checkpoints(workspace: Path) -> set[str]:
    return {path.parent.name for path in workspace.glob("stage*_lora/*/.checkpoints/*/checkpoint.json")}


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_a_training_killed_at_random_moments_ends_with_the_bytes_of_an_unbroken_one(
    world: DataWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: Stage
) -> None:
    last = recorded(monkeypatch)
    rng, chance = np.random.default_rng(0), random.Random(1)
    scale = 1 if stage == 1 else 4
    for number, shape in enumerate([(64, 64, 3)] * 7 + [(64, 96, 3)] * 5):  # two buckets
        size = shape[0] * scale, shape[1] * scale, 3
        world.add(f"{number}.png", rng.integers(0, 256, size, dtype=np.uint8), f"caption {number}")
    steps = {"max_train_steps": (4 * KILLS // 3 if stage == 1 else 4 * KILLS) + 4}  # Stage II's are short
    keys: dict[str, Any] = {
        "text_encoder_dtype": "fp32",
        "device": "cpu",
        "num_validation_images": 1,
        "num_upscaled_images": 1,
    }
    settings = {f"stage{stage}": {**STAGES[stage], **steps}}
    run = world.load(stages=(stage,), num_threads=1, validation_prompt="caption 1", **settings, **keys)
    made = prepared(run, world)
    stage_text(run, stage, made["text_embeds"])
    began = time.monotonic()
    whole = train_stage(workers(run, stage, 0), made, stage, tmp_path / "whole", how=run_here)
    step_s = (time.monotonic() - began) / run.config.stage(stage).steps  # of this machine
    broken, kills = tmp_path / "broken", 0
    while kills < KILLS or not checkpoints(broken):
        before, process = checkpoints(broken), forked(workers(run, stage, kills % 3), made, broken, stage)
        if chance.random() < 0.8:  # else while it is being set up
            while process.is_alive() and checkpoints(broken) <= before:
                time.sleep(0.01)
        time.sleep(chance.uniform(0, step_s))
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        if process.exitcode == 0:  # it was over: from the beginning
            assert train_stage(run, made, stage, broken, how=run_here).hashes == whole.hashes
            shutil.rmtree(broken)
    lora = train_stage(workers(run, stage, 2), made, stage, broken, how=run_here)
    assert lora.hashes == whole.hashes
    assert last["broken"] == last["whole"] and {"adapter", "optimizer", "ema", "numbers", "metrics"} <= {
        name.split(".")[0] for name in last["whole"]
    }
    assert lora.manifest.summary["steps_of_this_process"] < run.config.stage(stage).steps
    names = {name.split("/")[0] for name in lora.hashes}
    assert {"pytorch_lora_weights.safetensors", "metrics.parquet", "validation.parquet", "validation"} <= names


def plain_training(world: DataWorld, **keys: Any) -> tuple[Run, dict[str, Artifact]]:
    """A training of two steps and what it is made from."""
    for number, color in enumerate(["red", "blue"] * 4):
        world.add(f"{number}.png", np.full((64, 64, 3), 30 * number, np.uint8), color)
    steps = {"max_train_steps": 2, "train_batch_size": 1, "checkpoint_step_interval": 1}
    same = {"text_encoder_dtype": "fp32", "device": "cpu", "num_threads": 1, "mixed_precision": "no"}
    run = world.load(stages=(1,), stage1={"model_flavour": "tiny-i", **steps, **keys}, **same)
    made = prepared(run, world)
    stage_text(run, 1, made["text_embeds"])
    return run, made


@pytest.mark.parametrize("how", ["kill", "full disk"])
def test_a_training_that_ends_just_before_its_manifest_repeats_no_step(
    world: DataWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    run, made = plain_training(world)
    whole = train_stage(run, made, 1, tmp_path / "whole", how=run_here)

    def write(path: Path, record: Json) -> None:
        if path.name == MANIFEST:
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_sealed(path, record)

    with monkeypatch.context() as patch:
        patch.setattr(artifacts, "write_sealed", write)
        process = forked(run, made, tmp_path / "broken")
        process.join()
    assert process.exitcode == (-signal.SIGKILL if how == "kill" else 1)
    assert not list((tmp_path / "broken").glob(f"*_lora/*/{MANIFEST}"))
    lora = train_stage(run, made, 1, tmp_path / "broken", how=run_here)
    assert lora.hashes == whole.hashes
    assert lora.manifest.summary.get("steps_of_this_process", 0) == 0
    assert not list(lora.path.glob(".*")), "the working state is gone once the manifest is there"


def test_a_checkpoint_that_a_kill_left_half_written_does_not_take_the_place_of_a_whole_one(tmp_path: Path) -> None:
    """The interval may change, and `checkpointing_minutes` follows no step: the half one may be of a later step."""

    def save(step: int) -> None:
        tensors = {"w": torch.full((3,), float(step))}
        save_checkpoint(tmp_path, Checkpoint(step, tensors, tensors, {}, {}, []), 1)

    save(20)
    (tmp_path / ".checkpoints" / "step-00000035").mkdir()
    found = load_checkpoint(tmp_path)
    assert found is not None and found.step == 20
    save(30)
    found = load_checkpoint(tmp_path)
    assert found is not None and found.step == 30 and found.adapter["w"].tolist() == [30.0] * 3


def test_a_stored_loss_that_was_changed_is_measured_again_from_the_checkpoint_before_it(
    world: DataWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {"max_train_steps": 3, "validation_step_interval": 1, "validation_num_inference_steps": 1}
    run, made = plain_training(world, **keys)
    whole = train_stage(run, made, 1, tmp_path / "whole", how=run_here)
    begun = break_in_step(monkeypatch, 2)
    with pytest.raises(RuntimeError):
        train_stage(run, made, 1, tmp_path / "broken", how=run_here)
    (losses,) = (tmp_path / "broken").glob("*_lora/*/.validation/00000001.json")
    data = losses.read_bytes()
    place = data.index(b'"loss": 0.') + 11
    losses.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    assert train_stage(run, made, 1, tmp_path / "broken", how=run_here).hashes == whole.hashes
    assert begun == [0, 1, 2, 1, 2]


def test_a_checkpoint_without_room_is_told_with_its_size_and_the_one_before_stays(tmp_path: Path) -> None:
    def save(step: int, numbers: int) -> None:
        tensors = {"w": torch.full((numbers,), float(step))}
        save_checkpoint(disk.folder, Checkpoint(step, tensors, tensors, {}, {}, []), 1)

    with small_disk(tmp_path / "small", 20 * PAGE) as disk:
        save(1, 10)
        with pytest.raises(
            StorageError, match=r"^`adapter` of the checkpoint of step 2 takes 400 kB, and .* kB free\)"
        ):
            save(2, 100_000)
        found = load_checkpoint(disk.folder)
        assert found is not None and found.step == 1
        assert [path.name for path in (disk.folder / ".checkpoints").iterdir()] == ["step-00000001"], (
            "no half takes room"
        )


def test_an_old_checkpoint_that_cannot_be_removed_ends_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def save(step: int) -> None:
        tensors = {"w": torch.full((3,), float(step))}
        save_checkpoint(tmp_path, Checkpoint(step, tensors, tensors, {}, {}, []), 1)

    def refused(path: str, **keys: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), path)

    save(1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", refused)
        save(2)
    assert "step-00000001 cannot be removed: Input/output error" in caplog.text
    found = load_checkpoint(tmp_path)
    assert found is not None and found.step == 2
    save(3)
    assert [path.name for path in (tmp_path / ".checkpoints").iterdir()] == ["step-00000003"]
