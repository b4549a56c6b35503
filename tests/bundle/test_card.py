"""The model card: what the Hub reads of it, and what a person reads."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from bundle_parts import INDEX, SCHEDULER, TRAINING, make
from data_world import DataWorld

from deepfloyd_core.adapters.files import LORA_FILE, UNET_FOLDER
from deepfloyd_core.bundle import card
from deepfloyd_core.bundle.card import model_card, table
from deepfloyd_core.bundle.identity import BundleInputs, BundleSummary
from deepfloyd_core.config.flavours import FLAVOURS
from deepfloyd_core.config.run import Run
from deepfloyd_core.measures.figures import UpscalingFigures
from deepfloyd_core.sampling.jobs import SamplesSummary
from deepfloyd_core.store.artifacts import Artifact
from deepfloyd_core.training.jobs import TrainingFigures

FIGURES = TrainingFigures(
    steps=100, rows=80, pictures=40, trainable_parameters=1, last_loss=0.1, reload_difference=0.0, eval_loss_base=0.0537,
    eval_loss=0.0088, eval_gain=(0.0449, 0.0303, 0.0595),
)  # fmt: skip
UPSCALED = UpscalingFigures(
    noise_level=250, gain={"bicubic": {"psnr": (1.5, 1.2, 1.8)}},
    upscaled={method: {"psnr": psnr} for method, psnr in (("bicubic", 30.12345), ("base", 31.0), ("tuned", 32.0))},
)  # fmt: skip


def front_matter(text: str) -> dict[str, Any]:
    """As the Hub reads it."""
    assert text.startswith("---\n")
    found: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    return found


@pytest.fixture
def inputs(world: DataWorld) -> BundleInputs[Artifact]:
    run = world.load()
    trained = {LORA_FILE: b"weights", SCHEDULER: b"{}"}
    return BundleInputs(
        image_index=make(run, "image_index", {}, INDEX.model_copy(update={"inputs": 45, "rejected": 3}), data="1" * 16),
        stage1_lora=make(run, "stage1_lora", trained, TRAINING, model="2" * 16),
        stage2_lora=make(run, "stage2_lora", trained, TRAINING, model="3" * 16),
        cascade_samples=make(run, "cascade_samples", {"sheet.png": b"samples"}, SamplesSummary()),
    )


def on_the_hub(run: Run) -> Run:
    stages = {name: getattr(run.config, name).model_copy(update={"pretrained_model_name_or_path": repo})
              for name, repo in (("stage1", "DeepFloyd/IF-I-M-v1.0"), ("stage2", "DeepFloyd/IF-II-M-v1.0"))}  # fmt: skip
    return Run(**{**vars(run), "config": run.config.model_copy(update=stages)})


def test_the_hub_is_told_base_models_licence_library_and_a_picture(
    world: DataWorld, inputs: BundleInputs[Artifact]
) -> None:
    metrics = BundleSummary(stage1=FIGURES, stage2=FIGURES, samples=SamplesSummary())
    prompt = 'a "purple" star: # yes'
    fields = front_matter(model_card(on_the_hub(world.load()), inputs, [prompt], metrics))
    assert fields == {
        "base_model": ["DeepFloyd/IF-I-M-v1.0", "DeepFloyd/IF-II-M-v1.0"], "base_model_relation": "adapter",
        "library_name": "diffusers", "pipeline_tag": "text-to-image", "license": "deepfloyd-if-license",
        "instance_prompt": prompt, "tags": ["deepfloyd-if", "diffusers", "lora"],
        "widget": [{"text": prompt, "output": {"url": "sheet.png"}}],
    }  # fmt: skip
    tiny = front_matter(model_card(world.load(), inputs, [prompt], metrics))
    assert "base_model" not in tiny and tiny["license"] == "other"


def test_a_base_model_of_this_machine_is_described_and_not_named(
    world: DataWorld, inputs: BundleInputs[Artifact], tmp_path: Path
) -> None:
    folder = tmp_path / "a name" / "model"
    folder.parent.mkdir()
    folder.symlink_to(FLAVOURS["tiny-ii"].repo)
    run = world.load(stage2={"model_flavour": "tiny-ii", "pretrained_model_name_or_path": str(folder)})
    text = model_card(run, inputs, ["a"], BundleSummary(stage1=FIGURES, stage2=FIGURES, samples=SamplesSummary()))
    assert "The base model of Stage II is not published with these weights: a `tiny-ii`" in text
    assert "base = '../tiny-ii'" in text and "a name" not in text and str(tmp_path) not in text
    assert "is not published" not in model_card(on_the_hub(run), inputs, ["a"], BundleSummary(samples=SamplesSummary()))


def test_a_whole_unet_is_a_fine_tune_and_no_adapter(
    world: DataWorld, inputs: BundleInputs[Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(card, "product_name", lambda _: UNET_FOLDER)
    metrics = BundleSummary(stage1=FIGURES, stage2=FIGURES, samples=SamplesSummary())
    fields = front_matter(model_card(on_the_hub(world.load()), inputs, ["a"], metrics))
    assert (fields["base_model_relation"], fields["tags"][-1]) == ("finetune", "full-finetune")


def test_a_person_reads_the_figures_with_their_intervals_and_no_json(
    world: DataWorld, inputs: BundleInputs[Artifact]
) -> None:
    samples = SamplesSummary(held_out=UPSCALED, probe_loss_base=0.00595, probe_loss_tuned=0.0596)
    text = model_card(world.load(), inputs, ["a"], BundleSummary(stage1=FIGURES, stage2=FIGURES, samples=samples))
    assert "| Stage I: loss | 0.0537 | 0.00880 | -0.0449 (-0.0595 to -0.0303, 95 %) |" in text
    assert "| Stage I: loss on the base's own pictures | 0.00595 | 0.0596 | +0.0537 |" in text
    assert "| bicubic | 30.1 | 250 |" in text and "- tuned over bicubic: PSNR +1.50 dB (+1.20 to +1.80, 95 %)" in text
    assert "45 pictures, of which 3 were rejected." in text and "Stage I was trained on 40 pictures (80 crops)." in text
    assert "```json" not in text and f"- data: {'1' * 16}" in text
    heads = [line for line in text.splitlines() if line.startswith("## ")]
    assert heads == ["## Use", "## Data", "## Figures", "## Settings", "## Lineage", "## Licence"]


def test_without_held_out_pictures_and_samples_it_says_so(world: DataWorld, inputs: BundleInputs[Artifact]) -> None:
    bare = replace(
        inputs, cascade_samples=make(world.load(), "cascade_samples", {}, SamplesSummary(), of="none"), stage2_lora=None
    )
    training = FIGURES.model_copy(update={"eval_loss": None, "eval_loss_base": None, "eval_gain": None})
    text = model_card(world.load(stages=(1,)), bare, ["a"], BundleSummary(stage1=training, samples=SamplesSummary()))
    assert "There are no samples." in text and "No picture was held out of it, so it was not measured." in text
    assert "widget" not in front_matter(text)


def test_a_cell_does_not_end_its_table() -> None:
    assert table(("a", "b"), [("x|y", "`z`\n")]) == ["| a | b |", "| --- | --- |", "| x\\|y | 'z' |"]
