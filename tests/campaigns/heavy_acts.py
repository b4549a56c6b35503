"""The acts that need torch: the commits of what jobs make, a bundle's among them, and a checkpoint."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from acts import Act, commit_of, noted
from data_world import DataWorld
from training_parts import FOLDERS, prepared, run_here, stage_text, train_stage

from deepfloyd_core.bundle.build import build_bundle
from deepfloyd_core.bundle.identity import BundleInputs, bundle_request
from deepfloyd_core.config.run import Run
from deepfloyd_core.config.stages import Stage
from deepfloyd_core.processes.pool import Children, Limits
from deepfloyd_core.sampling.identity import samples_request
from deepfloyd_core.sampling.jobs import SampleInputs, sample_job
from deepfloyd_core.store.artifacts import materialise
from deepfloyd_core.store.file_faults import written
from deepfloyd_core.training.checkpoints import Checkpoint, load_checkpoint, save_checkpoint

PROMPTS = ["red"]


def checkpoint_acts(folder: Path) -> list[Act]:
    """The checkpoint alone."""
    folder.mkdir()
    return [_checkpoint(folder)]


def heavy_acts(folder: Path) -> list[Act]:
    """A small run is made first, which takes 15 s."""
    (folder / "data" / "pictures").mkdir(parents=True)
    (folder / "checkpoint").mkdir()
    with Children(1, Limits(), ("deepfloyd_core.index.index",)) as children, noted() as built:
        _make_all(DataWorld(folder / "data", children))
    made = {each.request.kind: each for each in built}
    kinds = ("stage2_pixels", "text_embeds", "stage1_text", "stage2_text", "stage1_lora", "stage2_lora",
             "cascade_samples", "lora_bundle")  # fmt: skip
    return [_checkpoint(folder / "checkpoint"), *(commit_of(made[kind], folder / "commits") for kind in kinds)]


def _make_all(world: DataWorld) -> None:
    run = _run(world)
    made = prepared(run, world)
    loras = {}
    for stage in run.config.stages:
        stage_text(run, stage, made["text_embeds"])
        loras[f"stage{stage}_lora"] = train_stage(run, made, stage, run.workspace, how=run_here)
    inputs = SampleInputs(text_embeds=made["text_embeds"], eval_set=made["eval_set"], **loras)
    folders: dict[Stage, Path] = {stage: FOLDERS[stage] for stage in run.config.stages}
    request, job = samples_request(run, PROMPTS, folders, inputs), sample_job(run, PROMPTS, folders, inputs)
    samples = materialise(run.workspace, request, lambda work: run_here(job, work))
    bundled = BundleInputs(image_index=made["image_index"], cascade_samples=samples, **loras)
    materialise(run.workspace, bundle_request(bundled), lambda work: build_bundle(run, bundled, PROMPTS, work))


def _run(world: DataWorld) -> Run:
    rng = np.random.default_rng(0)
    for number, colour in enumerate(["red", "blue"] * 4):
        world.add(f"{number}.png", rng.integers(0, 255, (256, 256, 3), np.uint8), colour)
    steps: dict[str, Any] = {
        "max_train_steps": 2, "train_batch_size": 1, "checkpoint_step_interval": 1, "lora_rank": 1, "lr_warmup_steps": 0,
        "validation_num_inference_steps": 1,
    }  # fmt: skip
    same: dict[str, Any] = {"text_encoder_dtype": "fp32", "device": "cpu", "num_threads": 1, "mixed_precision": "no"}
    few: dict[str, Any] = {
        "num_validation_images": 1,
        "num_upscaled_images": 1,
        "forgetting_probes": 0,
        "shard_mib": 0.4,
    }
    first, second = ({"model_flavour": f"tiny-{'i' * stage}", **steps} for stage in (1, 2))
    return world.load(stage1=first, stage2=second, **same, **few, validation_prompt=PROMPTS[0])


def _checkpoint(folder: Path) -> Act:
    """The second checkpoint of a training that keeps one."""

    def save(step: int) -> None:
        tensors = {"w": torch.full((700,), float(step))}
        save_checkpoint(folder, Checkpoint(step, tensors, tensors, {"step": step}, {}, []), 1)

    def steps() -> int:
        found = load_checkpoint(folder)
        assert found is not None, "every checkpoint is gone"
        assert found.numbers == {"step": found.step}
        assert torch.equal(found.adapter["w"], torch.full((700,), float(found.step)))
        return found.step

    save(1)

    def check() -> None:
        assert steps() in (1, 2)
        save(2)
        assert steps() == 2
        save(3)
        assert [path.name for path in (folder / ".checkpoints").iterdir()] == ["step-00000003"]

    def do() -> None:
        with written(folder):
            save(2)

    return Act("a checkpoint", folder, do, check)
