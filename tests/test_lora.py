"""Adapters: what is saved is what diffusers loads, and a file that is anything else is caught."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from deepfloyd_core.errors import ArtifactError
from deepfloyd_core.flavours import FLAVOURS, Stage
from deepfloyd_core.lora import add_lora, lora_state, reload_saved, save_lora, trainable
from deepfloyd_core.models import load_projected_unet, load_unet, trained_scheduler
from deepfloyd_core.products import LORA_FILE
from deepfloyd_core.stage_config import StageConfig

FOLDERS = {1: Path(FLAVOURS["tiny-i"].repo), 2: Path(FLAVOURS["tiny-ii"].repo)}


def stage_config(stage: Stage = 1, **keys: Any) -> StageConfig:
    """Rank 4 at twice the scale, in fp32."""
    first = {"model_flavour": f"tiny-{'i' * stage}", "lora_rank": 4, "lora_alpha": 8.0, "mixed_precision": "no"}
    return StageConfig.model_validate({**first, **keys})


def saved_lora(
    out: Path, stage: Stage = 1, load: Callable[..., UNet2DConditionModel] = load_projected_unet, **keys: Any
) -> UNet2DConditionModel:
    """A UNet whose adapters were moved by a few percent, as training does, and are saved in a folder."""
    config = stage_config(stage, **keys)
    unet = load(FOLDERS[stage], {"no": torch.float32, "bf16": torch.bfloat16}[config.mixed_precision])
    add_lora(unet, config, 1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for param in trainable(unet).values():
            param += 0.03 * torch.randn(param.shape, generator=generator).to(param.dtype)
    save_lora(unet, stage, out)
    trained_scheduler(FOLDERS[stage], False).save_pretrained(out / "scheduler")
    return unet


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("load", [load_unet, load_projected_unet])
@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"lora_dropout": 0.5},
        {"mixed_precision": "bf16"},
        {"mixed_precision": "bf16", "optimizer": "adamw_bf16"},
    ],
)
def test_the_adapters_that_come_back_are_those_that_were_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: Stage, load: Any, keys: dict[str, Any]
) -> None:
    unet = saved_lora(tmp_path, stage, load, **keys)
    monkeypatch.setattr("diffusers.ModelMixin.from_pretrained", lambda *_, **__: pytest.fail("a second UNet is loaded"))
    layers = {name: id(param) for name, param in unet.named_parameters() if not param.requires_grad}
    assert reload_saved(unet, stage, FOLDERS[stage], tmp_path) == 0.0
    file = load_file(tmp_path / LORA_FILE)
    assert {f"unet.{name}" for name in lora_state(unet)} == set(file)
    for name, tensor in lora_state(unet).items():
        assert torch.equal(tensor, file[f"unet.{name}"].to(tensor.dtype)), name
    after = {name: id(param) for name, param in unet.named_parameters() if "lora_" not in name}
    assert after == layers, "no weight of the base was copied"
    assert not any(module.training for module in unet.modules()), "dropout would be on in the evaluation"


def _flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-2] ^= 1
    file.write_bytes(bytes(data))


def _rewrite(file: Path, change: Callable[[dict[str, torch.Tensor], dict[str, str]], None]) -> None:
    with safe_open(file, "pt") as opened:
        metadata = dict(opened.metadata())
    tensors = load_file(file)
    change(tensors, metadata)
    save_file(tensors, file, metadata)


def _drop_a_tensor(file: Path) -> None:
    def change(tensors: dict[str, torch.Tensor], _: dict[str, str]) -> None:
        del tensors[next(name for name in tensors if "to_q.lora_B" in name)]

    _rewrite(file, change)


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-8])


def _misname(file: Path) -> None:
    """Without `unet.`, as `save_lora_adapter` writes them: the pipeline then loads nothing at all."""

    def change(tensors: dict[str, torch.Tensor], _: dict[str, str]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("unet.")] = tensors.pop(name)

    _rewrite(file, change)


def _forget_the_metadata(file: Path) -> None:
    _rewrite(file, lambda _, metadata: metadata.clear())


def _other_alpha(file: Path) -> None:
    def change(_: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
        settings = json.loads(metadata["lora_adapter_metadata"])
        metadata["lora_adapter_metadata"] = json.dumps({**settings, "unet.lora_alpha": 4})

    _rewrite(file, change)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_flip_a_bit, "came back with other values"),
        (_drop_a_tensor, "the stock pipeline lost .*to_q.lora_B"),
        (_truncate, "cannot be read"),
        (_misname, "the stock pipeline lost"),
        (_forget_the_metadata, "came back with other scales"),
        (_other_alpha, "came back with other scales"),
    ],
)
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_file_that_is_not_what_was_trained_is_caught(
    tmp_path: Path, damage: Callable[[Path], None], says: str, precision: str
) -> None:
    unet = saved_lora(tmp_path, mixed_precision=precision)
    damage(tmp_path / LORA_FILE)
    with pytest.raises(ArtifactError, match=says):
        reload_saved(unet, 1, FOLDERS[1], tmp_path)


def test_the_same_weights_give_the_same_bytes(tmp_path: Path) -> None:
    files = []
    for name in ("a", "b"):
        saved_lora(tmp_path / name)
        files.append((tmp_path / name / LORA_FILE).read_bytes())
    assert files[0] == files[1]
