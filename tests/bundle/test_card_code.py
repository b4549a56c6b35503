"""The code of a model card: it runs as it stands on any base model, and makes the picture that our sampler makes."""

import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_world import DataWorld
from model_cards import run_code
from PIL import Image
from stock_environment import stock_environment

from deepfloyd_core.adapters.controlnet import control_of
from deepfloyd_core.adapters.files import product_name
from deepfloyd_core.adapters.lora import trainable
from deepfloyd_core.adapters.method import method_of
from deepfloyd_core.bundle.card_code import card_code, is_private, private_bases
from deepfloyd_core.config.flavours import FLAVOURS
from deepfloyd_core.config.run import Run
from deepfloyd_core.config.stages import STAGES, Stage
from deepfloyd_core.diffusion.loss import to_bytes
from deepfloyd_core.models.folders import resolve
from deepfloyd_core.models.unet import load_unet, trained_scheduler, use_threads
from deepfloyd_core.sampling.jobs import cascade_of
from deepfloyd_core.sampling.sampler import make_sampler, sample_from_text, sample_upscaled
from deepfloyd_core.text.encode import encode_prompts

FAST = {"validation_num_inference_steps": 2, "mixed_precision": "no", "lora_rank": 4}
STAGE1, STAGE2 = {"model_flavour": "tiny-i", **FAST}, {"model_flavour": "tiny-ii", "validation_guidance": 1.0, **FAST}


def trained(run: Run, bundle: Path) -> dict[Stage, str]:
    """What a training leaves of each stage, moved away from its base by hand."""
    products = {}
    for stage in run.config.stages:
        settings, folder = run.config.stage(stage), resolve(run.config.stage(stage).model, stage)
        unet, method = load_unet(folder, torch.float32), method_of(settings)
        method.prepare(unet, settings, 0)
        with torch.no_grad():
            for param in trainable(unet).values():
                param.add_(torch.full_like(param, 0.01))
        out = bundle / f"stage{stage}"
        out.mkdir(parents=True)
        method.save(unet, stage, folder, out)
        trained_scheduler(folder, False).save_pretrained(out / "scheduler")
        products[stage] = product_name(out)
    return products


def ran(world: DataWorld, stages: tuple[Stage, ...], prompt: str = "a purple star", **keys: Any) -> dict[str, Any]:
    """The names of the card's code, after it has run."""
    world.add("0.png", np.zeros((300, 300, 3), np.uint8))
    run = world.load(stages=stages, device="cpu", **keys)
    bundle = world.folder / "published" / "bundle"
    code = "\n".join(card_code(run, trained(run, bundle), prompt))
    for settings in map(run.config.stage, stages):
        if is_private(settings):
            (bundle.parent / settings.flavour.name).symlink_to(settings.model)  # as the card says
    names = run_code(code, bundle)
    return {**names, "run": run, "bundle": bundle, "code": code, "notes": private_bases(run)}


def test_the_code_makes_the_picture_that_the_cascade_makes(world: DataWorld) -> None:
    keys: dict[str, Any] = {
        "stage1": {**STAGE1, "validation_noise_scheduler": "dpm++"},
        "stage2": {**STAGE2, "validation_back_projection": True, "validation_noise_scheduler": "ddim"},
        "validation_resolution": "96x64",
    }
    names = ran(world, (1, 2), validation_seed=7, **keys)
    run, picture = names["run"], names["picture"]
    assert picture.size == (384, 256)
    samplers = [
        make_sampler(one, names["bundle"] / f"stage{one.stage}", run.config, lambda count: None)
        for one in cascade_of(run, {stage: Path(run.config.stage(stage).model) for stage in run.config.stages}).stages
    ]
    text, negative = names["embeds"], names["negative"]
    small = sample_from_text(samplers[0], text, negative, [7], (96, 64))
    large = sample_upscaled(samplers[1], text, negative, [7], small)
    assert np.array_equal(to_bytes(large)[0].numpy(), np.asarray(picture)), "every bit"


# A person who has diffusers and not this package.
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"lora_rank": 4},
    "dora": {"lora_rank": 4, "use_dora": True},
    "convolutions": {"lora_rank": 4, "lora_target_modules": ["to_q", "conv_in", "conv1"]},
    "dora of convolutions": {"lora_rank": 4, "use_dora": True, "lora_target_modules": ["to_q", "conv1"]},
    "biases": {"use_bitfit": True},
    "full": {"model_type": "full"},
    "control": {"lora_rank": 4, "controlnet": True, "controlnet_conditioning": "canny"},
}
EACH = """
import os, sys
from pathlib import Path
for bundle in map(Path, sys.argv[1:]):
    os.chdir(bundle)
    exec((bundle / "code.py").read_text(), {})
assert "deepfloyd_core" not in sys.modules
"""


@pytest.mark.slow
def test_with_stock_diffusers_alone_the_code_makes_every_bit_that_generate_makes(world: DataWorld) -> None:
    world.add("0.png", np.zeros((300, 300, 3), np.uint8))
    common = {"validation_num_inference_steps": 2, "mixed_precision": "no", "validation_guidance": 3.0}
    bases: dict[Stage, Path] = {1: world.folder / "i", 2: world.folder / "ii"}
    for base in bases.values():
        base.symlink_to(FLAVOURS[f"tiny-{base.name}"].repo)
    known: dict[Path, np.ndarray] = {}
    for method, keys in METHODS.items():
        tables = {
            f"stage{stage}": {
                "pretrained_model_name_or_path": str(folder),
                "model_flavour": flavour,
                **common,
                **(keys if stage == 1 or "controlnet" not in keys else {}),
            }
            for (stage, folder), flavour in zip(bases.items(), ("tiny-i", "tiny-ii"), strict=True)
        }
        run = world.load(
            stages=(1, 2), device="cpu", num_threads=1, validation_seed=3, text_encoder_dtype="fp32", **tables
        )
        bundle = world.folder / method / "bundle"
        bundle.parent.mkdir()
        for stage, base in bases.items():
            (bundle.parent / run.config.stage(stage).flavour.name).symlink_to(base)  # as the card says
        code = card_code(run, trained(run, bundle), "a purple star")
        (bundle / "code.py").write_text("\n".join(["import torch", "torch.set_num_threads(1)", *code]))
        known[bundle] = drawn(run, bundle, bases)
    python = stock_environment(world.folder / "environment")
    # -I: neither this package's folder nor PYTHONPATH is looked in.
    subprocess.run([python, "-I", "-c", EACH, *known], check=True, cwd=world.folder)
    for bundle, pixels in known.items():
        published = [file for file in bundle.rglob("*") if file.is_file()]
        assert [file.name for file in published if str(world.folder).encode() in file.read_bytes()] == []
        with Image.open(bundle.parent / "picture.png") as picture:
            assert np.array_equal(np.asarray(picture), pixels), bundle


def drawn(run: Run, bundle: Path, bases: dict[Stage, Path]) -> np.ndarray:
    """What the job of `generate` draws of a bundle's weights."""
    use_threads(1)
    small, large = (
        make_sampler(one, bundle / f"stage{one.stage}", run.config, lambda count: None)
        for one in cascade_of(run, bases).stages
    )
    texts = encode_prompts(["a purple star", ""], STAGES[1].text_encoder, bases[1], run.config, run.config)
    text, negative = (torch.as_tensor(row)[None] for row in texts)
    control = torch.zeros(1, 3, 64, 64) if control_of(small.pipeline.unet) else None
    first = sample_from_text(small, text, negative, [3], (64, 64), control)
    return to_bytes(sample_upscaled(large, text, negative, [3], first))[0].numpy()


def test_the_code_runs_on_a_local_folder_and_does_not_name_it(world: DataWorld) -> None:
    folder = world.folder / "my 'own' model"
    folder.symlink_to(FLAVOURS["tiny-i"].repo)
    names = ran(world, (1,), stage1={**STAGE1, "pretrained_model_name_or_path": str(folder)})
    assert names["picture"].size == (64, 64) and "resolve" not in names and "FLAVOURS" not in names
    assert "base = '../tiny-i'\n" in names["code"] and "own' model" not in names["code"]
    (note,) = names["notes"]
    assert note.startswith("The base model of Stage I is not published with these weights: a `tiny-i`")
    assert "`../tiny-i`" in note and "own' model" not in note


@pytest.mark.slow
def test_the_code_runs_on_random_weights(world: DataWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepfloyd_core.models.random_weights.default_cache", lambda: tmp_path / "cache")
    assert ran(world, (1,), stage1={**STAGE1, "model_flavour": "random:tiny-i"})["picture"].size == (64, 64)


def test_the_code_of_stage2_alone_enlarges(world: DataWorld) -> None:
    assert ran(world, (2,), stage2=STAGE2)["picture"].size == (256, 256)


@pytest.mark.parametrize(
    "keys",
    [{"use_bitfit": True, "lora_dropout": 0.0}, {"model_type": "full", "lora_dropout": 0.0},
     {"controlnet": True, "controlnet_conditioning": "canny"},
     {"controlnet": True, "controlnet_conditioning": "canny", "optimizer": "adamw_bf16", "mixed_precision": "bf16"}],
    ids=["biases", "full", "control", "control in bf16"],
)  # fmt: skip
def test_the_code_loads_whatever_was_trained(world: DataWorld, keys: dict[str, Any]) -> None:
    ran(world, (1,), stage1={"model_flavour": "tiny-i", **{k: v for k, v in FAST.items() if k != "lora_rank"}, **keys})


def test_a_prompt_is_a_python_literal_that_ends_no_code_block(world: DataWorld) -> None:
    prompt = "a \"star\" of ```python\nimport os``` and 'it' \\ é"
    world.add("0.png", np.zeros((300, 300, 3), np.uint8))
    code = card_code(world.load(stages=(1,)), {1: "pytorch_lora_weights.safetensors"}, prompt)
    assert not [line for line in code if "`" in line and not line.startswith("picture.save")]
    (line,) = [line for line in code if line.startswith("prompt, seed = ")]
    names: dict[str, Any] = {}
    exec(line, names)
    assert names["prompt"] == prompt
