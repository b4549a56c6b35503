"""Pictures of a published bundle, in a workspace that has never seen its version."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from data_world import DataWorld
from draws_here import draw_in_this_process
from moved_bundles import moved_bundle
from PIL import Image
from releases import deepfloyd, make

from deepfloyd_core.api import GenerateOptions, generate, upscale
from deepfloyd_core.config.flavours import FLAVOURS
from deepfloyd_core.errors import ArtifactError, ConfigError
from deepfloyd_core.preflight.drawn_again import recorded_options
from deepfloyd_core.preflight.upscale import UpscaleOptions
from deepfloyd_core.store.registry import publish

COMMON = {"mixed_precision": "no", "validation_num_inference_steps": 2}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"lora_rank": 4}, "full": {"model_type": "full"}, "biases": {"use_bitfit": True},
    "control": {"lora_rank": 4, "controlnet": True, "controlnet_conditioning": "canny"},
}  # fmt: skip
KEYS = ("num_threads=1", "text_encoder_dtype=fp32")


def published(world: DataWorld, **keys: Any) -> tuple[Path, Path]:
    """A run file elsewhere without data, and the folder that version 1 of a workspace was published to."""
    run, bundle, _ = moved_bundle(world, stage1={"model_flavour": "tiny-i", **COMMON, **keys})
    index = make(run.workspace, "image_index", {}, data="1" * 16)
    publish(run.workspace, bundle, index)
    folder = world.folder / "published"
    done = deepfloyd("publish", str(run.workspace), "1", str(folder))
    assert done.exit_code == 0, done.exception
    elsewhere = world.folder / "elsewhere"
    elsewhere.mkdir()
    stage1 = {"model_flavour": "tiny-i", **COMMON}
    run_file = {"workspace": str(elsewhere / "workspace"), "device": "cpu", "stage1": stage1}
    (elsewhere / "run.json").write_text(json.dumps(run_file))
    return elsewhere / "run.json", folder


def pixels(file: Path) -> bytes:
    with Image.open(file) as picture:
        return picture.tobytes()


@pytest.mark.parametrize("method", METHODS)
def test_a_folder_draws_what_its_version_draws(world: DataWorld, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    draw_in_this_process(monkeypatch)
    run_file, folder = published(world, **METHODS[method])
    hint: dict[str, Any] = {}
    if method == "control":
        Image.linear_gradient("L").save(world.folder / "hint.png")
        hint = {"control": world.folder / "hint.png"}
    (there,) = generate(world.folder / "run.json", GenerateOptions(("a star",), "1", **hint), KEYS)
    (here,) = generate(run_file, GenerateOptions(("a star",), str(folder), **hint), KEYS)
    (base,) = generate(run_file, GenerateOptions(("a star",), "base"), KEYS)
    assert pixels(here) == pixels(there) != pixels(base)
    fingerprint = json.loads((folder / "manifest.json").read_bytes())["fingerprint"]
    with Image.open(here) as picture:
        record = json.loads(picture.info["deepfloyd"])
    assert (record["variant"], record["bundle"]) == (f"bundle {fingerprint}", fingerprint)


def test_a_folder_is_checked_before_anything_is_loaded(world: DataWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = draw_in_this_process(monkeypatch)
    run_file, folder = published(world, use_bitfit=True)
    of_folder = GenerateOptions(("a star",), str(folder))
    biases = folder / "stage1" / "bitfit_biases.safetensors"

    def refused(options: GenerateOptions, kind: type[Exception], says: str, *keys: str) -> None:
        with pytest.raises(kind, match=says):
            generate(run_file, options, (*KEYS, *keys))
        assert requests == []

    other = shutil.copytree(FLAVOURS["tiny-i"].repo, world.folder / "other")
    with (other / "unet" / "config.json").open("a") as config:
        config.write("\n")
    another_base = f'stage1.pretrained_model_name_or_path="{other}"'
    refused(of_folder, ConfigError, "was trained on other weights of stage 1", another_base)
    whole = biases.read_bytes()
    biases.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    refused(of_folder, ArtifactError, "has other bytes than its manifest says. Publish it again")
    biases.write_bytes(whole)
    (folder / "stage1" / "pytorch_lora_weights.safetensors").write_bytes(whole)
    refused(of_folder, ArtifactError, "pytorch_lora_weights.safetensors is not in the manifest")
    (folder / "manifest.json").unlink()
    refused(of_folder, ConfigError, r"is no bundle: it has no manifest\.json")
    refused(
        GenerateOptions(("a star",), "./nowhere"),
        ConfigError,
        r"The version is \./nowhere, and there is no such folder",
    )


def test_its_pictures_are_drawn_again_with_the_folder(world: DataWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    draw_in_this_process(monkeypatch)
    run_file, folder = published(world, use_bitfit=True)
    (made,) = generate(run_file, GenerateOptions(("a star",), str(folder)), KEYS)
    options, keys = recorded_options(GenerateOptions(version=str(folder)), made)
    assert generate(run_file, options, ("num_threads=1", *keys)) == [made]
    with pytest.raises(ConfigError, match=r"which lay in a folder. Give that with --version\.$"):
        recorded_options(GenerateOptions(), made)
    with pytest.raises(ConfigError, match=r"add a \[stage2\] table"):
        upscale(run_file, UpscaleOptions(made, str(folder)), KEYS)
