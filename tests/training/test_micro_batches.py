"""A batch that goes through the UNet in parts trains what the whole batch does, up to the rounding of sums."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from data_world import DataWorld
from training_parts import FOLDERS, difference, prepared, run_here, stage_text, train_and_kill, train_stage, weights

from deepfloyd_core.adapters.method import method_of
from deepfloyd_core.config.run import Run
from deepfloyd_core.config.stage import StageConfig
from deepfloyd_core.config.stages import Stage
from deepfloyd_core.diffusion.loss import Text
from deepfloyd_core.errors import ConfigError
from deepfloyd_core.models.quantized import load_base
from deepfloyd_core.models.unet import load_scheduler
from deepfloyd_core.store.artifacts import Artifact
from deepfloyd_core.training.batches import Batch
from deepfloyd_core.training.forward import Prepared, TrainingContext, prepare
from deepfloyd_core.training.micro_batches import add_gradients, check_separable, keep_sizes, micro_batches
from deepfloyd_core.training.ranks import Ranks

ROLLED: dict[str, Any] = {
    "scheduled_sampling_max_step_offset": 400, "scheduled_sampling_probability": 0.5, "snr_gamma": 5.0,
}  # fmt: skip
OPTIONS: dict[str, tuple[Stage, dict[str, Any]]] = {
    "min-SNR": (1, {"snr_gamma": 5.0, "random_flip": True, "caption_dropout_probability": 0.5}),
    "huber": (1, {"loss_type": "smooth_l1", "huber_schedule": "snr", "offset_noise": True, "input_perturbation": 0.1}),
    "own errors, DoRA": (1, {**ROLLED, "use_dora": True, "gradient_accumulation_steps": 3}),
    "variance, biases": (1, {**ROLLED, "train_variance": True, "use_bitfit": True}),
    "ControlNet": (1, {
        "controlnet": True, "controlnet_conditioning": "grayscale", "gradient_checkpointing": True,
    }),
    "Stage II": (2, {
        **ROLLED, "stage2_patch": 64, "low_res_blur": 0.5, "low_res_noise": 4.0, "low_res_jpeg_quality": 50,
        "train_variance": True, "validation_back_projection": True, "low_res_stage1_share": 0.5,
        "base_model_precision": "int8",
    }),
}  # fmt: skip


def a_pass(name: str, batch: int) -> tuple[TrainingContext, Prepared]:
    """The model of a stage with options, its new parts not zero, and a batch of noise."""
    stage, keys = OPTIONS[name]
    more = {"model_flavour": f"tiny-{'i' * stage}", "mixed_precision": "no", "lora_rank": 4, "train_batch_size": batch}
    config = StageConfig.model_validate({**more, **keys} if "use_bitfit" not in keys else
                                        {**more, **keys, "lora_rank": 16})  # fmt: skip
    unet, cpu = load_base(FOLDERS[stage], False, torch.float32, config.base_model_precision, torch.device("cpu")), "cpu"
    method_of(config).prepare(unet, config, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for param in unet.parameters():
            if param.requires_grad:
                param += 0.02 * torch.randn(param.shape, generator=generator)
    rows = torch.randn((2, 77, unet.config.encoder_hid_dim), generator=generator)
    scheduler = load_scheduler(FOLDERS[stage])
    noising = load_scheduler(FOLDERS[stage], "image_noising_scheduler") if stage == 2 else None

    def texts(ids: list[str]) -> Text:
        return Text(torch.stack([rows[int(name == "id")] for name in ids]))

    context = TrainingContext(stage, config, 5, unet.train(), scheduler, noising, texts, torch.device(cpu), Path())
    edge = 64 if stage == 1 else 72
    pixels, remakes = (
        torch.randint(0, 256, (batch, size, size, 3), generator=generator, dtype=torch.uint8)
        for size in (edge, edge // 4)
    )
    crops = Batch(pixels, ["id"] * batch, np.arange(batch), None, remakes if stage == 2 else None)
    return context, prepare(context, crops, 11, [str(number) for number in range(batch)])


def gradients(context: TrainingContext, whole: Prepared, size: int) -> tuple[float, dict[str, torch.Tensor]]:
    """Of a batch in micro-batches of a size: its loss and the gradients."""
    cut = replace(context, config=context.config.model_copy(update={"micro_batch_size": size}))
    context.unet.zero_grad()
    loss = add_gradients(cut, whole)
    return loss, {name: param.grad for name, param in context.unet.named_parameters() if param.grad is not None}


@pytest.mark.parametrize("name", OPTIONS)
def test_gradients_of_the_parts_add_up_to_those_of_the_whole(name: str) -> None:
    context, whole = a_pass(name, 5)
    assert [part.image_ids for part in micro_batches(whole, 2)] == [["0"], ["1", "2"], ["3", "4"]]
    loss, expected = gradients(context, whole, 5)
    for size in (2, 1):
        found, other = gradients(context, whole, size)
        assert found == pytest.approx(loss, rel=1e-5)
        assert difference(expected, other) < 1e-5
    if context.stage == 2:
        assert whole.draws.rollout and len(set(whole.draws.rollout.taken.tolist())) == 2


STAGES: dict[Stage, dict[str, Any]] = {
    1: {"caption_dropout_probability": 0.3, "random_flip": True, "snr_gamma": 5.0, "use_ema": True},
    2: {"stage2_patch": 64, "low_res_blur": 0.5, "train_variance": True, "gradient_accumulation_steps": 2},
}
COMMON = {"train_batch_size": 4, "max_train_steps": 4, "lora_rank": 4, "mixed_precision": "no", "learning_rate": 1e-3,
          "checkpoint_step_interval": 1, "validation_step_interval": 0}  # fmt: skip


def small(world: DataWorld, stage: Stage) -> tuple[Run, dict[str, Artifact]]:
    """Noise of two sizes, seven and five pictures with one held out: batches of four and shorter ones."""
    rng, scale = np.random.default_rng(0), stage**2
    for number, width in enumerate([64] * 7 + [96] * 5):
        world.add(f"{number}.png", rng.integers(0, 256, (64 * scale, width * scale, 3), np.uint8), f"caption {number}")
    settings = {**COMMON, **STAGES[stage], "model_flavour": f"tiny-{'i' * stage}"}
    run = world.load(
        stages=(stage,), num_threads=1, text_encoder_dtype="fp32", device="cpu", **{f"stage{stage}": settings}
    )
    made = prepared(run, world)
    return run, made | {"text": stage_text(run, stage, made["text_embeds"])}


def of(run: Run, stage: Stage, **keys: Any) -> Run:
    """The run with other settings of a stage."""
    settings = run.config.stage(stage).model_copy(update=keys)
    return replace(run, config=run.config.model_copy(update={f"stage{stage}": settings}))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_a_training_in_parts_ends_with_the_weights_of_one_that_is_not_and_survives_a_kill(
    world: DataWorld, tmp_path: Path, stage: Stage
) -> None:
    run, made = small(world, stage)
    text = made["text"]
    whole = train_stage(run, made, stage, tmp_path / "whole", text, how=run_here)
    assert "micro_batches" not in whole.manifest.summary
    halves = train_stage(of(run, stage, micro_batch_size=3), made, stage, tmp_path / "halves", text, how=run_here)
    assert halves.fingerprint == whole.fingerprint, "another machine's settings are no other LoRA"
    assert 0 < difference(weights(whole), weights(halves)) < 1e-5
    assert halves.manifest.summary["micro_batches"] == {"0": 2}
    train_and_kill(of(run, stage, micro_batch_size=2), made, stage, tmp_path / "killed", after_steps=1)
    again = train_stage(of(run, stage, micro_batch_size=2), made, stage, tmp_path / "killed", text, how=run_here)
    assert again.hashes == halves.hashes and again.manifest.summary["steps_of_this_process"] < 4
    train_and_kill(run, made, stage, tmp_path / "smaller", after_steps=1)
    ones = train_stage(of(run, stage, micro_batch_size=1), made, stage, tmp_path / "smaller", text, how=run_here)
    assert 0 < difference(weights(whole), weights(ones)) < 1e-5
    first = 4 - ones.manifest.summary["steps_of_this_process"]
    assert first and ones.manifest.summary["micro_batches"] == {str(first): 1}


def test_the_sizes_of_steps_that_are_done_again_are_forgotten(tmp_path: Path) -> None:
    config = StageConfig(model_flavour="tiny-i", max_train_steps=100, train_batch_size=4)
    cut = config.model_copy(update={"micro_batch_size": 2})

    def keep(step: int, config: StageConfig, ranks: int = 1) -> tuple[dict[int, int], dict[int, int]]:
        context = cast(TrainingContext, SimpleNamespace(config=config, ranks=Ranks(0, ranks)))
        kept = keep_sizes(tmp_path, step, context)
        return kept.micro_batches, kept.ranks

    assert keep(0, config) == ({}, {}) and not list(tmp_path.iterdir())
    assert keep(40, cut) == ({40: 2}, {}) == keep(60, cut)
    assert keep(70, config) == ({40: 2, 70: 4}, {})
    assert keep(70, cut) == ({40: 2}, {})
    assert keep(30, config) == ({}, {}) == keep(50, config)
    assert keep(100, cut) == ({}, {}), "no step is left"
    assert keep(40, cut) == ({40: 2}, {})
    (note,) = tmp_path.iterdir()
    note.write_bytes(note.read_bytes().replace(b"2", b"3", 1))
    assert keep(60, cut) == ({60: 2}, {}), "a size that was never taken is in no manifest"
    assert keep(70, cut, 2) == ({60: 2}, {70: 2})
    assert keep(80, cut) == ({60: 2}, {70: 2, 80: 1})


def test_what_cannot_be_cut_is_refused(tmp_path: Path) -> None:
    keys = {"model_flavour": "tiny-i", "train_batch_size": 4}
    with pytest.raises(ValueError, match=r"lora_dropout is 0\.1, which is drawn for whole batches"):
        StageConfig.model_validate({**keys, "micro_batch_size": 2, "lora_dropout": 0.1})
    with pytest.raises(ValueError, match="micro_batch_size is 5, and no batch is larger"):
        StageConfig.model_validate({**keys, "micro_batch_size": 5})
    with pytest.raises(ValueError, match="sample_batch_size is 17, and Stage I samples 16 pictures at once at most"):
        StageConfig.model_validate({**keys, "sample_batch_size": 17})
    StageConfig.model_validate({**keys, "micro_batch_size": 4, "lora_dropout": 0.1})
    cut = StageConfig.model_validate({**keys, "micro_batch_size": 2})
    unet = torch.nn.Sequential(torch.nn.Dropout(0.0), torch.nn.Dropout(0.2))
    check_separable(unet, StageConfig.model_validate(keys))
    check_separable(unet[:1], cut)
    with pytest.raises(ConfigError, match=r"dropout of 0\.2"):
        check_separable(unet, cut)
