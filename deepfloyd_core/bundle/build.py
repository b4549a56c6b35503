"""The bundle: trained weights, schedulers, samples, metrics and a model card in one folder.

It also has the figures of each held-out picture, which the gate compares with those of the next candidate.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from deepfloyd_core.adapters.files import product_name
from deepfloyd_core.bundle.card import card_code
from deepfloyd_core.bundle.identity import BundleInputs, BundleSummary
from deepfloyd_core.config.run import Run
from deepfloyd_core.config.stages import STAGES, Stage
from deepfloyd_core.errors import ArtifactError
from deepfloyd_core.files import sha256_file, write_bytes
from deepfloyd_core.index.summary import IndexSummary
from deepfloyd_core.measures.files import UpscalingFiles
from deepfloyd_core.measures.tables import MeasureTable
from deepfloyd_core.sampling.jobs import PROBES_FILE, SamplesSummary
from deepfloyd_core.store.artifacts import Artifact, WorkDir, workspace_of
from deepfloyd_core.store.counts import many
from deepfloyd_core.store.parts import take_part
from deepfloyd_core.store.versions import stage_folder
from deepfloyd_core.training.jobs import VALIDATION_FILE, TrainingFigures, TrainingSummary
from deepfloyd_core.training.start import StartSummary

LICENCE = (
    "The base weights of DeepFloyd IF are under the DeepFloyd IF License Agreement; what is made from them may be "
    "used only as that licence allows. The shipped tiny cascade is under this project's own licence."
)


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
    write_bytes(work.path / "README.md", _card(run, inputs, prompts, metrics).encode())
    return metrics


def _metrics_json(metrics: BundleSummary) -> str:
    return json.dumps(metrics.record, indent=2, sort_keys=True)


def _take(source: Artifact, names: set[str], folder: Path) -> None:
    """Link files and folders at the top of an artifact into a folder: a whole UNet has gigabytes.

    Hashes them first (1.7 GB/s). Raises ArtifactError when one has other bytes than were written.
    """
    for name, sha256 in source.hashes.items():
        if Path(name).parts[0] in names:
            if sha256_file(source.path / name) != sha256:
                raise ArtifactError(
                    f"{source.path / name} has other bytes than its manifest says. Remove {source.path}, and the next "
                    "run rebuilds it."
                )
            (folder / name).parent.mkdir(exist_ok=True)
            take_part(source.path / name, sha256, folder / name)


def _card(run: Run, inputs: BundleInputs[Artifact], prompts: list[str], metrics: BundleSummary) -> str:
    sampled = (inputs.cascade_samples.path / "sheet.png").exists()
    lines = ["# Fine-tuned DeepFloyd IF", "", f"Data: {_data_line(inputs.image_index)}", ""]
    lines += [f"{_trained_line(stage, training)}{_start_line(inputs.loras[stage])}"
              for stage, training in metrics.trainings.items()]  # fmt: skip
    lines += [""]
    lines += ["![samples](sheet.png)", ""] if sampled else []
    for files in map(UpscalingFiles, run.config.upscalers if metrics.samples.held_out else ()):
        lines += [f"![held-out pictures]({files.sheet})", "", f"![zoomed details]({files.details})", ""]
        if metrics.samples.spoilt:
            lines += [f"![held-out pictures, low-res degraded]({files.spoilt[0]})", ""]
    if not sampled:
        lines += ["There are no samples.", ""]
    elif run.config.text_to_image and run.config.text_to_image.controlnet:
        lines += ["The samples have held-out pictures as conditioning, each with its caption.", ""]
    else:
        lines += ["Sample prompts: " + "; ".join(f"`{prompt}`" for prompt in prompts), ""]
    lines += ["## Use", "", "```python"]
    products = {stage: product_name(inputs.loras[stage].path) for stage in run.config.stages}
    lines += [*card_code(run, products, prompts[0]), "```", "", "## Figures", "", *markdown_tables(metrics.tables)]
    lines += ["```json", _metrics_json(metrics), "```", ""]
    lines += ["## Lineage", ""]
    lines += [f"- {name}: {artifact.fingerprint}" for name, artifact in sorted(inputs.by_field.items())]
    lines += ["", "## Settings", ""]
    for stage in run.config.stages:
        settings = inputs.loras[stage].spec
        lines += [
            f"### {STAGES[stage].title}",
            "",
            "```json",
            json.dumps(settings, indent=2, sort_keys=True),
            "```",
            "",
        ]
    return "\n".join([*lines, "## Licence", "", LICENCE, ""])


def _start_line(lora: Artifact) -> str:
    """What a warm training started from; empty for another one."""
    if "start" not in lora.inputs:
        return ""
    kind, fingerprint = lora.inputs["start"].split("/")
    start = Artifact(kind, fingerprint, workspace_of(lora.path) / kind / fingerprint).summary(StartSummary)
    return (
        f" It started from version {start.version}, which was trained on {start.pictures:,} of these pictures. Others, if "
        f"there are any, have {lora.spec['warm_new_share']:.0%} of its batches."
    )


def markdown_tables(tables: Iterable[MeasureTable]) -> list[str]:
    """Measures as markdown tables, their heads with unit and direction."""
    lines: list[str] = []
    for table in tables:
        rows = table.rows()
        lines += [f"{table.title}:", "", _line(rows[0]), _line(["---"] * len(rows[0]))]
        lines += [*(_line(row.values()) for row in rows), ""]
    return lines


def _line(cells: Iterable[object]) -> str:
    return "| " + " | ".join("" if cell is None else str(cell) for cell in cells) + " |"


def _data_line(index: Artifact) -> str:
    counts = index.summary(IndexSummary)
    return f"{counts.accepted} of {counts.inputs} pictures, data fingerprint {index.inputs['data']}"


def _trained_line(stage: Stage, training: TrainingFigures) -> str:
    pictures, crops = many(training.pictures, "picture"), many(training.rows, "crop")
    of = f"{STAGES[stage].title} was trained on {pictures} ({crops})"
    if training.eval_loss is not None:
        return f"{of}, and measured on others, held out of training."
    return f"{of}. No picture was held out, so it was not measured on pictures outside the training set."
