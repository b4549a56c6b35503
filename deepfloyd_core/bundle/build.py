"""The bundle: what was trained, schedulers, samples, metrics and a model card in one folder."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from deepfloyd_core.adapters.files import product_name
from deepfloyd_core.bundle.card import card_code
from deepfloyd_core.bundle.inputs import BundleInputs
from deepfloyd_core.config.flavours import Stage
from deepfloyd_core.config.run import Run
from deepfloyd_core.errors import ArtifactError
from deepfloyd_core.files import sha256_file, write_bytes
from deepfloyd_core.measures.files import DETAIL_SHEET, SPOILT_SHEETS
from deepfloyd_core.measures.tables import measure_tables
from deepfloyd_core.store.artifacts import Artifact, WorkDir
from deepfloyd_core.store.counts import many
from deepfloyd_core.store.parts import take_part
from deepfloyd_core.store.versions import stage_folder

LICENCE = (
    "The base weights of DeepFloyd IF are under the DeepFloyd IF License Agreement; what is made from them may be "
    "used only as that licence allows. The shipped tiny cascade is under this project's own licence."
)
# Of a training, in the bundle; those on a parent where there was one.
_FIGURES = (
    "steps", "rows", "pictures", "trainable_parameters", "last_loss", "eval_loss_base", "eval_loss", "eval_gain",
    "eval_overfit_gap", "eval_loss_parent", "eval_gain_on_parent",
)  # fmt: skip


def build_bundle(run: Run, inputs: BundleInputs[Artifact], prompts: list[str], work: WorkDir) -> dict[str, Any]:
    """Copy the parts of a bundle together and write its model card. Returns the metrics."""
    metrics: dict[str, Any] = {}
    for stage in run.config.stages:
        lora, folder = inputs.loras[stage], stage_folder(work.path, stage)
        folder.mkdir(exist_ok=True)
        _take(lora, {product_name(lora.path), "scheduler"}, folder)
        metrics[f"stage{stage}"] = {key: lora.summary[key] for key in _FIGURES if key in lora.summary}
    samples = inputs.cascade_samples
    metrics["samples"] = samples.summary
    _take(samples, {sheet.name for sheet in samples.path.glob("*.png")}, work.path)
    write_bytes(work.path / "metrics.json", (json.dumps(metrics, indent=2, sort_keys=True) + "\n").encode())
    write_bytes(work.path / "README.md", _card(run, inputs, prompts, metrics).encode())
    return metrics


def _take(source: Artifact, names: set[str], folder: Path) -> None:
    """Link files and folders at the top of an artifact into a folder: a whole UNet has gigabytes.

    Hashes them first (1.7 GB/s). Raises ArtifactError when one has other bytes than were written.
    """
    for name, sha256 in source.hashes.items():
        if Path(name).parts[0] in names:
            if sha256_file(source.path / name) != sha256:
                raise ArtifactError(
                    f"{source.path / name} has other bytes than its manifest says. Remove {source.path}, and the next run "
                    "makes it again."
                )
            (folder / name).parent.mkdir(exist_ok=True)
            take_part(source.path / name, sha256, folder / name)


def _card(run: Run, inputs: BundleInputs[Artifact], prompts: list[str], metrics: dict[str, Any]) -> str:
    samples, sampled = inputs.cascade_samples.summary, (inputs.cascade_samples.path / "sheet.png").exists()
    lines = ["# Fine-tuned DeepFloyd IF", "", f"Data: {_data_line(inputs.image_index)}", ""]
    lines += [*(_trained_line(stage, inputs.loras[stage]) for stage in run.config.stages), ""]
    lines += ["![samples](sheet.png)", ""] if sampled else []
    if "upscaled" in samples:
        lines += ["![held-out pictures](eval.png)", "", f"![zoomed details]({DETAIL_SHEET})", ""]
        if "spoilt" in samples:
            lines += [f"![held-out pictures, low-res spoilt]({SPOILT_SHEETS[0]})", ""]
    if not sampled:
        lines += ["There are no samples.", ""]
    elif run.config.stage1 and run.config.stage1.controlnet:
        lines += ["The samples follow held-out pictures, each with its own caption.", ""]
    else:
        lines += ["Sample prompts: " + "; ".join(f"`{prompt}`" for prompt in prompts), ""]
    lines += ["## Use", "", "```python"]
    products = {stage: product_name(inputs.loras[stage].path) for stage in run.config.stages}
    lines += [*card_code(run, products, prompts[0]), "```", "", "## Figures", "", *_measure_tables(metrics["samples"])]
    lines += ["```json", json.dumps(metrics, indent=2, sort_keys=True), "```", ""]
    lines += ["## Lineage", ""]
    lines += [f"- {name}: {artifact.fingerprint}" for name, artifact in sorted(inputs.by_name.items())]
    lines += ["", "## Settings", ""]
    for stage in run.config.stages:
        settings = inputs.loras[stage].manifest["spec"]
        lines += [f"### Stage {'I' * stage}", "", "```json", json.dumps(settings, indent=2, sort_keys=True), "```", ""]
    return "\n".join([*lines, "## Licence", "", LICENCE, ""])


def _measure_tables(samples: dict[str, Any]) -> list[str]:
    """Stage II's measures as markdown tables, their heads with unit and direction."""
    lines: list[str] = []
    for table in measure_tables(samples):
        rows = table.rows()
        lines += [f"{table.title}:", "", _line(rows[0]), _line(["---"] * len(rows[0]))]
        lines += [*(_line(row.values()) for row in rows), ""]
    return lines


def _line(cells: Iterable[Any]) -> str:
    return "| " + " | ".join("" if cell is None else str(cell) for cell in cells) + " |"


def _data_line(index: Artifact) -> str:
    summary = index.summary
    return f"{summary['accepted']} of {summary['inputs']} pictures, data fingerprint {index.inputs['data']}"


def _trained_line(stage: Stage, lora: Artifact) -> str:
    summary = lora.summary
    pictures, crops = many(summary["pictures"], "picture"), many(summary["rows"], "crop")
    of = f"Stage {'I' * stage} was trained on {pictures} ({crops})"
    if "eval_loss" in summary:
        return f"{of}, and measured on others, held out of training."
    return f"{of}. None was held out, so how it does on pictures that it was not trained on was not measured."
