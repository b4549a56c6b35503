"""Adapters: what is saved is what diffusers loads, and a file that is anything else is caught."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, IFPipeline, IFSuperResolutionPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_run import SmallRun

from deepfloyd_core.adapters.files import LORA_FILE
from deepfloyd_core.adapters.lora import add_lora, lora_state, reload_saved, save_lora, trainable
from deepfloyd_core.config.flavours import FLAVOURS
from deepfloyd_core.config.stage import StageConfig
from deepfloyd_core.config.stages import Stage
from deepfloyd_core.errors import ArtifactError
from deepfloyd_core.models.unet import (
    DTYPES,
    PIPELINES,
    autocast,
    load_projected_unet,
    load_scheduler,
    load_unet,
    stock_pipeline,
    trained_scheduler,
)
from deepfloyd_core.preflight.load import load_run
from deepfloyd_core.sampling.jobs import SampledStage
from deepfloyd_core.sampling.sampler import make_sampler

FOLDERS = {1: Path(FLAVOURS["tiny-i"].repo), 2: Path(FLAVOURS["tiny-ii"].repo)}


def stage_config(stage: Stage = 1, **keys: Any) -> StageConfig:
    """Rank 4 at twice the scale, in fp32."""
    first = {"model_flavour": f"tiny-{'i' * stage}", "lora_rank": 4, "lora_alpha": 8.0, "mixed_precision": "no"}
    return StageConfig.model_validate({**first, **keys})


def adapted(load: Callable[..., UNet2DConditionModel], stage: Stage = 1, **keys: Any) -> UNet2DConditionModel:
    """A UNet with adapters as training starts with them."""
    config = stage_config(stage, **keys)
    unet = load(FOLDERS[stage], DTYPES[config.mixed_precision])
    add_lora(unet, config, 1)
    return unet


def saved_lora(
    out: Path, stage: Stage = 1, load: Callable[..., UNet2DConditionModel] = load_projected_unet, **keys: Any
) -> UNet2DConditionModel:
    """A UNet whose adapters were moved by a few percent, as training does, and are saved in a folder."""
    unet = adapted(load, stage, **keys)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for param in trainable(unet).values():
            param.add_(0.03 * torch.randn(param.shape, generator=generator).to(param.dtype))
    save_lora(unet, stage, FOLDERS[stage], out)
    trained_scheduler(FOLDERS[stage], False).save_pretrained(out / "scheduler")
    return unet


BF16 = {"mixed_precision": "bf16"}
CONVOLUTIONS = {"lora_target_modules": ["to_q", "conv1", "conv2"]}


PLAIN: dict[str, Any] = {}
DORA_OF_CONVOLUTIONS = {"use_dora": True, **CONVOLUTIONS, "lora_init_type": "gaussian"}


_WAYS = [
    (1, load_projected_unet, {**BF16, "optimizer": "adamw_bf16"}),
    (2, load_projected_unet, DORA_OF_CONVOLUTIONS),
]
_MORE_WAYS = [
    (1, load_projected_unet, PLAIN),
    (1, load_projected_unet, {"lora_dropout": 0.5, "lora_init_type": "gaussian"}),
    (1, load_projected_unet, {**BF16, **CONVOLUTIONS}),
    (1, load_projected_unet, {"use_dora": True, "lora_dropout": 0.5}),
    (1, load_projected_unet, {"use_dora": True, **BF16}),
    (1, load_projected_unet, {"use_dora": True, **BF16, "optimizer": "adamw_bf16"}),
    (1, load_projected_unet, DORA_OF_CONVOLUTIONS),
    *[(2, load_projected_unet, keys) for keys in (PLAIN, {"use_dora": True, **BF16})],
    *[(1, load_unet, keys) for keys in (PLAIN, DORA_OF_CONVOLUTIONS)],
]


@pytest.mark.parametrize(
    ("stage", "load", "keys"), [*_WAYS, *(pytest.param(*way, marks=pytest.mark.slow) for way in _MORE_WAYS)]
)
def test_the_adapters_that_come_back_are_those_that_were_saved(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: Stage,
    load: Callable[..., UNet2DConditionModel],
    keys: dict[str, Any],
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
        (_flip_a_bit, "has other values after reloading"),
        (_drop_a_tensor, "the stock pipeline dropped .*to_q.lora_B"),
        (_truncate, "cannot be read"),
        (_misname, "the stock pipeline dropped"),
        (_forget_the_metadata, "have other scales after reloading"),
        (_other_alpha, "have other scales after reloading"),
    ],
)
def test_a_file_that_is_not_what_was_trained_is_caught(
    tmp_path: Path, damage: Callable[[Path], None], says: str
) -> None:
    unet = saved_lora(tmp_path, mixed_precision="bf16" if damage in (_flip_a_bit, _other_alpha) else "no")
    damage(tmp_path / LORA_FILE)
    with pytest.raises(ArtifactError, match=says):
        reload_saved(unet, 1, FOLDERS[1], tmp_path)


def test_the_same_weights_give_the_same_bytes(tmp_path: Path) -> None:
    files = []
    for name in ("a", "b"):
        saved_lora(tmp_path / name)
        files.append((tmp_path / name / LORA_FILE).read_bytes())
    assert files[0] == files[1]


def pictures(pipeline: IFPipeline | IFSuperResolutionPipeline, stage: Stage) -> torch.Tensor:
    """Two small pictures in two steps from fixed text."""
    generator, width = torch.Generator().manual_seed(3), pipeline.unet.config.encoder_hid_dim
    text, empty = torch.randn((2, 2, 77, width), generator=generator)
    extra = {"image": torch.rand((2, 3, 16, 16), generator=generator) * 2 - 1, "noise_level": 100} if stage == 2 else {}
    pipeline.set_progress_bar_config(disable=True)
    pipeline.unet.eval()
    return torch.as_tensor(
        pipeline(
            prompt_embeds=text, negative_prompt_embeds=empty, width=64, height=64, num_inference_steps=2,
            generator=[torch.Generator().manual_seed(seed) for seed in (0, 1)], output_type="pt", **extra,
        ).images
    )  # fmt: skip


@pytest.mark.parametrize(
    ("stage", "keys"),
    [(1, {"use_dora": True}), (1, {**CONVOLUTIONS, "lora_init_type": "gaussian"}), (2, DORA_OF_CONVOLUTIONS)],
)
def test_stock_diffusers_makes_the_picture_of_the_trainer(tmp_path: Path, stage: Stage, keys: dict[str, Any]) -> None:
    """The file in a pipeline that diffusers built alone, against the UNet that was never saved. Bit for bit in fp32."""
    unet = saved_lora(tmp_path, stage, load_unet, **keys)
    ours = stock_pipeline(FOLDERS[stage], stage, unet, load_scheduler(tmp_path))
    absent = dict.fromkeys(("safety_checker", "feature_extractor", "watermarker"))
    stock = PIPELINES[stage].from_pretrained(FOLDERS[stage], **absent, requires_safety_checker=False)
    stock.scheduler = DDPMScheduler.from_pretrained(tmp_path / "scheduler")
    untuned = pictures(stock, stage)
    stock.load_lora_weights(tmp_path)
    loaded = {name for name in stock.unet.state_dict() if "lora_" in name}
    assert len(loaded) == len(load_file(tmp_path / LORA_FILE)) == len(lora_state(unet))
    expected = pictures(ours, stage)
    assert torch.equal(pictures(stock, stage), expected)
    assert (untuned - expected).abs().max() > 0.01


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("keys", [{"use_dora": True, **CONVOLUTIONS}, {"lora_init_type": "gaussian"}])
def test_adapters_start_without_an_effect(precision: str, keys: dict[str, Any]) -> None:
    base, tuned = load_unet(FOLDERS[1], DTYPES[precision]), adapted(load_unet, **keys, mixed_precision=precision)
    generator, width = torch.Generator().manual_seed(4), base.config.encoder_hid_dim
    x, text = torch.randn((1, 3, 16, 16), generator=generator), torch.randn((1, 77, width), generator=generator)
    arguments = x.to(base.dtype), torch.tensor([500]), text.to(base.dtype)
    with torch.inference_mode(), autocast(torch.device("cpu"), precision):
        before, after = (unet(*arguments)[0].float() for unet in (base, tuned))
    assert torch.equal(before, after)


def test_dora_trains_one_length_for_each_row(tmp_path: Path) -> None:
    base, lengths = load_unet(FOLDERS[1], torch.float32).state_dict(), 0
    for name, param in trainable(adapted(load_unet, use_dora=True)).items():
        if "magnitude" in name:
            weight = base[name.split(".lora_magnitude")[0] + ".weight"]
            assert torch.allclose(param, weight.norm(dim=1), rtol=1e-6)
            lengths += 1
    saved_lora(tmp_path, use_dora=True)
    assert lengths == sum("magnitude" in name for name in load_file(tmp_path / LORA_FILE)) > 0


@pytest.mark.parametrize("stage", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_dora_of_convolutions_can_be_sampled(
    tmp_path: Path, stage: Stage, new_small_run: Callable[[Path], SmallRun]
) -> None:
    """Through the product's sampler, which keeps the base's weights in another order."""
    run = load_run(new_small_run(tmp_path / "run").config)
    saved_lora(tmp_path, stage, load_unet, **DORA_OF_CONVOLUTIONS)
    made = []
    for lora in (None, tmp_path):
        sampler = make_sampler(
            SampledStage(stage=stage, settings=run.config.stage(stage), model=FOLDERS[stage]),
            lora,
            run.config,
            lambda count: None,
        )
        made.append(pictures(sampler.pipeline, stage))
    assert torch.isfinite(made[1]).all() and (made[0] - made[1]).abs().max() > 0.01
