"""BitFit: the biases and nothing else are trained, and their file loads in the stock UNet by torch alone."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from model_cards import generated, run_card
from safetensors.torch import load_file, save_file
from small_run import SmallRun

from deepfloyd_core.adapters.bitfit import free_biases, load_biases, reload_biases, restore_biases, save_biases
from deepfloyd_core.adapters.files import BITFIT_FILE, LORA_FILE
from deepfloyd_core.config.flavours import FLAVOURS
from deepfloyd_core.config.stage import StageConfig
from deepfloyd_core.config.stages import Stage
from deepfloyd_core.errors import ArtifactError
from deepfloyd_core.models.unet import DTYPES, autocast, load_projected_unet, load_unet

FOLDERS = {1: Path(FLAVOURS["tiny-i"].repo), 2: Path(FLAVOURS["tiny-ii"].repo)}


def freed(load: Callable[..., UNet2DConditionModel], stage: Stage = 1, **keys: Any) -> UNet2DConditionModel:
    """A UNet as training starts with it; in fp32 unless said otherwise."""
    first = {"model_flavour": f"tiny-{'i' * stage}", "use_bitfit": True, "mixed_precision": "no"}
    config = StageConfig.model_validate({**first, **keys})
    unet = load(FOLDERS[stage], DTYPES[config.mixed_precision])
    free_biases(unet, config, 0)
    return unet


def saved(out: Path, load: Callable[..., UNet2DConditionModel], stage: Stage = 1, **keys: Any) -> UNet2DConditionModel:
    """A UNet whose biases were moved and saved in a folder."""
    unet, generator = freed(load, stage, **keys), torch.Generator().manual_seed(2)
    out.mkdir(exist_ok=True)
    with torch.no_grad():
        for param in unet.parameters():
            if param.requires_grad:
                param += 0.03 * torch.randn(param.shape, generator=generator).to(param.dtype)
    save_biases(unet, stage, FOLDERS[stage], out)
    return unet


def output(unet: UNet2DConditionModel, precision: str = "no") -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn((1, unet.config.in_channels, 64, 64), generator=generator).to(unet.dtype)
    text = torch.randn((1, 77, unet.config.encoder_hid_dim), generator=generator).to(unet.dtype)
    level = torch.tensor([250]) if unet.config.class_embed_type else None
    with torch.inference_mode(), autocast(torch.device("cpu"), precision):
        return torch.as_tensor(unet(x, torch.tensor([500]), text, class_labels=level)[0].float())


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("load", [load_unet, load_projected_unet])
def test_the_biases_outside_the_text_modules_are_trained_and_nothing_else(
    stage: Stage, load: Callable[..., UNet2DConditionModel]
) -> None:
    trained = {name for name, param in freed(load, stage).named_parameters() if param.requires_grad}
    stock = UNet2DConditionModel.from_pretrained(FOLDERS[stage], subfolder="unet").state_dict()
    text = ("encoder_hid_proj.", "add_embedding.")
    assert trained == {name for name in stock if name.endswith(".bias") and not name.startswith(text)}
    assert {"conv_in.bias", "conv_norm_out.bias", "time_embedding.linear_1.bias"} <= trained


@pytest.mark.parametrize("stage", [1, 2])
def test_the_file_gives_a_stock_unet_the_output_of_the_trainer(tmp_path: Path, stage: Stage) -> None:
    unet = saved(tmp_path, load_unet, stage)
    stock = UNet2DConditionModel.from_pretrained(FOLDERS[stage], subfolder="unet").eval()
    untuned = output(stock)
    found = stock.load_state_dict(load_file(tmp_path / BITFIT_FILE), strict=False)
    assert found.unexpected_keys == []
    assert torch.equal(output(stock), output(unet))
    assert (output(stock) - untuned).abs().max() > 0.01
    restore_biases(stock, FOLDERS[stage])
    assert torch.equal(output(stock), untuned)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("load", [load_unet, load_projected_unet])
@pytest.mark.parametrize(
    "keys", [{}, {"mixed_precision": "bf16"}, {"mixed_precision": "bf16", "optimizer": "adamw_bf16"}]
)
def test_the_biases_that_come_back_are_those_that_were_saved(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: Stage,
    load: Callable[..., UNet2DConditionModel],
    keys: dict[str, Any],
) -> None:
    unet = saved(tmp_path, load, stage, **keys)
    monkeypatch.setattr("diffusers.ModelMixin.from_pretrained", lambda *_, **__: pytest.fail("a second UNet is loaded"))
    assert reload_biases(unet, stage, FOLDERS[stage], tmp_path) == 0.0
    assert len({param.dtype for param in unet.parameters()}) == 1, "as a stock UNet holds them"
    for name, tensor in load_file(tmp_path / BITFIT_FILE).items():
        assert torch.equal(unet.get_parameter(name), tensor.to(unet.dtype)), name


@pytest.mark.slow
def test_training_starts_at_the_base_model_in_bf16_too() -> None:
    base, tuned = load_unet(FOLDERS[1], torch.bfloat16), freed(load_unet, mixed_precision="bf16")
    assert tuned.conv_in.bias.dtype == torch.float32
    assert torch.equal(output(base, "bf16"), output(tuned, "bf16"))


def _lose(state: dict[str, torch.Tensor]) -> None:
    del state["conv_in.bias"]


def _add(state: dict[str, torch.Tensor]) -> None:
    state["conv_in.offset"] = torch.zeros(3)


def _change(state: dict[str, torch.Tensor]) -> None:
    state["conv_in.bias"][0] += 1e-6  # less than bf16 holds


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_lose, "lacks .'conv_in.bias'"),
        (_add, "has extra .'conv_in.offset'"),
        (_change, "conv_in.bias has other values after reloading"),
    ],
)
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_file_that_is_not_what_was_trained_is_caught(
    tmp_path: Path, damage: Callable[[dict[str, torch.Tensor]], None], says: str, precision: str
) -> None:
    unet = saved(tmp_path, load_projected_unet, mixed_precision=precision)
    state = load_file(tmp_path / BITFIT_FILE)
    damage(state)
    save_file(state, tmp_path / BITFIT_FILE)
    with pytest.raises(ArtifactError, match=says):
        reload_biases(unet, 1, FOLDERS[1], tmp_path)


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    unet = saved(tmp_path, load_projected_unet)
    file = tmp_path / BITFIT_FILE
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match=f"{BITFIT_FILE} cannot be read"):
        load_biases(unet, file)


def test_the_same_biases_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        saved(tmp_path / name, load_projected_unet)
    assert (tmp_path / "a" / BITFIT_FILE).read_bytes() == (tmp_path / "b" / BITFIT_FILE).read_bytes()


@pytest.mark.slow
def test_a_run_with_bitfit_ends_in_a_bundle_whose_card_says_how_to_load_it(
    server: str, tmp_path: Path, new_small_run: Callable[[Path], SmallRun]
) -> None:
    """Stage I by BitFit beside a LoRA of Stage II; the card's own code is run, and a version of it generates."""
    run = new_small_run(tmp_path / "run")
    settings = ("use_bitfit=true", "lora_rank=16", "lora_dropout=0.0", "learning_rate=1e-2")
    keys = tuple(f"--set=stage1.{key}" for key in settings)
    done = run.call_here("run", str(run.config), *keys, "--set=stage2.max_train_steps=1")
    assert done.returncode == 0, done.stderr
    (bundle,) = (run.workspace / "lora_bundle").iterdir()
    (lora,) = (run.workspace / "stage1_lora").iterdir()
    assert {path.name for path in (bundle / "stage1").iterdir()} == {BITFIT_FILE, "scheduler", "validation.parquet"}
    assert {path.name for path in (bundle / "stage2").iterdir()} == {LORA_FILE, "scheduler", "validation.parquet"}
    summary = json.loads((lora / "manifest.json").read_text())["summary"]
    assert summary["trainable_parameters"] == sum(map(torch.numel, load_file(lora / BITFIT_FILE).values()))
    assert summary["reload_difference"] == 0.0
    assert summary["eval_loss"] != summary["eval_loss_base"]

    names = run_card(bundle)
    assert torch.equal(names["stage1"].unet.conv_in.bias, load_file(lora / BITFIT_FILE)["conv_in.bias"])

    assert generated(run, "--version", "latest", *keys) != generated(run, "--version", "base", *keys)
