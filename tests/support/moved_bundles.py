"""Bundles of what trainings leave, moved away from their base models by hand: without any training."""

from pathlib import Path
from typing import Any

import torch
from data_world import DataWorld

from deepfloyd_core.adapters.lora import trainable
from deepfloyd_core.adapters.method import method_of
from deepfloyd_core.config.run import Run
from deepfloyd_core.config.stages import STAGES, Stage
from deepfloyd_core.models.folders import resolve
from deepfloyd_core.models.identity import base_model
from deepfloyd_core.models.unet import load_unet, trained_scheduler
from deepfloyd_core.store.artifacts import Artifact, Request, WorkDir, materialise
from deepfloyd_core.store.manifest import Summary


def run_of(world: DataWorld, **stages: dict[str, Any]) -> tuple[Run, tuple[Stage, ...], dict[Stage, Path]]:
    """A run with the tables of these stages, and the folders of their base models."""
    (world.folder / "pictures").mkdir(exist_ok=True)
    numbers: tuple[Stage, ...] = tuple(stage for stage, kind in STAGES.items() if kind.table in stages)
    run = world.load(stages=numbers, device="cpu", **stages)
    return run, numbers, {stage: resolve(run.config.stage(stage).model, stage) for stage in numbers}


def moved_bundle(world: DataWorld, **stages: dict[str, Any]) -> tuple[Run, Artifact, dict[Stage, Path]]:
    """A run, its bundle, and the folders of the base models."""
    run, numbers, bases = run_of(world, **stages)

    def build(work: WorkDir) -> Summary:
        for stage in numbers:
            settings = run.config.stage(stage)
            unet, method = load_unet(bases[stage], torch.float32), method_of(settings)
            method.prepare(unet, settings, 0)
            generator = torch.Generator().manual_seed(1)
            with torch.no_grad():
                for param in trainable(unet).values():
                    param.add_(0.02 * torch.randn(param.shape, generator=generator))
            folder = work.path / STAGES[stage].table
            folder.mkdir()
            method.save(unet, stage, bases[stage], folder)
            trained_scheduler(bases[stage], False).save_pretrained(folder / "scheduler")
        return Summary()

    inputs: dict[str, str] = {}
    for stage in numbers:
        inputs |= base_model(stage, bases[stage], f"stage{stage}_model") | {f"stage{stage}_lora": "stage_lora/0"}
    return run, materialise(run.workspace, Request("lora_bundle", 1, {}, inputs), build), bases
