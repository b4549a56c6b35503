"""Epochs in place of steps: how many batches one has, and that the training is the one of as many steps."""

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from data_world import DataWorld
from training_parts import FOLDERS

from deepfloyd_core.config.run import Run
from deepfloyd_core.crops.rows import eval_ids
from deepfloyd_core.errors import ConfigError, JobError
from deepfloyd_core.preflight.load import load_run
from deepfloyd_core.store.artifacts import Artifact, Request
from deepfloyd_core.store.manifest import MANIFEST
from deepfloyd_core.training.batches import MixedOrder, OrderSettings, TrainingRows
from deepfloyd_core.training.epochs import batches_per_epoch, crops_of_sizes, with_steps
from deepfloyd_core.training.identity import lora_request
from deepfloyd_core.training.jobs import SizeCrops, TrainingInputs
from deepfloyd_core.training.mixing import Share
from tasks import stage_lora


def made(world: DataWorld, **keys: Any) -> tuple[Run, Artifact, Artifact]:
    """11 pictures of two shapes in one set, 3 of them once more in another; 1 of each set is held out."""
    rng = np.random.default_rng(0)
    for number in range(11):
        size = (80, 80, 3) if number < 7 else (80, 120, 3)
        world.add(f"{number}.png", rng.integers(0, 255, size, dtype=np.uint8))
    for number in range(3):
        world.add(f"../more/{number}.png", rng.integers(0, 255, (90, 90, 3), dtype=np.uint8))
    more = {"id": "more", "instance_data_dir": str(world.folder / "more"), "repeats": 1}
    run = world.load({"crop_aspect": "preserve"}, more, stages=(1,), stage1={"model_flavour": "tiny-i", **keys})
    index = world.index(run)
    return run, world.pixels(run, index, 1), world.eval_set(run, index)


def test_an_epoch_shows_every_crop_once_in_the_batches_of_training(world: DataWorld) -> None:
    _, pixels, held_out = made(world)
    rows = TrainingRows(pixels, eval_ids(held_out))
    for batch in (1, 2, 3, 5, 100):
        order = MixedOrder(rows, {"set": Share(1.0), "more": Share(1.0)}, OrderSettings(batch, 1, 10, 0, True))
        count = batches_per_epoch(pixels, eval_ids(held_out), batch)
        assert count == sum(row.batches for row in order.buckets())
        sizes = [SizeCrops(dataset=row.dataset, size=row.size, crops=row.crops) for row in order.buckets()]
        assert sorted(crops_of_sizes(pixels, eval_ids(held_out)), key=str) == sorted(sizes, key=str)
        seen = [place for number in range(count) for place in order.batch(number)[1].tolist()]
        assert len(seen) == sum(rows.counts.values()) == 10 + 2 * 2


@pytest.mark.parametrize("manifest", ["", "{}", '{"seal": "0"}'])
def test_a_training_whose_manifest_is_damaged_is_made_anew(
    world: DataWorld, monkeypatch: pytest.MonkeyPatch, manifest: str
) -> None:
    run, pixels, held_out = made(world)
    request = Request("stage1_lora", 1, {}, {})
    (run.workspace / request.name).mkdir(parents=True)
    (run.workspace / request.name / MANIFEST).write_text(manifest)
    monkeypatch.setattr(stage_lora, "resolve", lambda model, stage: FOLDERS[1])
    monkeypatch.setattr(stage_lora, "train_job", lambda *args: Mock(parent=None))
    monkeypatch.setattr(stage_lora, "lora_request", lambda *args: request)
    monkeypatch.setattr(stage_lora, "run_together", Mock(side_effect=JobError("it is trained")))
    inputs = TrainingInputs(pixels=pixels, text=pixels, eval_set=held_out)
    with pytest.raises(JobError, match="it is trained"):
        stage_lora.stage_lora.fn(run, 1, inputs, [])


def test_epochs_are_the_training_of_as_many_steps_to_the_fingerprint(
    world: DataWorld, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("deepfloyd_core.training.identity.text_identity", lambda text: "text")
    caplog.set_level("INFO")
    run, pixels, held_out = made(world, num_train_epochs=3, train_batch_size=2, gradient_accumulation_steps=2)
    batches = batches_per_epoch(pixels, eval_ids(held_out), 2)
    counted = with_steps(run, 1, pixels, held_out)
    assert counted.config.stage(1).steps == -(-3 * batches // 2)
    assert f"stage 1: 3 epochs of {batches} batches make {-(-3 * batches // 2)} steps" in caplog.messages
    written = load_run(
        Path(run.workspace).parent / "run.json",
        ("stage1.num_train_epochs=", f"stage1.max_train_steps={-(-3 * batches // 2)}"),
    )
    inputs = TrainingInputs(pixels=pixels, text=pixels, eval_set=held_out)

    def fingerprint(of: Run) -> str:
        return lora_request(of, 1, FOLDERS[1], inputs).fingerprint

    assert fingerprint(counted) == fingerprint(with_steps(written, 1, pixels, held_out))
    more = load_run(Path(run.workspace).parent / "run.json", ("stage1.num_train_epochs=4",))
    assert fingerprint(with_steps(more, 1, pixels, held_out)) != fingerprint(counted)


def test_what_depends_on_the_steps_is_checked_once_they_are_known(world: DataWorld) -> None:
    run, pixels, held_out = made(world, num_train_epochs=1, train_batch_size=100, lr_warmup_steps=50)
    with pytest.raises(ConfigError, match=r"lr_warmup_steps is 50; it must be below max_train_steps \(\d\)"):
        with_steps(run, 1, pixels, held_out)
    late = replace(run, datasets=tuple(data.model_copy(update={"start_step": 1}) for data in run.datasets))
    warm = late.config.stage(1).model_copy(update={"lr_warmup_steps": 0})
    with pytest.raises(ConfigError, match="starts later"):
        with_steps(replace(late, config=late.config.model_copy(update={"stage1": warm})), 1, pixels, held_out)


def test_two_lengths_of_one_training_are_refused(world: DataWorld) -> None:
    with pytest.raises(ConfigError, match="num_train_epochs is 2 and max_train_steps is 5: two lengths"):
        world.load(stages=(1,), stage1={"model_flavour": "tiny-i", "num_train_epochs": 2, "max_train_steps": 5})


def test_a_file_of_simpletuners_with_no_steps_goes_by_its_epochs(world: DataWorld) -> None:
    world.load()
    path = world.folder / "config.json"
    path.write_text('{"model_flavour": "tiny-i", "output_dir": "o", "max_train_steps": 0, "num_train_epochs": "10",'
                    f'"data_backend_config": "{world.folder}/data.json"}}')  # fmt: skip
    stage = load_run(path).config.stage(1)
    assert (stage.num_train_epochs, stage.max_train_steps) == (10, None)
    path.write_text(path.read_text().replace('_steps": 0', '_steps": 70').replace('"10"', "0"))
    assert load_run(path).config.stage(1).steps == 70
