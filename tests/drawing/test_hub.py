"""Bundles and LoRAs of the Hub, a stand-in on loopback: what is needed is downloaded once all else is right."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from data_world import DataWorld
from draws_here import draw_in_this_process
from hub_stand_in import Hub, hub_in_place
from moved_bundles import moved_bundle
from PIL import Image

from deepfloyd_core.api import GenerateOptions, generate
from deepfloyd_core.errors import ArtifactError, ConfigError, ModelError

KEYS = ("num_threads=1", "text_encoder_dtype=fp32")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with hub_in_place(monkeypatch) as running:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        yield running


def on_the_hub(world: DataWorld, hub: Hub, **keys: Any) -> tuple[Path, Path]:
    """A bundle beside other files of its repository: its run file, and its folder here."""
    settings = {"model_flavour": "tiny-i", "mixed_precision": "no", "validation_num_inference_steps": 2, **keys}
    _, bundle, _ = moved_bundle(world, stage1=settings)
    hub.private, hub.files = False, {
        str(file.relative_to(bundle.path)): file.read_bytes() for file in bundle.path.rglob("*") if file.is_file()
    }  # fmt: skip
    hub.files |= {"README.md": b"a card", "sheet.png": b"1", "unet/model.bin": b"a pickle"}
    return world.folder / "run.json", bundle.path


def pixels(file: Path) -> bytes:
    with Image.open(file) as picture:
        return picture.tobytes()


def test_a_bundle_of_the_hub_draws_what_its_folder_draws(
    world: DataWorld, hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    requests = draw_in_this_process(monkeypatch)
    run_file, folder = on_the_hub(world, hub, use_bitfit=True)
    with pytest.raises(ConfigError, match="The prompt is empty"):
        generate(run_file, GenerateOptions(("",), "me/model"), KEYS)
    assert not (tmp_path / "cache").exists(), "nothing is downloaded for what cannot be drawn"
    (made,) = generate(run_file, GenerateOptions(("a star",), "me/model"), KEYS)
    assert generate(run_file, GenerateOptions(("a star",), str(folder)), KEYS) == [made], "the same bundle"
    with Image.open(made) as picture:
        assert json.loads(picture.info["deepfloyd"])["variant"] == f"bundle {folder.name}"
    fetched = {file.name for file in (tmp_path / "cache").rglob("snapshots/*/**/*") if file.is_file()}
    assert fetched == {"manifest.json", "bitfit_biases.safetensors", "scheduler_config.json"}
    (biases,) = (tmp_path / "cache").rglob("bitfit_biases.safetensors")
    biases.write_bytes(biases.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(ArtifactError, match="has other bytes than its manifest says"):
        generate(run_file, GenerateOptions(("a circle",), "me/model"), KEYS)
    assert len(requests) == 1


def test_a_lora_of_the_hub_draws_what_its_file_draws(
    world: DataWorld, hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    draw_in_this_process(monkeypatch)
    run_file, folder = on_the_hub(world, hub, lora_rank=4)
    (made,) = generate(run_file, GenerateOptions(("a star",), loras=("me/model@0.5",)), KEYS)
    (here,) = generate(run_file, GenerateOptions(("a star",), loras=(f"{folder}@0.5",)), KEYS)
    assert pixels(made) == pixels(here)
    with Image.open(made) as picture:
        assert json.loads(picture.info["deepfloyd"])["loras"] == ["me/model@0.5"]
    fetched = {file.name for file in (tmp_path / "cache").rglob("snapshots/*/**/*") if file.is_file()}
    assert fetched == {"pytorch_lora_weights.safetensors", "scheduler_config.json"}


def test_a_name_that_is_neither_a_folder_nor_of_the_hub_is_told(
    world: DataWorld, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_file, _ = on_the_hub(world, hub, lora_rank=4)
    hub.private = None
    for options in (GenerateOptions(("x",), "me/none"), GenerateOptions(("x",), loras=("me/none@0.5",))):
        with pytest.raises(ModelError, match=r"^me/none could not be downloaded \(.*give the folder of a copy"):
            generate(run_file, options, KEYS)
