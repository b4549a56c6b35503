"""The bundle: what was trained, schedulers, samples, metrics and a model card in one folder."""

import json
from pathlib import Path
from typing import Any

from deepfloyd_core.artifacts import Artifact, WorkDir
from deepfloyd_core.config import Run
from deepfloyd_core.counts import many
from deepfloyd_core.errors import ArtifactError
from deepfloyd_core.files import sha256_file, write_bytes
from deepfloyd_core.flavours import Stage
from deepfloyd_core.parts import take_part
from deepfloyd_core.products import BITFIT_FILE, CONTROL_FILE, DETAIL_SHEET, SPOILT_SHEETS, UNET_FOLDER, product_name
from deepfloyd_core.stage_config import StageConfig
from deepfloyd_core.versions import stage_folder

LICENCE = (
    "The base weights of DeepFloyd IF are under the DeepFloyd IF License Agreement; what is made from them may be "
    "used only as that licence allows. The shipped tiny cascade is under this project's own licence."
)
# Of a training, in the bundle; those on a parent where there was one.
_FIGURES = (
    "steps", "rows", "pictures", "trainable_parameters", "last_loss", "eval_loss_base", "eval_loss", "eval_gain",
    "eval_overfit_gap", "eval_loss_parent", "eval_gain_on_parent",
)  # fmt: skip


def build_bundle(run: Run, inputs: dict[str, Artifact], prompts: list[str], work: WorkDir) -> dict[str, Any]:
    """Copy the parts of a bundle together and write its model card. Returns the metrics."""
    metrics: dict[str, Any] = {}
    for stage in run.config.stages:
        lora, folder = inputs[f"stage{stage}_lora"], stage_folder(work.path, stage)
        folder.mkdir(exist_ok=True)
        _take(lora, {product_name(lora.path), "scheduler"}, folder)
        metrics[f"stage{stage}"] = {key: lora.summary[key] for key in _FIGURES if key in lora.summary}
    metrics["samples"] = inputs["cascade_samples"].summary
    samples = inputs["cascade_samples"]
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


def _card(run: Run, inputs: dict[str, Artifact], prompts: list[str], metrics: dict[str, Any]) -> str:
    lines = ["# Fine-tuned DeepFloyd IF", "", f"Data: {_data_line(inputs['image_index'])}", ""]
    lines += [*(_trained_line(stage, inputs) for stage in run.config.stages), ""]
    lines += ["![samples](sheet.png)", ""] if (inputs["cascade_samples"].path / "sheet.png").exists() else []
    if "upscaled" in inputs["cascade_samples"].summary:
        lines += ["![held-out pictures](eval.png)", "", f"![zoomed details]({DETAIL_SHEET})", ""]
        if "spoilt" in inputs["cascade_samples"].summary:
            lines += [f"![held-out pictures, low-res spoilt]({SPOILT_SHEETS[0]})", ""]
    if not (inputs["cascade_samples"].path / "sheet.png").exists():
        lines += ["There are no samples.", ""]
    elif run.config.stage1 and run.config.stage1.controlnet:
        lines += ["The samples follow held-out pictures, each with its own caption.", ""]
    else:
        lines += ["Sample prompts: " + "; ".join(f"`{prompt}`" for prompt in prompts), ""]
    lines += ["## Use", "", "```python"]
    for stage in run.config.stages:
        lines += _use(stage, run.config.stage(stage), product_name(inputs[f"stage{stage}_lora"].path))
    if run.config.stage2 and run.config.stage2.validation_back_projection:
        lines += [
            "from deepfloyd_core.back_projection import back_projecting",
            "# The figures and sheets here are of back-projected samples. Before each call with image=small, (B, 3, h, w):",
            "# stage2.scheduler = back_projecting(stage2.scheduler, small)",
        ]
    lines += ["```", "", "## Figures", "", "```json", json.dumps(metrics, indent=2, sort_keys=True), "```", ""]
    lines += ["## Lineage", ""]
    lines += [f"- {name}: {artifact.fingerprint}" for name, artifact in sorted(inputs.items())]
    lines += ["", "## Settings", ""]
    for stage in run.config.stages:
        settings = inputs[f"stage{stage}_lora"].manifest["spec"]
        lines += [f"### Stage {'I' * stage}", "", "```json", json.dumps(settings, indent=2, sort_keys=True), "```", ""]
    return "\n".join([*lines, "## Licence", "", LICENCE, ""])


def _made(stage: Stage, settings: StageConfig) -> str:
    """The call that makes what a ControlNet follows."""
    if settings.paired:
        return "as_conditioning(picture like those of conditioning_data, uint8 (B, H, W, 3))"
    return f"conditioning_picture(stage{stage}.unet.control.conditioning, picture in [-1, 1])"


def _data_line(index: Artifact) -> str:
    summary = index.summary
    return f"{summary['accepted']} of {summary['inputs']} pictures, data fingerprint {index.inputs['data']}"


def _trained_line(stage: Stage, inputs: dict[str, Artifact]) -> str:
    summary = inputs[f"stage{stage}_lora"].summary
    pictures, crops = many(summary["pictures"], "picture"), many(summary["rows"], "crop")
    of = f"Stage {'I' * stage} was trained on {pictures} ({crops})"
    if "eval_loss" in summary:
        return f"{of}, and measured on others, held out of training."
    return f"{of}. None was held out, so how it does on pictures that it was not trained on was not measured."


def _use(stage: Stage, settings: StageConfig, product: str) -> list[str]:
    model, name = settings.model, {1: "IFPipeline", 2: "IFSuperResolutionPipeline"}[stage]
    repo = model if not Path(model).is_absolute() else Path(model).name
    first, unet, load = [], "", [f'stage{stage}.load_lora_weights("stage{stage}")']
    if product == BITFIT_FILE:
        load = [
            "from safetensors.torch import load_file",
            f'biases = load_file("stage{stage}/{product}")',
            f"assert not stage{stage}.unet.load_state_dict(biases, strict=False).unexpected_keys",
        ]
    elif product == CONTROL_FILE:
        load = [
            "from deepfloyd_core.control import load_control",
            f'load_control(stage{stage}.unet, "stage{stage}/{product}")',
            "# Then give each call a picture to follow, float32 (B, 3, H, W) in [0, 1], from deepfloyd_core.conditioning's",
            f"# {_made(stage, settings)}:",
            f'# stage{stage}(..., cross_attention_kwargs={{"control_image": conditioning}}), one for all or for each',
        ]
    elif product == UNET_FOLDER:
        first = [
            "from diffusers import UNet2DConditionModel",
            f'unet = UNet2DConditionModel.from_pretrained("stage{stage}", subfolder="unet")',
        ]
        unet, load = "unet=unet, ", []
    return [
        f"from diffusers import DDPMScheduler, {name}",
        *first,
        f'stage{stage} = {name}.from_pretrained("{repo}", {unet}safety_checker=None, feature_extractor=None,',
        "    watermarker=None, requires_safety_checker=False)",
        *load,
        f'stage{stage}.scheduler = DDPMScheduler.from_pretrained("stage{stage}/scheduler")',
    ]
