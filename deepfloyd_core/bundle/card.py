"""The model card, `README.md` of a bundle: what the Hugging Face Hub reads of it (YAML), then what a person reads."""

from collections.abc import Iterator, Sequence

import yaml

from deepfloyd_core.adapters.files import BITFIT_FILE, CONTROL_FILE, UNET_FOLDER, product_name
from deepfloyd_core.bundle.card_code import card_code, private_bases
from deepfloyd_core.bundle.identity import BundleInputs, BundleSummary
from deepfloyd_core.bundle.measure_words import measure_words
from deepfloyd_core.bundle.version_figures import three
from deepfloyd_core.config.run import Run
from deepfloyd_core.config.stages import STAGES, Stage
from deepfloyd_core.crops.summary import CropsSummary
from deepfloyd_core.index.summary import IndexSummary
from deepfloyd_core.measures.figures import signed
from deepfloyd_core.measures.files import UpscalingFiles
from deepfloyd_core.store.artifacts import Artifact, workspace_of
from deepfloyd_core.store.counts import many
from deepfloyd_core.store.settings import changed_settings
from deepfloyd_core.training.jobs import TrainingFigures
from deepfloyd_core.training.start import StartSummary
from deepfloyd_core.types import Json

LICENCE = (
    "The base weights of DeepFloyd IF are under the DeepFloyd IF License Agreement; what is made from them may be "
    "used only as that licence allows. The shipped tiny cascade is under this project's own licence."
)
_HUB_LICENCE, _HUB_OWNER = "deepfloyd-if-license", "DeepFloyd/"
_KINDS = {BITFIT_FILE: "biases", CONTROL_FILE: "controlnet", UNET_FOLDER: "full-finetune"}


def model_card(run: Run, inputs: BundleInputs[Artifact], prompts: list[str], metrics: BundleSummary) -> str:
    """The card. prompts: those of the samples."""
    products = {stage: product_name(inputs.loras[stage].path) for stage in run.config.stages}
    sampled = (inputs.cascade_samples.path / "sheet.png").exists()
    parts = [
        _front_matter(run, products, prompts, sampled),
        ["# Fine-tuned DeepFloyd IF", ""],
        _samples(run, prompts, metrics, sampled),
        [
            "## Use",
            "",
            *(line for note in private_bases(run) for line in (note, "")),
            "```python",
            *card_code(run, products, prompts[0]),
            "```",
            "",
        ],
        ["## Data", "", *_data(inputs, metrics), ""],
        ["## Figures", "", *_figures(metrics)],
        ["## Settings", "", *_settings(inputs)],
        ["## Lineage", "", *_lineage(inputs)],
        ["## Licence", "", LICENCE],
    ]
    return "\n".join([*(line for part in parts for line in part), ""])


def _front_matter(run: Run, products: dict[Stage, str], prompts: list[str], sampled: bool) -> list[str]:
    """Metadata of the Hub (huggingface.co/docs/hub/model-cards): base models are named if they are on the Hub."""
    models = [run.config.stage(stage).model for stage in products]
    bases = [model for model in models if model.startswith(_HUB_OWNER)]
    kinds = dict.fromkeys(_KINDS.get(product, "lora") for product in products.values())
    is_adapter = "full-finetune" not in kinds
    of_picture = {"text": prompts[0], "output": {"url": "sheet.png"}}
    fields: Json = {
        **({"base_model": bases, "base_model_relation": "adapter" if is_adapter else "finetune"} if bases else {}),
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image" if run.config.text_to_image else "image-to-image",
        "license": _HUB_LICENCE if len(bases) == len(models) else "other",
        "instance_prompt": prompts[0],
        "tags": ["deepfloyd-if", "diffusers", *kinds],
        **({"widget": [of_picture]} if sampled else {}),
    }
    return ["---", yaml.safe_dump(fields, sort_keys=False, allow_unicode=True, width=1000).rstrip(), "---", ""]


def _samples(run: Run, prompts: list[str], metrics: BundleSummary, sampled: bool) -> list[str]:
    lines = ["![base and fine-tuned, same seeds](sheet.png)", ""] if sampled else []
    if not sampled:
        lines += ["There are no samples.", ""]
    elif run.config.text_to_image and run.config.text_to_image.controlnet:
        lines += ["The samples have held-out pictures as conditioning, each with its caption.", ""]
    else:
        lines += ["Prompts: " + "; ".join(f"`{prompt}`" for prompt in prompts), ""]
    for files in map(UpscalingFiles, run.config.upscalers if metrics.samples.held_out else ()):
        lines += [f"![held-out pictures]({files.sheet})", "", f"![zoomed details]({files.details})", ""]
        if metrics.samples.spoilt:
            lines += [f"![held-out pictures, low-res degraded]({files.spoilt[0]})", ""]
    return lines


def _data(inputs: BundleInputs[Artifact], metrics: BundleSummary) -> list[str]:
    """How many pictures there were, and what became of them."""
    counts = inputs.image_index.summary(IndexSummary)
    lines = [f"{many(counts.inputs, 'picture')}, of which {counts.rejected:,} were rejected."]
    eval_sets = inputs.cascade_samples.inputs.get("eval_set", "")
    if eval_sets:
        kind, fingerprint = eval_sets.split("/")
        held_out = Artifact(kind, fingerprint, workspace_of(inputs.image_index.path) / kind / fingerprint)
        lines += [
            f"{held_out.summary(CropsSummary).pictures:,} were held out of training, and are what is measured on."
        ]
    lines += [
        f"{_trained(stage, training)}{_start(inputs.loras[stage])}" for stage, training in metrics.trainings.items()
    ]
    return [" ".join(lines)]


def _trained(stage: Stage, training: TrainingFigures) -> str:
    told = f"{STAGES[stage].title} was trained on {many(training.pictures, 'picture')} ({many(training.rows, 'crop')})."
    return told if training.eval_loss is not None else f"{told} No picture was held out of it, so it was not measured."


def _start(lora: Artifact) -> str:
    """What a warm training started from; empty for another one."""
    if "start" not in lora.inputs:
        return ""
    kind, fingerprint = lora.inputs["start"].split("/")
    start = Artifact(kind, fingerprint, workspace_of(lora.path) / kind / fingerprint).summary(StartSummary)
    return (
        f" It started from version {start.version}, which was trained on {start.pictures:,} of these pictures. Others, if "
        f"there are any, have {lora.spec['warm_new_share']:.0%} of its batches."
    )


def _figures(metrics: BundleSummary) -> Iterator[str]:
    """The figures as tables, with 95 % intervals; all of them are in metrics.json."""
    rows = list(_losses(metrics))
    if rows:
        yield from (*table(("on held-out pictures, less is better", "base", "tuned", "change"), rows), "")
    for measured in metrics.tables:
        words = measure_words(measured)
        yield from (f"{measured.title}:", "", *table(words.heads, words.rows), "")
        yield from (*(f"- {note}" for note in words.notes), "")
    yield from ("`metrics.json` has all figures, with more digits.", "")


def _losses(metrics: BundleSummary) -> Iterator[tuple[str, ...]]:
    """The losses: before, after, and the change with its interval."""
    for stage, training in metrics.trainings.items():
        for change in training.changes:
            if change.since == "base":
                middle, *ends = (-one for one in change.gain)
                interval = f" ({signed(min(ends), 4)} to {signed(max(ends), 4)}, 95 %)" if ends else ""
                name = f"{STAGES[stage].title}: loss"
                yield name, three(change.before), three(change.after), f"{signed(middle, 4)}{interval}"
    base, tuned = metrics.samples.probe_loss_base, metrics.samples.probe_loss_tuned
    if base is not None and tuned is not None:
        yield "Stage I: loss on the base's own pictures", three(base), three(tuned), signed(tuned - base, 4)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table in markdown."""
    lines = [heads, ("---",) * len(heads), *rows]
    return [f"| {' | '.join(map(_cell, line))} |" for line in lines]


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("`", "'")


def _settings(inputs: BundleInputs[Artifact]) -> list[str]:
    """Those that differ from their defaults."""
    settings: dict[str, tuple[str, str]] = {}
    for artifact in (*inputs.loras.values(), inputs.cascade_samples):
        settings |= changed_settings(artifact.kind, artifact.spec)
    rows = [(name, value, default) for name, (value, default) in sorted(settings.items())]
    return [*table(("setting", "value", "default"), rows), ""] if rows else ["All are the defaults.", ""]


def _lineage(inputs: BundleInputs[Artifact]) -> list[str]:
    lines = [f"- {name}: {artifact.fingerprint}" for name, artifact in sorted(inputs.by_field.items())]
    return [*lines, f"- data: {inputs.image_index.inputs['data']}", ""]
