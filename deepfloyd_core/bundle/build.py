"""The bundle: trained weights, schedulers, samples, metrics and a model card in one folder.

It also has the figures of each held-out picture, which the gate compares with those of the next candidate.
"""

import json
from pathlib import Path

from deepfloyd_core.adapters.files import product_name
from deepfloyd_core.bundle.card import model_card
from deepfloyd_core.bundle.identity import BundleInputs, BundleSummary
from deepfloyd_core.config.run import Run
from deepfloyd_core.config.stages import STAGES
from deepfloyd_core.files import write_bytes
from deepfloyd_core.measures.files import UpscalingFiles
from deepfloyd_core.sampling.jobs import PROBES_FILE, SamplesSummary
from deepfloyd_core.store.artifacts import Artifact, WorkDir
from deepfloyd_core.store.parts import copy_part
from deepfloyd_core.store.versions import stage_folder
from deepfloyd_core.training.jobs import VALIDATION_FILE, TrainingSummary


def build_bundle(run: Run, inputs: BundleInputs[Artifact], prompts: list[str], work: WorkDir) -> BundleSummary:
    """Copy the parts of a bundle together and write its model card. Returns the metrics."""
    trained = {stage: lora.summary(TrainingSummary) for stage, lora in inputs.loras.items()}
    for stage, lora in inputs.loras.items():
        folder = stage_folder(work.path, stage)
        folder.mkdir(exist_ok=True)
        _take(lora, {product_name(lora.path), "scheduler", VALIDATION_FILE}, folder)
    samples = inputs.cascade_samples
    by_table = {STAGES[stage].table: figures for stage, figures in trained.items()}
    metrics = BundleSummary(**by_table, samples=samples.summary(SamplesSummary))
    figures = {PROBES_FILE, *(UpscalingFiles(stage).table.name for stage in run.config.upscalers)}
    _take(samples, {sheet.name for sheet in samples.path.glob("*.png")} | figures, work.path)
    write_bytes(work.path / "metrics.json", (_metrics_json(metrics) + "\n").encode())
    write_bytes(work.path / "README.md", model_card(run, inputs, prompts, metrics).encode())
    return metrics


def _metrics_json(metrics: BundleSummary) -> str:
    return json.dumps(metrics.record, indent=2, sort_keys=True)


def _take(source: Artifact, names: set[str], folder: Path) -> None:
    """Copy files and folders at the top of an artifact into a folder: a release shares no bytes with what it is made from.

    Hashes the copies (1.7 GB/s). Raises ArtifactError when one has other bytes than were written.
    """
    for name, sha256 in source.hashes.items():
        if Path(name).parts[0] in names:
            (folder / name).parent.mkdir(exist_ok=True)
            copy_part(source.path / name, sha256, folder / name)
