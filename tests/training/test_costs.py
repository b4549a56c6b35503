"""The forecast of a training step against the step itself, on real tensors."""

from pathlib import Path
from typing import Any

import pytest
import torch

from deepfloyd_core.adapters.method import base_dtype, method_of
from deepfloyd_core.config.flavours import FLAVOURS
from deepfloyd_core.config.run_reader import read_written
from deepfloyd_core.config.stage import StageConfig
from deepfloyd_core.diffusion.loss import Text, predict, squared_error
from deepfloyd_core.models.memory import Counted
from deepfloyd_core.models.operations import Operations
from deepfloyd_core.models.quantized import load_base
from deepfloyd_core.models.unet import order_channels_last
from deepfloyd_core.models.work import Work, of_batch
from deepfloyd_core.text.projection import text_is_frozen
from deepfloyd_core.training.costs import StepCosts, cost_key, cost_request, keep_costs, known_costs
from deepfloyd_core.training.measured_costs import step_costs
from deepfloyd_core.training.recompute import recompute_activations

TINY = Path(FLAVOURS["tiny-i"].repo)
DEMO = Path(__file__).parents[2] / "flows" / "configs" / "demo.toml"
CPU = torch.device("cpu")


def settings(**keys: Any) -> StageConfig:
    return StageConfig.model_validate({"model_flavour": "tiny-i", "mixed_precision": "no", **keys})


def taken(config: StageConfig, batch: int, recomputes: bool) -> tuple[int, int, int, Work]:
    """Of a real step: bytes of its storages at their highest, of frozen weights, how many numbers are trained, its work."""
    projected = text_is_frozen(config)
    unet = load_base(TINY, projected, base_dtype(config), config.base_model_precision, CPU)
    method_of(config).prepare(unet, config, 0)
    if recomputes:
        recompute_activations(unet)
    order_channels_last(unet)
    unet.train()
    x, t = torch.randn(batch, 3, 64, 64), torch.full((batch,), 500)
    if projected:
        pooled = torch.randn(batch, unet.time_embedding.linear_2.out_features)
        text = Text(torch.randn(batch, 77, unet.config.cross_attention_dim), pooled)
    else:
        text = Text(torch.randn(batch, 77, unet.config.encoder_hid_dim))
    counted = Counted([param.untyped_storage() for param in unet.parameters()])
    noise = torch.randn(batch, 3, 64, 64)
    operations = Operations()
    with counted, operations:
        eps, _ = predict(unet, x, t, text, None)
        squared_error(eps, noise).mean().backward()
    frozen = sum(param.nbytes for param in unet.parameters() if not param.requires_grad)
    trained = sum(param.numel() for param in unet.parameters() if param.requires_grad)
    return counted.peak, frozen, trained, operations.work


def demo() -> StageConfig:
    _, config, _ = read_written(DEMO, ())
    assert config is not None
    return config.stage(1)


@pytest.mark.parametrize("config", [demo(), settings(base_model_precision="nf4")], ids=["demo", "nf4"])
def test_a_step_of_fake_tensors_takes_what_the_real_one_does(config: StageConfig, tmp_path: Path) -> None:
    request = cost_request(config, TINY, (64, 64))
    assert request is not None
    costs = step_costs(request)
    for batch, recomputes in ((1, True), (4, True), (3, False)):
        peak, frozen, trained, work = taken(config, batch, recomputes)
        assert costs.step(batch, recomputes, on_cpu=False) == pytest.approx(peak, rel=0.1)
        assert (costs.frozen, costs.trained) == (frozen, trained)
        told = of_batch(*(costs.recomputed_work if recomputes else costs.kept_work), batch)
        assert told.flops == pytest.approx(work.flops, rel=1e-6)
        assert (told.bytes, told.calls) == pytest.approx((work.bytes, work.calls), rel=0.05)
    assert costs.recomputed[1] < costs.kept[1]
    if config == demo():
        assert known_costs(request, tmp_path) == costs, "the shipped record: python benchmarks/known_costs.py"


def test_a_record_is_kept_for_each_thing_that_changes_it_and_a_damaged_one_is_none(tmp_path: Path) -> None:
    plain = cost_request(settings(lora_rank=5), TINY, (64, 64))
    assert plain is not None and known_costs(plain, tmp_path) is None
    shipped = cost_request(settings(lora_rank=8), TINY, (64, 64))
    costs = known_costs(shipped, tmp_path) if shipped else None
    assert costs is not None
    keep_costs(plain, costs, tmp_path)
    assert known_costs(plain, tmp_path) == costs
    changes: list[dict[str, Any]] = [
        {"lora_rank": 6}, {"lora_dropout": 0.1}, {"use_dora": True}, {"mixed_precision": "bf16"},
        {"lora_target_modules": ("to_q",)},
        {"optimizer": "adamw_bf16", "mixed_precision": "bf16"},
    ]  # fmt: skip
    other = [settings(**{"lora_rank": 5, **keys}) for keys in changes]
    keys = {cost_key(request) for one in other if (request := cost_request(one, TINY, (64, 64)))}
    assert len(keys) == len(other) and cost_key(plain) not in keys
    same = cost_request(settings(lora_rank=5, learning_rate=1e-2, train_batch_size=8), TINY, (64, 64))
    assert same is not None and cost_key(same) == cost_key(plain)
    (note,) = tmp_path.glob("*.json")
    note.write_bytes(note.read_bytes().replace(b'"frozen":', b'"frozen":9', 1))
    assert known_costs(plain, tmp_path) is None, "another number than was calculated"
    note.write_text("{")
    assert known_costs(plain, tmp_path) is None


def test_a_model_that_is_not_here_is_known_by_its_flavour_alone() -> None:
    flavour = StageConfig.model_validate({"model_flavour": "i-medium-400m", "lora_rank": 16})
    own = StageConfig.model_validate({"model_flavour": "i-medium-400m", "pretrained_model_name_or_path": "me/mine"})
    assert cost_request(flavour, None, (64, 64)) is not None and cost_request(own, None, (64, 64)) is None


def test_an_optimizer_step_has_the_work_of_its_batches_and_of_the_update() -> None:
    one, two = Work(flops=10, bytes=100, calls=7), Work(flops=20, bytes=150, calls=7)
    costs = StepCosts(
        frozen=0, trained=1000, trained_bytes=4000, kept=(50, 80), recomputed=(5, 8), sampled=(5, 9), kept_blocks=(),
        recomputed_blocks=(), trained_tensors=3, kept_work=(one, two), recomputed_work=(two, two), sampled_work=(one, two),
    )  # fmt: skip
    work = costs.step_work(settings(train_batch_size=3, gradient_accumulation_steps=2, optimizer="adamw"))
    # Weights, gradients and both moments are read, weights and moments written; before that gradients are measured and cut.
    update = 1000 * (4 + 4 + 2 * 4 + 4 + 2 * 4 + 4 + 8)
    fresh = 4 * (50 + 2 * 30)
    assert (work.flops, work.bytes) == (2 * 30, 2 * (200 + fresh) + update)
    assert work.calls == 2 * 7 + 10 * 3
    assert costs.call_work(0.5) == Work(flops=5, bytes=75, calls=7)
    recomputed = costs.step_work(settings(train_batch_size=3, gradient_checkpointing=True, use_ema=True))
    assert recomputed.flops == 20 and recomputed.bytes == 150 + 4 * (5 + 2 * 3) + update + 32 * 1000
