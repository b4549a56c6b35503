"""Training: the LoRA that comes out is the one diffusers loads, and a killed trainer loses nothing."""

import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import torch
from command_here import ForkServerHere
from data_world import DataWorld
from diffusers import DDPMScheduler, IFPipeline, UNet2DConditionModel
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from small_run import SmallRun
from training_parts import (
    FOLDERS,
    ONE_TIMESTEP,
    break_in_step,
    newest_checkpoint,
    prepared,
    run_here,
    stage_text,
    train_and_kill,
    train_stage,
)

from deepfloyd_core.adapters.files import LORA_FILE
from deepfloyd_core.config.run import Run
from deepfloyd_core.config.stages import Stage
from deepfloyd_core.diffusion import loss
from deepfloyd_core.errors import JobError, StorageError
from deepfloyd_core.files import write_sealed
from deepfloyd_core.hashing import hash_seed
from deepfloyd_core.models.unet import load_projected_unet, load_scheduler, load_text_modules, load_unet, stock_pipeline
from deepfloyd_core.preflight.load import load_run
from deepfloyd_core.processes import jobs
from deepfloyd_core.processes.jobs import run_job
from deepfloyd_core.sampling.jobs import SampledStage
from deepfloyd_core.sampling.sampler import make_sampler, sample_from_text
from deepfloyd_core.store.artifacts import Artifact, Request, WorkDir, materialise
from deepfloyd_core.store.manifest import MANIFEST
from deepfloyd_core.text.embeds import Embeds, encode_job
from deepfloyd_core.text.projection import text_identity
from deepfloyd_core.training import eval_loss
from deepfloyd_core.training import forward as stage_loss
from deepfloyd_core.training.batches import draw
from deepfloyd_core.training.identity import lora_request
from deepfloyd_core.training.jobs import TrainingInputs, TrainingSummary, TrainRequest

pytestmark = pytest.mark.slow  # trainings from their start to their end; parts of one are in the other files

FULL_FILE = "unet/diffusion_pytorch_model.safetensors"
NO_EXTRAS = {
    **dict.fromkeys(("safety_checker", "feature_extractor", "watermarker")), "requires_safety_checker": False
}  # fmt: skip


@pytest.fixture(scope="module")
def world(
    tmp_path_factory: pytest.TempPathFactory,
    new_small_run: Callable[[Path], SmallRun],
    new_world: Callable[[Path], DataWorld],
) -> tuple[Run, dict[str, Artifact]]:
    """A small run, with two pictures held out and two sampled, and everything that training needs."""
    small = new_small_run(tmp_path_factory.mktemp("training") / "run")
    two = "num_validation_images = 2\nnum_eval_images = 2"
    small.config.write_text(small.config.read_text().replace("num_validation_images = 1", two))
    run = load_run(small.config)
    assert (run.config.num_validation_images, run.config.num_eval_images) == (2, 2)
    return run, prepared(run, new_world(run.workspace))


@pytest.fixture(scope="module")
def loras(world: tuple[Run, dict[str, Artifact]]) -> dict[int, Artifact]:
    """Both LoRAs, trained without interruption."""
    run, made = world
    return {stage: train_stage(run, made, stage, run.workspace, how=run_here) for stage in run.config.stages}


@pytest.mark.parametrize("stage", [1, 2])
def test_the_lora_loads_in_stock_diffusers_whole(loras: dict[int, Artifact], stage: int) -> None:
    from diffusers import IFPipeline, IFSuperResolutionPipeline

    cls = {1: IFPipeline, 2: IFSuperResolutionPipeline}[stage]
    pipeline = cls.from_pretrained(FOLDERS[stage], **NO_EXTRAS)
    pipeline.load_lora_weights(loras[stage].path)
    file = load_file(loras[stage].path / LORA_FILE)
    loaded = {name: tensor for name, tensor in pipeline.unet.state_dict().items() if "lora_" in name}
    assert len(loaded) == len(file) > 0  # none missing, none unexpected
    for name, tensor in file.items():
        twin = (
            name.removeprefix("unet.")
            .replace(".lora_A.", ".lora_A.default_0.")
            .replace(".lora_B.", ".lora_B.default_0.")
        )
        assert torch.equal(loaded[twin], tensor)
    assert any(tensor.abs().max() > 0 for name, tensor in file.items() if "lora_B" in name)
    targets = {name.split(".lora_")[0].rsplit("attentions", 1)[1].split(".", 2)[2] for name in file}
    missing_in_stage2 = {"to_k", "to_v"} if stage == 2 else set()
    assert targets == {"to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj"} - missing_in_stage2
    assert loras[stage].manifest.summary["reload_difference"] == 0.0


def test_the_file_carries_its_alpha_and_no_dropout(loras: dict[int, Artifact]) -> None:
    with safe_open(loras[1].path / LORA_FILE, "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    assert metadata["unet.lora_alpha"] == 4 and metadata["unet.r"] == 4
    assert metadata["unet.lora_dropout"] == 0.0  # the run has 0.1; loaded, it would stay on while sampling


def test_the_exported_scheduler_has_a_fixed_variance(loras: dict[int, Artifact]) -> None:
    for lora in loras.values():
        config = json.loads((lora.path / "scheduler" / "scheduler_config.json").read_text())
        assert config["variance_type"] == "fixed_small"


def test_the_trainer_does_not_load_the_text_modules(loras: dict[int, Artifact]) -> None:
    for stage, lora in loras.items():
        stock = sum(param.numel() for param in load_unet(FOLDERS[stage], torch.float32).parameters())
        text = sum(param.numel() for param in load_text_modules(FOLDERS[stage], torch.float32).parameters())
        assert text > 20_000
        assert lora.manifest.summary["frozen_parameters"] == stock - text


def _recorded(patched: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What the trainer's forward passes with gradients are given and, after each, its loss: (output, noise)."""
    fed: list[tuple[Any, ...]] = []

    def record(name: str, real: Callable[..., Any]) -> None:
        def call(*given: Any) -> Any:
            if torch.is_grad_enabled():
                fed.append(given)
            return real(*given)

        patched.setattr(stage_loss, name, call)

    record("predict", loss.predict)
    record("squared_error", loss.squared_error)
    return fed


@pytest.mark.parametrize("stage", [1, 2])
def test_full_steps_are_those_of_plain_adamw_on_every_weight(
    world: tuple[Run, dict[str, Artifact]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: Stage
) -> None:
    """Against torch alone on a UNet that diffusers loaded, fed what the trainer was fed. Bit for bit in fp32."""
    first, made = world
    settings = ["model_type=full", "lora_rank=16", "lora_dropout=0.0", "max_train_steps=2", "lr_scheduler=constant"]
    settings += ["use_ema=false", "random_flip=false", "validation_step_interval=0"]
    run = load_run(first.workspace.parent / "run.toml", tuple(f"stage{stage}.{key}" for key in settings))
    fed = _recorded(monkeypatch)
    trained = train_stage(run, made, stage, tmp_path, how=run_here)
    assert trained.manifest.inputs["text"] == text_identity(made["text_embeds"])

    unet = UNet2DConditionModel.from_pretrained(FOLDERS[stage], subfolder="unet").train()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3, weight_decay=1e-2, fused=True)
    for (_, x, t, text, level, _), (_, noise) in zip(fed[::2], fed[1::2], strict=True):
        eps = unet(x, t, encoder_hidden_states=text.rows, class_labels=level).sample[:, :3]
        (eps - noise).square().mean(dim=(1, 2, 3)).mean().backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    found, base = load_file(trained.path / FULL_FILE), load_file(FOLDERS[stage] / FULL_FILE)
    for name, tensor in unet.state_dict().items():
        assert torch.equal(found[name], tensor), name
        assert not torch.equal(tensor, base[name]), name


@pytest.mark.parametrize(("stage", "precision"), [(1, "no"), (1, "bf16"), (2, "no")])
def test_training_on_the_stored_text_gives_the_bytes_of_training_on_the_raw_rows(
    world: tuple[Run, dict[str, Artifact]],
    tmp_path: Path,
    stage: Stage,
    precision: str,
) -> None:
    """At batch size 1; in larger ones a stock UNet rounds its own projections otherwise."""
    first, made = world
    settings = ("train_batch_size=1", "max_train_steps=3", "validation_step_interval=0", f"mixed_precision={precision}")
    run = load_run(first.workspace.parent / "run.toml", tuple(f"stage{stage}.{key}" for key in settings))
    ours, stock = (train_stage(run, made, stage, tmp_path, text, run_here) for text in (None, made["text_embeds"]))
    assert ours.fingerprint != stock.fingerprint
    assert ours.manifest.summary["frozen_parameters"] < stock.manifest.summary["frozen_parameters"]
    for name in (LORA_FILE, "metrics.parquet"):
        assert (ours.path / name).read_bytes() == (stock.path / name).read_bytes()


def test_adapters_on_the_text_modules_train_on_the_raw_rows(
    world: tuple[Run, dict[str, Artifact]], tmp_path: Path
) -> None:
    first, made = world
    settings = ('lora_target_modules=["to_q","encoder_hid_proj"]', "max_train_steps=2", "validation_step_interval=0")
    keys = tuple(f"stage1.{key}" for key in settings)
    run = load_run(first.workspace.parent / "run.toml", keys)
    lora = train_stage(run, made, 1, tmp_path, how=run_here)
    assert lora.manifest.inputs["text"] == text_identity(made["text_embeds"])
    assert lora.manifest.summary["reload_difference"] == 0.0
    assert load_file(lora.path / LORA_FILE)["unet.encoder_hid_proj.lora_B.weight"].abs().max() > 0


def test_validation_pictures_are_those_of_the_stock_pipeline_with_the_saved_lora(
    world: tuple[Run, dict[str, Artifact]], loras: dict[int, Artifact]
) -> None:
    run, made = world
    pipeline = IFPipeline.from_pretrained(FOLDERS[1], **NO_EXTRAS)
    pipeline.scheduler = DDPMScheduler.from_pretrained(loras[1].path / "scheduler")
    pipeline.load_lora_weights(loras[1].path)
    pipeline.unet.eval().to(memory_format=torch.channels_last)
    pipeline.set_progress_bar_config(disable=True)
    embeds, config = Embeds(made["text_embeds"]), run.config.stage(1)
    pictures = pipeline(
        prompt_embeds=torch.stack([embeds.of("a purple star")] * 2),
        negative_prompt_embeds=torch.stack([embeds.of("")] * 2),
        generator=[torch.Generator().manual_seed(seed) for seed in (0, 1)],
        num_inference_steps=config.validation_num_inference_steps,
        guidance_scale=config.validation_guidance,
        height=64,
        width=64,
        output_type="np",
    ).images
    files = sorted((loras[1].path / "validation").rglob("*.png"))
    steps = [path.parent.name for path in files]
    assert steps == [f"step-{step:08d}" for step in (0, 0, 6, 6, 12, 12)]
    drawn = np.stack([np.asarray(Image.open(file)) for file in files[-2:]])
    # The stored text was projected a caption at a time, this one four at once: bits of it may differ.
    assert np.abs((pictures * 255).round() - drawn).max() <= 1
    assert np.mean((pictures * 255).round() != drawn) < 1e-3
    untrained, trained = (np.asarray(Image.open(file)) for file in (files[0], files[-2]))
    assert not np.array_equal(untrained, trained)


@pytest.mark.parametrize("stage", [1, 2])
def test_the_held_out_losses_are_those_of_the_stock_unet(
    world: tuple[Run, dict[str, Artifact]], loras: dict[int, Artifact], stage: Stage
) -> None:
    run, made = world
    table = pq.read_table(loras[stage].path / "validation.parquet").to_pylist()
    assert {row["model"] for row in table} == {"base", "trained"}
    row = next(row for row in table if row["model"] == "base" and row["part"] == "held_out" and row["t"] == 400)
    file = next(made["eval_set"].path.glob(f"stage{stage}-*.parquet"))
    picture = next(item for item in pq.read_table(file).to_pylist() if item["image_id"] == row["image_id"])
    shape = 1, picture["height"], picture["width"], 3
    x_0 = (
        torch.frombuffer(bytearray(picture["pixels"]), dtype=torch.uint8).reshape(shape).permute(0, 3, 1, 2) / 127.5 - 1
    )
    drawn, t = draw(x_0.shape, hash_seed("eval", row["image_id"], 400), 0, 0.0), torch.tensor([400])
    x = DDPMScheduler.from_pretrained(FOLDERS[stage], subfolder="scheduler").add_noise(x_0, drawn.noise, t)
    level = torch.tensor([run.config.stage(stage).validation_noise_level])
    if stage == 2:
        noising = DDPMScheduler.from_pretrained(FOLDERS[2], subfolder="image_noising_scheduler")
        small = torch.nn.functional.interpolate(x_0, scale_factor=0.25, mode="bicubic", antialias=True).clamp(-1, 1)
        large = torch.nn.functional.interpolate(small, scale_factor=4, mode="bilinear", align_corners=True)
        x = torch.cat([x, noising.add_noise(large, drawn.low_res_noise, level)], dim=1)
    unet = UNet2DConditionModel.from_pretrained(FOLDERS[stage], subfolder="unet").eval()
    text = Embeds(made["text_embeds"])[picture["caption_id"]][None]
    with torch.inference_mode():
        eps = unet(x, t, text, class_labels=level if stage == 2 else None)[0][:, :3]
    assert float((eps - drawn.noise).square().mean()) == pytest.approx(row["loss"], rel=1e-5)
    assert loras[stage].manifest.summary["eval_loss_base"] == pytest.approx(
        np.mean([row["loss"] for row in table if row["model"] == "base" and row["part"] == "held_out"]), rel=1e-6
    )


def test_validating_changes_no_byte_of_the_lora(world: tuple[Run, dict[str, Artifact]], tmp_path: Path) -> None:
    first, made = world

    def trained(every: int) -> dict[str, str]:
        keys = ("optimizer=adamw_schedulefree", "lr_scheduler=constant", "use_ema=false", "max_train_steps=2")
        settings = tuple(f"stage1.{key}" for key in (*keys, f"validation_step_interval={every}"))
        run = load_run(first.workspace.parent / "run.toml", settings)
        return train_stage(run, made, 1, tmp_path, how=run_here).hashes

    with_pictures, without = trained(1), trained(0)
    assert "validation/step-00000001/000.png" in with_pictures
    assert not any(name.startswith("validation/") for name in without)
    for name in (LORA_FILE, "metrics.parquet"):
        assert with_pictures[name] == without[name]


@pytest.mark.parametrize("has_parent", [False, True])
def test_previews_are_shown_while_it_trains_and_change_no_byte_of_the_artifact(
    world: tuple[Run, dict[str, Artifact]], loras: dict[int, Artifact], has_parent: bool, tmp_path: Path
) -> None:
    first, made = world
    told, pictures = list[str](), list[str]()

    def report(done: int, total: int, line: str) -> None:
        told.append(f"{done}/{total} {line.partition(' lr')[0]}")

    def trained(previews: int, out: Path) -> Artifact:
        def how(request: TrainRequest, work: WorkDir) -> TrainingSummary:
            summary = run_here(request.model_copy(update={"previews": previews}), work, report)
            pictures.extend(str(file.relative_to(work.path)) for file in work.path.rglob(".preview/**/*.png"))
            return summary

        parent = (f"init_lora={loras[1].path}", "lora_dropout=0.0") if has_parent else ()
        keys = ("max_train_steps=2", "validation_step_interval=", *parent)
        run = load_run(first.workspace.parent / "run.toml", tuple(f"stage1.{key}" for key in keys))
        return train_stage(run, made, 1, out, how=how)

    with_previews = trained(1, tmp_path / "with")
    seen = told[:]
    without = trained(0, tmp_path / "without")
    assert without.hashes == with_previews.hashes and without.fingerprint == with_previews.fingerprint
    assert without.manifest.summary.get("eval_loss_parent") == with_previews.manifest.summary.get("eval_loss_parent")
    assert not any(Path(name).name.startswith(".") for name in with_previews.hashes)
    steps = (0, 1) if has_parent else (1,)  # at step 0 the base has no preview, a parent has
    files = [f".preview/validation/step-{step:08d}/{number:03d}.png" for step in steps for number in (0, 1)]
    assert sorted(pictures) == [".preview/loss.png", ".preview/validation.png", *files]
    held_out = 4  # two pictures held out, and two that are trained on, at one timestep
    for step in steps:
        assert f"{held_out}/{held_out} held-out losses at step {step}" in seen
        assert [f"{number}/2 samples at step {step}" for number in range(3)] == [
            line for line in seen if line.endswith(f"samples at step {step}")
        ]
    assert [line for line in told[len(seen) :] if "loss 0" not in line] == [
        f"{number}/{held_out} held-out losses {of}"
        for of in (*(["at step 0"] * has_parent), "at step 2", "of the base")
        for number in range(1, held_out + 1)
    ], "no silence at the end"


@pytest.mark.parametrize(("before", "after"), [(1, 0), (0, 1)])
def test_a_stopped_training_with_a_parent_goes_on_with_other_previews_and_ends_with_the_same_bytes(
    world: tuple[Run, dict[str, Artifact]], loras: dict[int, Artifact], before: int, after: int, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    first, made = world
    keys = (f"init_lora={loras[1].path}", "lora_dropout=0.0", "max_train_steps=2", "checkpoint_step_interval=1")
    settings = tuple(f"stage1.{key}" for key in (*keys, "validation_step_interval="))
    run = load_run(first.workspace.parent / "run.toml", settings)

    def trained(previews: int, out: Path) -> Artifact:
        def how(request: TrainRequest, work: WorkDir) -> TrainingSummary:
            return run_here(request.model_copy(update={"previews": previews}), work)

        return train_stage(run, made, 1, out, how=how)

    break_in_step(monkeypatch, 1)
    with pytest.raises(RuntimeError, match="broken"):
        trained(before, tmp_path / "broken")
    resumed, whole = trained(after, tmp_path / "broken"), trained(before, tmp_path / "whole")
    assert resumed.hashes == whole.hashes
    assert resumed.manifest.summary["eval_loss_parent"] == whole.manifest.summary["eval_loss_parent"] is not None


def test_another_prompt_trains_nothing_anew(world: tuple[Run, dict[str, Artifact]], tmp_path: Path) -> None:
    first, made = world

    def request(every: int, prompt: str, text: Artifact) -> str:
        keys = (f"stage1.validation_step_interval={every}", f"validation_prompt={prompt}")
        run = load_run(first.workspace.parent / "run.toml", keys)
        inputs = TrainingInputs(pixels=made["stage1_pixels"], text=text, eval_set=made["eval_set"])
        return lora_request(run, 1, FOLDERS[1], inputs, run.config.prompts).fingerprint

    text = stage_text(first, 1, made["text_embeds"])
    record = text.manifest.model_dump()
    (tmp_path / "other").mkdir()
    write_sealed(
        tmp_path / "other" / MANIFEST, {**record, "inputs": {**text.inputs, "text_embeds": "0123456789abcdef"}}
    )
    other = Artifact("stage1_text", "other", tmp_path / "other")  # with one more text
    assert request(0, "a star", text) == request(0, "a moon", other)
    assert request(5, "a star", text) != request(5, "a moon", other), "its pictures are in the artifact"


@pytest.mark.parametrize("stage", [1, 2])
def test_a_trainer_killed_again_and_again_makes_the_same_bytes(
    world: tuple[Run, dict[str, Artifact]], loras: dict[int, Artifact], forked_jobs: None, tmp_path: Path, stage: Stage
) -> None:
    """Stage I first as the job that a run starts, which tries it again by itself."""
    run, made = world
    if stage == 1:
        killer = _Killer(tmp_path / "once", after_steps=4)
        killer.start()
        once = train_stage(run, made, 1, tmp_path / "once")
        killer.join()
        assert once.hashes == loras[1].hashes
        assert once.manifest.summary["steps_of_this_process"] < run.config.stage(1).steps
    train_and_kill(run, made, stage, tmp_path, after_steps=1)
    train_and_kill(run, made, stage, tmp_path, after_steps=2)
    lora = train_stage(run, made, stage, tmp_path, how=run_here)
    assert lora.hashes == loras[stage].hashes
    assert lora.manifest.summary["steps_of_this_process"] < run.config.stage(stage).steps


def test_a_damaged_checkpoint_is_passed_over(
    world: tuple[Run, dict[str, Artifact]], loras: dict[int, Artifact], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, made = world
    train_and_kill(run, made, 1, tmp_path, after_steps=6)
    newest = max(tmp_path.glob("stage1_lora/*/.checkpoints/step-*/adapter.safetensors"))
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    newest.write_bytes(bytes(data))
    lora = train_stage(run, made, 1, tmp_path, how=run_here)
    assert (lora.path / LORA_FILE).read_bytes() == (loras[1].path / LORA_FILE).read_bytes()


def test_sigterm_writes_a_checkpoint_and_ends(
    world: tuple[Run, dict[str, Artifact]], loras: dict[int, Artifact], forked_jobs: None, tmp_path: Path
) -> None:
    run, made = world
    run = load_run(
        Path(run.workspace).parent / "run.toml", (f"workspace={tmp_path}", "stage1.checkpoint_step_interval=1000")
    )
    stopper = _Killer(tmp_path, after_steps=0, number=signal.SIGTERM)
    stopper.start()
    with pytest.raises(JobError, match="stopped"):
        train_stage(run, made, 1, tmp_path)
    stopper.join()
    assert list(tmp_path.glob("stage1_lora/*/.checkpoints/step-*/checkpoint.json"))
    lora = train_stage(run, made, 1, tmp_path, how=run_here)
    assert (lora.path / LORA_FILE).read_bytes() == (loras[1].path / LORA_FILE).read_bytes()


def test_with_use_ema_the_moving_average_is_saved(world: tuple[Run, dict[str, Artifact]], tmp_path: Path) -> None:
    """Against the adapters after 1, 2 and 3 steps, averaged here: decays 0, 2/11 and 3/12, as in diffusers' EMAModel."""
    run, made = world

    def trained(steps: int, ema: str) -> dict[str, torch.Tensor]:
        settings = ("stage1.lr_scheduler=constant", f"stage1.max_train_steps={steps}", f"stage1.use_ema={ema}")
        keys = (*settings, "stage1.validation_step_interval=0")
        changed = load_run(Path(run.workspace).parent / "run.toml", keys)
        tensors: dict[str, torch.Tensor] = load_file(
            train_stage(changed, made, 1, tmp_path, how=run_here).path / LORA_FILE
        )
        return tensors

    after = [trained(steps, "false") for steps in (1, 2, 3)]
    average = trained(3, "true")
    for name, tensor in average.items():
        first, second, third = (step[name].double() for step in after)
        expected = 3 / 12 * (2 / 11 * first + 9 / 11 * second) + 9 / 12 * third
        assert torch.allclose(tensor.double(), expected, atol=1e-7), name


@pytest.mark.parametrize(
    "keys",
    [
        ("optimizer=adamw_bf16", "mixed_precision=bf16", "use_ema=true", "gradient_accumulation_steps=2"),
        ("use_dora=true", "optimizer=adamw_bf16", "mixed_precision=bf16", "use_ema=true"),
        ("use_bitfit=true", "lora_rank=16", "lora_dropout=0.0"),
        ("model_type=full", "lora_rank=16", "lora_dropout=0.0"),
        ("optimizer=prodigy", "learning_rate=1.0", "train_variance=true"),
        (
            "optimizer=adamw_schedulefree",
            "lr_scheduler=constant",
            "use_ema=false",
            "loss_type=huber",
        ),
    ],
)
def test_other_trainings_survive_a_kill_and_can_be_sampled_from(
    world: tuple[Run, dict[str, Artifact]],
    loras: dict[int, Artifact],
    tmp_path: Path,
    keys: tuple[str, ...],
) -> None:
    first, made = world
    small = (
        "max_train_steps=4",
        "train_batch_size=1",
        "validation_step_interval=2",
        "validation_num_inference_steps=1",
    )
    settings = tuple(f"stage1.{key}" for key in (*small, "checkpoint_step_interval=1", *keys))
    run = load_run(first.workspace.parent / "run.toml", (*settings, "num_validation_images=1"))
    whole = train_stage(run, made, 1, tmp_path / "whole", how=run_here)
    train_and_kill(run, made, 1, tmp_path / "killed", after_steps=2)
    lora = train_stage(run, made, 1, tmp_path / "killed", how=run_here)
    assert lora.hashes == whole.hashes
    assert lora.manifest.summary["steps_of_this_process"] < 3
    assert lora.manifest.summary["reload_difference"] == 0.0
    assert lora.manifest.summary["eval_loss"] != lora.manifest.summary["eval_loss_base"]
    if "mixed_precision=bf16" not in keys:
        assert lora.manifest.summary["eval_loss_base"] == loras[1].manifest.summary["eval_loss_base"], (
            "the base itself, whatever was trained"
        )
    scheduler = load_scheduler(lora.path)
    assert scheduler.config.variance_type == ("learned_range" if "train_variance=true" in keys else "fixed_small")
    sampler = make_sampler(
        SampledStage(stage=1, settings=run.config.stage(1), model=FOLDERS[1]), lora.path, run.config, lambda count: None
    )
    assert sampler.pipeline.scheduler.config.variance_type == scheduler.config.variance_type
    text = torch.zeros(1, 77, sampler.pipeline.unet.config.encoder_hid_dim)
    assert bool(sample_from_text(sampler, text, text, [0], (64, 64)).isfinite().all())


def test_a_training_goes_on_from_its_parent_and_survives_a_kill(
    world: tuple[Run, dict[str, Artifact]],
    loras: dict[int, Artifact],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its first loss is that of a stock UNet with the parent, on what the trainer was fed; then it is another LoRA."""
    first, made = world
    keys = (f"init_lora={loras[1].path}", "lora_dropout=0.0", "max_train_steps=6", "checkpoint_step_interval=1")
    run = load_run(first.workspace.parent / "run.toml", tuple(f"stage1.{key}" for key in keys))
    with monkeypatch.context() as patched:
        fed = _recorded(patched)
        whole = train_stage(run, made, 1, tmp_path / "whole", how=run_here)
    assert whole.manifest.inputs["parent"] == loras[1].hashes[LORA_FILE]
    assert whole.manifest.summary["eval_loss_parent"] == loras[1].manifest.summary["eval_loss"], "step 0 is the parent"
    assert whole.fingerprint != loras[1].fingerprint
    (_, x, t, text, _, _), (_, noise) = fed[:2]
    unet = load_projected_unet(FOLDERS[1], torch.float32)
    stock_pipeline(FOLDERS[1], 1, unet, load_scheduler(FOLDERS[1])).load_lora_weights(loras[1].path)
    with torch.inference_mode():
        out = unet.train()(x, t, encoder_hidden_states=text.rows, added_cond_kwargs={"pooled": text.pooled})[0]
    assert whole.manifest.summary["first_loss"] == pytest.approx(float((out[:, :3] - noise).square().mean()), rel=1e-6)
    before, after = (load_file(lora.path / LORA_FILE) for lora in (loras[1], whole))
    assert before.keys() == after.keys() and not all(torch.equal(before[name], after[name]) for name in before)

    train_and_kill(run, made, 1, tmp_path / "killed", after_steps=3)
    lora = train_stage(run, made, 1, tmp_path / "killed", how=run_here)
    assert lora.manifest.summary["steps_of_this_process"] < 6
    assert (lora.path / LORA_FILE).read_bytes() == (whole.path / LORA_FILE).read_bytes()


class _Killer(threading.Thread):
    """Signals the training job once it has a checkpoint this many steps beyond those it started with."""

    def __init__(self, workspace: Path, after_steps: int, number: int = signal.SIGKILL) -> None:
        super().__init__(daemon=True)
        self.workspace, self.after, self.number, self.done = workspace, after_steps, number, threading.Event()

    def run(self) -> None:
        first = newest_checkpoint(self.workspace)
        while not self.done.wait(0.01):
            told = self.workspace.glob("stage*_lora/*/.job-train.progress")
            stepped = any(
                " lr " in path.read_text() for path in told
            )  # not only a validation, after which nothing is kept
            process = _job_process() if stepped and newest_checkpoint(self.workspace) - first >= self.after else None
            if process:
                os.kill(process, self.number)
                return


def _job_process() -> int | None:
    """The process that trains, a fork of this one."""
    here = psutil.Process()
    return next((job.pid for job in here.children() if job.cmdline() == here.cmdline()), None)


@pytest.fixture
def forked_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs are forks of this process, and not of one that imports torch; tests/test_killed_runs.py has those."""
    monkeypatch.setattr(jobs, "ForkServer", ForkServerHere)
    monkeypatch.setattr(eval_loss, "TIMESTEPS", ONE_TIMESTEP)


def test_a_job_that_finds_no_encoder_names_its_folder(tmp_path: Path, world: tuple[Run, dict[str, Artifact]]) -> None:
    run, _ = world
    job = encode_job(run, ["x"], tmp_path / "nowhere")
    request = Request("text_embeds", 1, {"x": 1}, {})
    with pytest.raises(StorageError, match="nowhere/tokenizer"):
        materialise(tmp_path, request, lambda work: run_job(job, work))
