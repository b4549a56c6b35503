"""Times without an earlier run, against counts by hand on a device that computes a picture's call in a second."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from data_world import DataWorld
from transformers.models.t5.modeling_t5 import T5Attention

from deepfloyd_core.config.run import Run
from deepfloyd_core.models.device import Device
from deepfloyd_core.models.text_encoders import T5_XXL
from deepfloyd_core.models.work import Speed, Work
from deepfloyd_core.planning import encoding
from deepfloyd_core.planning.calibrated import Amounts
from deepfloyd_core.planning.encoding import _positions, encoding_s
from deepfloyd_core.planning.plan import Plan, plan_after_index
from deepfloyd_core.planning.tables import verdict
from deepfloyd_core.planning.times import START, plan_times
from deepfloyd_core.planning.work import MissingModel
from deepfloyd_core.store.counts import size
from deepfloyd_core.text import t5
from deepfloyd_core.training.costs import StepCosts

SPEED = Speed(flops=1e12, bytes=1e30, call_s=11e-6)  # by which a constant is itself
CPU = Device("a CPU", True, 1 << 34, 1 << 34, True, {"no": SPEED, "bf16": SPEED})
ONE, TWO = Work(flops=1e12), Work(flops=2e12)
COSTS = StepCosts(
    frozen=0, trained=0, trained_bytes=0, kept=(0, 0), recomputed=(0, 0), sampled=(0, 0), kept_blocks=(),
    recomputed_blocks=(), trained_tensors=0, kept_work=(ONE, TWO), recomputed_work=(TWO, TWO.times(2)),
    sampled_work=(ONE, TWO),
)  # fmt: skip


def planned(world: DataWorld, **keys: object) -> tuple[Run, Plan]:
    for number in range(12):
        noise = np.random.default_rng(number).integers(0, 256, (70, 70 + number, 3), np.uint8)
        world.add(f"{number}.png", noise, caption="a picture")
    run = world.load(
        stages=(1,), num_eval_images=2, max_train_steps=30, train_batch_size=2, mixed_precision="no", **keys
    )
    return run, plan_after_index(run, world.index(run))


def seconds(run: Run, plan: Plan) -> dict[str, float]:
    amounts = Amounts(12, 12, None, {1: (64, 64)}, ["a picture"], 0, 2)
    artifacts = [replace(one, state="made") for one in plan.artifacts]
    found = plan_times(replace(run, config=run.config.model_copy(update={"workspace": "nowhere"})), artifacts,
                       list(plan.stages), {1: COSTS}, amounts, CPU)  # fmt: skip
    assert {one.by for one in found.values()} == {"calibration"}
    assert set(found) == {START, *(one.kind for one in plan.artifacts)}, "every artifact has a time"
    return {kind: one.seconds for kind, one in found.items()}


def test_a_training_takes_its_steps_and_the_losses_of_both_models(world: DataWorld) -> None:
    told = seconds(*planned(world))
    # A job; 30 steps of two pictures; two held-out and two seen pictures at four timesteps, of base and trained model.
    assert told["stage1_lora"] == pytest.approx(0.6 + 30 * 2 + 2 * 4 * 4, rel=1e-3)


def test_validations_are_drawn_before_in_and_after_a_training(world: DataWorld) -> None:
    keys = {"validation_prompt": "a dog", "num_validation_images": 3, "validation_num_inference_steps": 5}
    told = seconds(*planned(world, **keys, validation_guidance=2.0, validation_step_interval=10))
    # At steps 0, 10, 20 and 30, with guidance: calls of twice three pictures; and losses as often, and of the base.
    assert told["stage1_lora"] == pytest.approx(0.6 + 30 * 2 + 4 * (5 * 6) + 5 * 16, rel=1e-3)
    # Both variants, each loaded; and the probes, drawn in ten steps and measured by both at four timesteps.
    probes = len(planned(world)[0].config.probes)
    assert told["cascade_samples"] == pytest.approx(2 * (0.6 + 5 * 6) + probes * (10 + 2 * 4), rel=1e-3)


def test_the_plan_says_where_its_times_come_from(world: DataWorld) -> None:
    run, plan = planned(world)
    amounts = Amounts(12, 12, None, {1: (64, 64)}, ["a picture"], 0, 2)
    first = plan_times(replace(run, config=run.config.model_copy(update={"workspace": "nowhere"})), list(plan.artifacts),
                       list(plan.stages), {1: COSTS}, amounts, CPU)  # fmt: skip
    assert (
        "by a short calibration of this machine: nothing of the kind has run" in verdict(replace(plan, times=first))[0]
    )
    mixed = {kind: replace(one, by="earlier runs") for kind, one in first.items() if kind != "stage1_lora"}
    said = verdict(replace(plan, times=mixed | {"stage1_lora": first["stage1_lora"]}))[0]
    assert said.endswith(": by a short calibration of this machine Stage I LoRA, by earlier runs what else is made.")


def test_a_model_that_comes_is_told_with_its_size(world: DataWorld) -> None:
    _, plan = planned(world)
    coming = (MissingModel("me/mine", 0, False), MissingModel("owner/big", 20_500_000_000, False))
    lines = verdict(replace(plan, missing=(*coming, MissingModel("random:x", 2_000_000, True))))
    assert "Beside that me/mine must be downloaded; `deepfloyd doctor` asks the hub for it." in lines
    assert "Beside that owner/big must be downloaded, about 20.5 GB; `deepfloyd doctor` asks the hub for it." in lines
    assert f"Beside that {size(2_000_000)} of random weights are written for random:x." in lines


@pytest.mark.parametrize("real", [2, 6, 20, 77])
def test_t5_computes_the_positions_that_the_plan_counts(real: int) -> None:
    places = torch.arange(77)
    buckets = T5Attention._relative_position_bucket(places[None] - places[:, None], True, 32, 128)
    kept, _ = t5.distinct_positions(buckets, real)
    assert _positions(T5_XXL, real, 77) == (real, len(kept))


def test_t5_takes_its_products_and_its_weights_once_a_file(world: DataWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "t5_shape", lambda run: T5_XXL)
    run, _ = planned(world, text_encoder_dtype="fp32")
    products = 24 * 77 * 2 * (4 * 4096**2 + 3 * 4096 * 10240 + 2 * 77 * 4096) / 1e12
    assert encoding_s(run, ["a picture"], 10, CPU) == pytest.approx(10 * products, rel=1e-2)
    lean, _ = planned(world, text_encoder_dtype="bf16", text_encoder_streaming=True)
    slow = replace(CPU, has_bf16=False, speeds={"no": replace_bytes(1e9), "bf16": replace_bytes(1e9)})
    weights = 24 * (4 * 4096**2 + 3 * 4096 * 10240) * (2 + 4) / 1e9
    assert weights < encoding_s(lean, ["a picture"], 1, slow) < 1.1 * weights


def replace_bytes(bytes_s: float) -> Speed:
    return SPEED.model_copy(update={"bytes": bytes_s})
