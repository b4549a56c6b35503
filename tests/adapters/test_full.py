"""Full fine-tuning: every weight is trained, and what is saved is a UNet that stock diffusers loads."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import IFPipeline, IFSuperResolutionPipeline, UNet2DConditionModel
from model_cards import generated, run_card
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_run import SmallRun
from training_parts import planned_name

from deepfloyd_core.adapters.files import UNET_FOLDER
from deepfloyd_core.adapters.full import free_all, load_full, reload_unet, restore_unet, save_unet
from deepfloyd_core.adapters.method import METHODS, base_dtype, load_product, method_of
from deepfloyd_core.config.flavours import FLAVOURS
from deepfloyd_core.config.stage import StageConfig
from deepfloyd_core.config.stages import Stage
from deepfloyd_core.errors import ArtifactError
from deepfloyd_core.models.unet import PIPELINES, autocast, load_scheduler, load_unet, stock_pipeline
from deepfloyd_core.text.projection import text_is_frozen

FOLDERS = {1: Path(FLAVOURS["tiny-i"].repo), 2: Path(FLAVOURS["tiny-ii"].repo)}
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
BF16: dict[str, Any] = {"mixed_precision": "bf16"}


def stage_config(stage: Stage = 1, **keys: Any) -> StageConfig:
    """In fp32 unless said otherwise."""
    first = {"model_flavour": f"tiny-{'i' * stage}", "model_type": "full", "mixed_precision": "no"}
    return StageConfig.model_validate({**first, **keys})


def freed(stage: Stage = 1, **keys: Any) -> UNet2DConditionModel:
    """A UNet as training starts with it."""
    config = stage_config(stage, **keys)
    unet = load_unet(FOLDERS[stage], base_dtype(config))
    free_all(unet, config, 0)
    return unet


def saved(out: Path, stage: Stage = 1, **keys: Any) -> UNet2DConditionModel:
    """A UNet whose weights were all moved, and that is saved in a folder."""
    unet, generator = freed(stage, **keys), torch.Generator().manual_seed(2)
    out.mkdir(exist_ok=True)
    with torch.no_grad():
        for param in unet.parameters():
            param += 0.01 * torch.randn(param.shape, generator=generator).to(param.dtype)
    save_unet(unet, stage, FOLDERS[stage], out)
    return unet


def inputs(unet: UNet2DConditionModel) -> dict[str, Any]:
    """One batch of two."""
    generator = torch.Generator().manual_seed(4)
    return {
        "sample": torch.randn((2, unet.config.in_channels, 32, 32), generator=generator),
        "timestep": torch.tensor([100, 700]),
        "encoder_hidden_states": torch.randn((2, 77, unet.config.encoder_hid_dim), generator=generator),
        "class_labels": torch.tensor([250, 10]) if unet.config.class_embed_type else None,
    }


def pictures(pipeline: IFPipeline | IFSuperResolutionPipeline, stage: Stage) -> torch.Tensor:
    """A small picture in two steps from fixed text."""
    generator, width = torch.Generator().manual_seed(3), pipeline.unet.config.encoder_hid_dim
    text, empty = torch.randn((2, 1, 77, width), generator=generator)
    extra = {"image": torch.rand((1, 3, 16, 16), generator=generator) * 2 - 1, "noise_level": 100} if stage == 2 else {}
    pipeline.set_progress_bar_config(disable=True)
    return torch.as_tensor(
        pipeline(
            prompt_embeds=text, negative_prompt_embeds=empty, width=64, height=64, num_inference_steps=2,
            generator=torch.Generator().manual_seed(0), output_type="pt", **extra,
        ).images
    )  # fmt: skip


@pytest.mark.parametrize("stage", [1, 2])
def test_every_weight_is_trained_from_the_raw_text(stage: Stage) -> None:
    config = stage_config(stage)
    trained = {name for name, param in freed(stage).named_parameters() if param.requires_grad}
    stock = UNet2DConditionModel.from_pretrained(FOLDERS[stage], subfolder="unet")
    assert trained == set(stock.state_dict()), "no weight that is a buffer only"
    assert {"encoder_hid_proj.weight", "add_embedding.pool.positional_embedding"} <= trained
    assert method_of(config) is METHODS[UNET_FOLDER] and not text_is_frozen(config)


@pytest.mark.parametrize("stage", [1, 2])
def test_stock_diffusers_makes_the_picture_of_the_trainer(tmp_path: Path, stage: Stage) -> None:
    """A pipeline that diffusers built with the saved UNet, against the UNet that was never saved. Bit for bit in fp32."""
    unet = saved(tmp_path, stage).eval()
    absent = dict.fromkeys(("safety_checker", "feature_extractor", "watermarker"))
    loaded, found = UNet2DConditionModel.from_pretrained(tmp_path, subfolder="unet", output_loading_info=True)
    assert not any(found.values()), "missing, unexpected or mismatched keys"
    for param in loaded.parameters():  # mapped tensors start anywhere in a file; products round accordingly
        param.data = param.data.clone()
    stock = PIPELINES[stage].from_pretrained(FOLDERS[stage], unet=loaded, **absent, requires_safety_checker=False)
    scheduler = load_scheduler(FOLDERS[stage], variance_type="fixed_small")
    stock.register_modules(scheduler=scheduler)
    expected = pictures(stock_pipeline(FOLDERS[stage], stage, unet, scheduler), stage)
    assert torch.equal(pictures(stock, stage), expected)
    base = stock_pipeline(FOLDERS[stage], stage, load_unet(FOLDERS[stage], torch.float32), scheduler)
    assert (pictures(base, stage) - expected).abs().max() > 0.01
    load_product(base, tmp_path)
    assert torch.equal(pictures(base, stage), expected), "as the product's own sampler loads it"
    config = (tmp_path / "unet" / "config.json").read_bytes()
    assert config == (FOLDERS[stage] / "unet" / "config.json").read_bytes()


@pytest.mark.parametrize(
    ("stage", "keys", "dtype"),
    [
        (1, {}, torch.float32),
        (1, BF16, torch.float32),
        (1, {**BF16, "optimizer": "adamw_bf16"}, torch.bfloat16),
        pytest.param(2, {}, torch.float32, marks=pytest.mark.slow),
    ],
)
def test_the_weights_that_come_back_are_those_that_were_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: Stage, keys: dict[str, Any], dtype: torch.dtype
) -> None:
    unet = saved(tmp_path, stage, **keys)
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    monkeypatch.setattr("diffusers.ModelMixin.from_pretrained", lambda *_, **__: pytest.fail("a second UNet is loaded"))
    assert reload_unet(unet, stage, FOLDERS[stage], tmp_path) == 0.0
    file = load_file(tmp_path / WEIGHTS)
    assert {tensor.dtype for tensor in file.values()} == {dtype}
    assert all(torch.equal(tensor, before[name]) for name, tensor in file.items())
    assert all(torch.equal(tensor, before[name]) for name, tensor in unet.state_dict().items())
    restore_unet(unet, FOLDERS[stage])
    base = load_file(FOLDERS[stage] / WEIGHTS)
    assert all(torch.equal(tensor, base[name].to(dtype)) for name, tensor in unet.state_dict().items())


def test_with_autocast_training_starts_from_weights_that_bf16_did_not_round() -> None:
    base, unet = load_file(FOLDERS[1] / WEIGHTS), freed(**BF16)
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in base.values())
    assert all(torch.equal(tensor, base[name].float()) for name, tensor in unet.state_dict().items())
    batch = {name: value for name, value in inputs(unet).items() if name != "sample"}
    with autocast(torch.device("cpu"), "bf16"):
        unet(inputs(unet)["sample"].bfloat16(), **batch)[0].float().square().mean().backward()
    assert {param.grad.dtype for param in unet.parameters() if param.grad is not None} == {torch.float32}
    assert all(param.grad is not None for param in unet.parameters())


def _lose(state: dict[str, torch.Tensor]) -> None:
    del state["conv_in.bias"]


def _add(state: dict[str, torch.Tensor]) -> None:
    state["conv_in.offset"] = torch.zeros(3)


def _change(state: dict[str, torch.Tensor]) -> None:
    state["conv_in.bias"][0] += 1e-6


def _round(state: dict[str, torch.Tensor]) -> None:
    state["conv_in.bias"] = state["conv_in.bias"].half()


DAMAGES: tuple[tuple[Callable[[dict[str, torch.Tensor]], None], str], ...] = (
    (_lose, "it lacks .'conv_in.bias'"),
    (_add, "has extra .'conv_in.offset'"),
    (_change, "conv_in.bias has other values after reloading"),
    (_round, "conv_in.bias has other values after reloading"),
)


def test_a_folder_that_is_not_what_was_trained_is_caught(tmp_path: Path) -> None:
    unet = saved(tmp_path)
    for damage, says in DAMAGES:
        state = {name: tensor.detach().clone() for name, tensor in unet.state_dict().items()}
        damage(state)
        save_file(state, tmp_path / WEIGHTS)
        with pytest.raises(ArtifactError, match=says):
            reload_unet(unet, 1, FOLDERS[1], tmp_path)
    config = tmp_path / "unet" / "config.json"
    config.write_text(config.read_text().replace("{", "{ ", 1))
    with pytest.raises(ArtifactError, match=r"config\.json is not the base model's"):
        reload_unet(unet, 1, FOLDERS[1], tmp_path)


def test_a_missing_a_truncated_and_another_models_file_are_named(tmp_path: Path) -> None:
    unet, file = saved(tmp_path), tmp_path / WEIGHTS
    whole = file.read_bytes()
    for damage in (lambda: file.write_bytes(whole[:-1]), lambda: file.write_bytes(whole[:100]), file.unlink):
        damage()
        with pytest.raises(ArtifactError, match=f"{WEIGHTS} cannot be read: "):
            load_full(unet, file)
    saved(tmp_path / "ii", 2)
    with pytest.raises(ArtifactError, match=r"does not fit this UNet|this UNet's is"):
        load_full(unet, tmp_path / "ii" / WEIGHTS)
    state = load_file(FOLDERS[1] / WEIGHTS)
    state["conv_in.weight"] = state["conv_in.weight"][:, :2].contiguous()
    save_file(state, file)
    with pytest.raises(ArtifactError, match=r"conv_in.weight is \(16, 2, 3, 3\); this UNet's is \(16, 3, 3, 3\)"):
        load_full(unet, file)


def test_the_same_weights_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        saved(tmp_path / name)
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == (tmp_path / "b" / WEIGHTS).read_bytes()
    with safe_open(tmp_path / "a" / WEIGHTS, "pt") as file:
        assert file.metadata() == {"format": "pt"}, "what diffusers asks for"


@pytest.mark.slow
def test_a_full_run_ends_in_a_bundle_whose_card_says_how_to_load_it(
    server: str, tmp_path: Path, new_small_run: Callable[[Path], SmallRun]
) -> None:
    """Both stages; the card's own code is run, and a version of it generates what that code generates."""
    run = new_small_run(tmp_path / "run")
    settings = ("model_type=full", "lora_rank=16", "learning_rate=1e-4", "max_train_steps=2")
    keys = [f"--set=stage{stage}.{key}" for stage in (1, 2) for key in settings]
    keys.append("--set=stage1.lora_dropout=0.0")
    done = run.call_here("run", str(run.config), *keys)
    assert done.returncode == 0, done.stderr
    assert not list(run.workspace.glob("stage?_text")), "T5's own rows are trained on"
    (bundle,) = (run.workspace / "lora_bundle").iterdir()
    for stage in (1, 2):
        (lora,) = (run.workspace / f"stage{stage}_lora").iterdir()
        files = sorted(str(path.relative_to(bundle / f"stage{stage}")) for path in bundle.glob(f"stage{stage}/*/*"))
        assert files == ["scheduler/scheduler_config.json", "unet/config.json", WEIGHTS]
        assert (bundle / f"stage{stage}" / WEIGHTS).read_bytes() == (lora / WEIGHTS).read_bytes()
        summary = json.loads((lora / "manifest.json").read_text())["summary"]
        assert summary["frozen_parameters"] == 0 == summary["reload_difference"]
        assert summary["trainable_parameters"] == sum(map(torch.numel, load_file(lora / WEIGHTS).values()))
        assert summary["eval_loss"] != summary["eval_loss_base"]
    assert run.call_here("verify", str(run.workspace)).returncode == 0
    assert planned_name(run, keys) == f"lora_bundle/{bundle.name}"

    names = run_card(bundle)
    for stage in (1, 2):
        saved_weights = load_file(bundle / f"stage{stage}" / WEIGHTS)
        assert all(torch.equal(saved_weights[k], v) for k, v in names[f"stage{stage}"].unet.state_dict().items())

    assert generated(run, "--version", "latest", *keys) != generated(run, "--version", "base", *keys)
