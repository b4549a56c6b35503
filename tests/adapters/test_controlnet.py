"""ControlNet-LoRA: a Stage I that follows a picture, sampled by the stock pipelines."""

import json
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from data_world import DataWorld
from diffusers import IFPipeline, UNet2DConditionModel
from model_cards import generated, run_card
from narrowing import known
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from skimage import data, feature
from small_run import SmallRun
from training_parts import FOLDERS, break_in_step, prepared, run_here, train_and_kill, train_stage

from deepfloyd_core.adapters.controlnet import add_control, load_control, reload_control, remove_control, save_control
from deepfloyd_core.adapters.lora import trainable
from deepfloyd_core.config.run import Run
from deepfloyd_core.config.stage import StageConfig
from deepfloyd_core.crops.rows import shard_files
from deepfloyd_core.crops.shards import open_shard, read_rows
from deepfloyd_core.diffusion.conditioning import conditioning_picture
from deepfloyd_core.errors import ArtifactError, ConfigError
from deepfloyd_core.models.same_output import frozen
from deepfloyd_core.models.unet import (
    autocast,
    load_projected_unet,
    load_scheduler,
    load_text_modules,
    load_unet,
    stock_pipeline,
)
from deepfloyd_core.preflight.load import load_run
from deepfloyd_core.store.artifacts import Artifact
from deepfloyd_core.text.embeds import Embeds
from deepfloyd_core.training.recompute import recompute_activations

FOLDER, FILE = FOLDERS[1], "controlnet_lora.safetensors"
NO_EXTRAS = {
    **dict.fromkeys(("safety_checker", "feature_extractor", "watermarker", "text_encoder", "tokenizer")),
    "requires_safety_checker": False,
}
KEYS = ("controlnet=true", "controlnet_conditioning=grayscale")


def settings(**keys: Any) -> StageConfig:
    first = {"model_flavour": "tiny-i", "controlnet": True, "mixed_precision": "no", "lora_rank": 4}
    return StageConfig.model_validate({**first, **keys})


def controlled(moved: bool = True, unet: UNet2DConditionModel | None = None, **keys: Any) -> UNet2DConditionModel:
    """A UNet with a new control, every part of which was moved from its start."""
    unet, generator = unet or load_unet(FOLDER, torch.float32), torch.Generator().manual_seed(2)
    add_control(unet, settings(**keys), 7)
    if moved:
        with torch.no_grad():
            for param in trainable(unet).values():
                param.add_(0.05 * torch.randn(param.shape, generator=generator).to(param.dtype))
    return unet.eval()


def inputs(unet: UNet2DConditionModel, control: bool = True) -> dict[str, Any]:
    """One batch of two, which follow two pictures."""
    generator = torch.Generator().manual_seed(4)
    words = {
        "sample": torch.randn((2, 3, 32, 48), generator=generator),
        "timestep": torch.tensor([100, 700]),
        "encoder_hidden_states": torch.randn((2, 77, unet.encoder_hid_proj.in_features), generator=generator),
    }
    picture = torch.rand((2, 3, 32, 48), generator=generator)
    return {**words, "cross_attention_kwargs": {"control_image": picture}} if control else words


def test_it_starts_at_the_base_model_exactly_and_leaves_it_as_it_was() -> None:
    base = load_unet(FOLDER, torch.float32)
    unet = controlled(moved=False)
    with torch.inference_mode():
        expected = base(**inputs(base, control=False))[0]
        assert torch.equal(unet(**inputs(unet))[0], expected)
        moved = controlled()
        assert (moved(**inputs(moved))[0] - expected).abs().max() > 0.01
        assert torch.equal(moved(**inputs(moved, control=False))[0], expected), "without a picture: the base model"
        remove_control(moved, FOLDER)
        assert torch.equal(moved(**inputs(moved, control=False))[0], expected)
        assert moved.state_dict().keys() == base.state_dict().keys()


@pytest.mark.parametrize("keys", [{}, {"use_dora": True}, {"lora_target_modules": ["to_q", "conv1"]}])
def test_the_residuals_are_those_of_diffusers_own_way_down(keys: dict[str, Any]) -> None:
    """A whole UNet with the same adapter, whose own forward is listened to, in place of our copy of its first half."""
    unet = controlled(**keys)
    control, words = unet.control, inputs(unet)
    picture = words.pop("cross_attention_kwargs")["control_image"]
    twin = load_unet(FOLDER, torch.float32)
    (adapter,) = control.encoder.peft_config.values()
    twin.add_adapter(adapter)
    own = twin.state_dict()
    lora = {name: value for name, value in control.encoder.state_dict().items() if "lora_" in name}
    assert lora and lora.keys() <= own.keys()
    twin.load_state_dict(lora, strict=False)
    heard: list[torch.Tensor] = []

    def first(module: torch.nn.Module, args: object, out: torch.Tensor) -> torch.Tensor:
        heard.append(out + control.hint(picture))
        return heard[0]

    twin.conv_in.register_forward_hook(first)
    for block in twin.down_blocks:
        block.register_forward_hook(lambda module, args, out: heard.extend(out[1]))
    twin.mid_block.register_forward_hook(lambda module, args, out: heard.append(out))
    with torch.inference_mode():
        twin(**words)
        *skips, middle = [layer(skip) for layer, skip in zip(control.skips, heard, strict=True)]
        added = {"down_block_additional_residuals": tuple(skips), "mid_block_additional_residual": middle}
        base = load_unet(FOLDER, torch.float32)
        expected = base(**words, **added)[0]
        assert torch.equal(unet(**inputs(unet))[0], expected)


def test_texts_that_were_projected_before_give_the_same() -> None:
    whole, modules = controlled(), load_text_modules(FOLDER, torch.float32)
    unet, words = controlled(unet=load_projected_unet(FOLDER, torch.float32)), inputs(whole)
    rows = words["encoder_hidden_states"]
    with torch.inference_mode():
        expected = whole(**words)[0]
        text, pooled = modules["encoder_hid_proj"](rows), modules["add_embedding"](rows)
        found = unet(**{**words, "encoder_hidden_states": text, "added_cond_kwargs": {"pooled": pooled}})[0]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_bf16"])
def test_every_new_part_gets_gradients_and_nothing_of_the_base_does(optimizer: str) -> None:
    base = load_unet(FOLDER, torch.bfloat16)
    frozen = {name for name, _ in base.named_parameters()}
    unet = controlled(unet=base, optimizer=optimizer, mixed_precision="bf16")
    words = inputs(unet)
    for name in ("sample", "encoder_hidden_states"):
        words[name] = words[name].bfloat16()
    with autocast(torch.device("cpu"), "bf16"):
        unet(**words)[0].float().square().mean().backward()
    trained = trainable(unet)
    assert {name.split(".")[1] for name in trained} == {"encoder", "hint", "skips"}
    assert all(param.grad is not None and param.grad.abs().max() > 0 for param in trained.values())
    assert {param.dtype for param in trained.values()} == {torch.float32 if optimizer == "adamw" else torch.bfloat16}
    assert all(param.grad is None for name, param in unet.named_parameters() if name in frozen)
    sizes = [param.numel() for name, param in unet.named_parameters() if name not in trained]
    assert sum(sizes) == sum(param.numel() for param in load_unet(FOLDER, torch.bfloat16).parameters()), "shared"


def test_recomputed_activations_change_no_gradient() -> None:
    found = []
    for again in (False, True):
        unet = controlled()
        if again:
            recompute_activations(unet)
        unet(**inputs(unet))[0].square().mean().backward()
        found.append({name: known(param.grad) for name, param in trainable(unet).items()})
    assert all(torch.equal(found[1][name], grad) for name, grad in found[0].items())


def test_what_comes_back_is_what_was_saved_also_after_recomputing(tmp_path: Path) -> None:
    unet = controlled()
    with torch.inference_mode(), frozen(unet):
        expected = unet(**inputs(unet))[0]
    recompute_activations(unet)
    save_control(unet, 1, FOLDER, tmp_path)
    before = (tmp_path / FILE).read_bytes()
    assert reload_control(unet, 1, FOLDER, tmp_path) == 0.0
    fresh = load_unet(FOLDER, torch.float32)
    control = load_control(fresh, tmp_path / FILE)
    with torch.inference_mode():
        assert torch.equal(fresh(**inputs(fresh))[0], expected)
    assert control.conditioning == "canny" and not trainable(fresh)
    save_control(fresh, 1, FOLDER, tmp_path)
    assert (tmp_path / FILE).read_bytes() == before


def test_stock_pipelines_make_the_picture_of_the_trainer_bit_for_bit(tmp_path: Path) -> None:
    """diffusers' own pipeline with the file loaded, against the UNet that was never saved; without guidance too."""
    unet = controlled(use_dora=True, controlnet_conditioning="low_res")
    save_control(unet, 1, FOLDER, tmp_path)
    pipeline = IFPipeline.from_pretrained(FOLDER, **NO_EXTRAS)
    for param in pipeline.unet.parameters():  # mapped tensors start anywhere in a file; products round accordingly
        param.data = param.data.clone()
    load_control(pipeline.unet, tmp_path / FILE)
    pipeline.scheduler = load_scheduler(FOLDER, variance_type="fixed_small")
    ours = stock_pipeline(FOLDER, 1, unet.requires_grad_(False), pipeline.scheduler)
    words = inputs(unet)
    text, picture = words["encoder_hidden_states"], words["cross_attention_kwargs"]["control_image"]

    def pictures(pipe: IFPipeline, guidance: float, follow: torch.Tensor) -> torch.Tensor:
        made = pipe(
            prompt_embeds=text, negative_prompt_embeds=text.flip(0), width=48, height=32, num_inference_steps=2,
            generator=torch.Generator().manual_seed(0), output_type="pt", guidance_scale=guidance,
            cross_attention_kwargs={"control_image": follow},
        )  # fmt: skip
        return torch.as_tensor(made.images)

    for guidance in (1.0, 5.0):
        expected = pictures(ours, guidance, picture)
        assert torch.equal(pictures(pipeline, guidance, picture), expected)
        assert (pictures(pipeline, guidance, picture.flip(0)) - expected).abs().max() > 0.01


def test_offloading_moves_the_model_before_its_control_is_asked() -> None:
    """accelerate's hooks, which diffusers' `enable_model_cpu_offload` uses, take the place of `forward`."""
    unet, order = controlled(), list[str]()

    class Offloaded(ModelHook):  # type: ignore[misc]
        def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            order.append("moved")
            return args, kwargs

    add_hook_to_module(unet, Offloaded())
    unet.control.register_forward_pre_hook(lambda module, args: order.append("asked"))
    with torch.inference_mode():
        unet(**inputs(unet))
    assert order == ["moved", "asked"]


def test_offloading_before_loading_is_refused(tmp_path: Path) -> None:
    save_control(controlled(), 1, FOLDER, tmp_path)
    unet = load_unet(FOLDER, torch.float32)
    add_hook_to_module(unet, ModelHook())
    with pytest.raises(ConfigError, match="Call load_control before enable_model_cpu_offload"):
        load_control(unet, tmp_path / FILE)


def test_a_second_file_takes_the_place_of_the_first_and_pictures_must_be_one_or_as_many_as_are_made(
    tmp_path: Path,
) -> None:
    unet = controlled()
    save_control(unet, 1, FOLDER, tmp_path)
    words, other = inputs(unet), controlled(moved=False)
    load_control(other, tmp_path / FILE)
    picture = words["cross_attention_kwargs"]["control_image"]
    with torch.inference_mode(), frozen(unet):
        expected = unet(**words)[0]
        assert torch.equal(other(**words)[0], expected)
        one = {**words, "cross_attention_kwargs": {"control_image": picture[:1]}}
        both = {**words, "cross_attention_kwargs": {"control_image": picture[:1].repeat(2, 1, 1, 1)}}
        assert torch.equal(other(**one)[0], other(**both)[0])
        many = {**words, "cross_attention_kwargs": {"control_image": picture.repeat(2, 1, 1, 1)}}
        with pytest.raises(ValueError, match="control_image has 4 pictures, and the UNet's batch is 2"):
            other(**many)


def _without(state: dict[str, torch.Tensor]) -> None:
    del state["skips.0.weight"]


def _wider(state: dict[str, torch.Tensor]) -> None:
    state["hint.0.weight"] = torch.zeros(16, 4, 3, 3)


def _moved(state: dict[str, torch.Tensor]) -> None:
    state["skips.0.bias"] = state["skips.0.bias"] + 1e-6


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_without, r"skips.0.weight is absent in it, \(16, 16, 1, 1\) here"),
        (_wider, r"hint.0.weight is \(16, 4, 3, 3\) in it"),
        (_moved, "skips.0.bias has other values after reloading"),
    ],
)
def test_a_file_that_is_not_what_was_trained_is_caught(
    tmp_path: Path, damage: Callable[[dict[str, torch.Tensor]], None], says: str
) -> None:
    unet = controlled()
    save_control(unet, 1, FOLDER, tmp_path)
    state = load_file(tmp_path / FILE)
    with safe_open(tmp_path / FILE, "pt") as file:
        record = file.metadata()
    damage(state)
    save_file(state, tmp_path / FILE, record)
    with pytest.raises(ArtifactError, match=says):
        reload_control(unet, 1, FOLDER, tmp_path)


def test_files_of_other_kinds_are_named(tmp_path: Path) -> None:
    unet = controlled()
    unet.control.conditioning = "depth"
    save_control(unet, 1, FOLDER, tmp_path)
    with pytest.raises(ArtifactError, match="its conditioning is 'depth'"):
        load_control(load_unet(FOLDER, torch.float32), tmp_path / FILE)
    save_file({"x": torch.zeros(1)}, tmp_path / FILE, {"control": "[" * 100_000})
    with pytest.raises(ArtifactError, match=f"{FILE} cannot be read as a ControlNet-LoRA: it is nested too deeply"):
        load_control(load_unet(FOLDER, torch.float32), tmp_path / FILE)
    save_file({"x": torch.zeros(1)}, tmp_path / FILE)
    for damage in (lambda: None, lambda: (tmp_path / FILE).write_bytes(b"x" * 40), lambda: (tmp_path / FILE).unlink()):
        damage()
        with pytest.raises(ArtifactError, match=f"{FILE} cannot be read as a ControlNet-LoRA"):
            load_control(load_unet(FOLDER, torch.float32), tmp_path / FILE)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"model_flavour": "tiny-ii"}, "tiny-ii is a Stage II model. Put it into .stage1."),
        ({"use_bitfit": True}, "controlnet is True, without effect while use_bitfit is True"),
        ({"model_type": "full"}, "without effect while model_type is full"),
        ({"controlnet": False, "controlnet_conditioning": "low_res"}, "or set controlnet = True"),
        ({"lora_target_modules": ["to_q", "encoder_hid_proj"]}, "has 'encoder_hid_proj'; controlnet adapts a copy"),
        ({"lora_target_modules": ["conv_out"]}, "has 'conv_out'"),
        ({"controlnet_conditioning": "depth"}, "'canny', 'grayscale', 'low_res' or 'paired'"),
    ],
)
def test_settings_that_make_no_control_are_refused(keys: dict[str, Any], says: str) -> None:
    first = {"lora_rank": 16} if {"use_bitfit", "model_type"} & keys.keys() else {}
    with pytest.raises(ValueError, match=says):
        settings(**first, **keys)


def test_simpletuners_other_controlnet_keys_are_refused_with_the_reason_and_dropped_when_empty(
    small_run: SmallRun,
) -> None:
    path = small_run.folder / "flat.json"
    flat = {"model_type": "deepfloyd-lora", "model_flavour": "tiny-i", "workspace": str(path.parent / "flat"),
            "data_backend_config": str(path.parent / "data.json")}  # fmt: skip
    path.write_text(json.dumps({**flat, "controlnet": None, "controlnet_model_name_or_path": None}))
    assert not load_run(path).config.stage(1).controlnet
    path.write_text(json.dumps({**flat, "controlnet": True, "controlnet_model_name_or_path": "some/where"}))
    with pytest.raises(ConfigError, match="but a ControlNet-LoRA starts from the base model"):
        load_run(path)


def test_canny_without_scikit_image_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "deepfloyd_core.config.stage_method.missing_extra", lambda packages, extra: f"{packages} {extra}"
    )
    with pytest.raises(
        ValueError, match=r"controlnet_conditioning is 'canny' unless it is set, and .'skimage'. controlnet"
    ):
        settings()
    settings(controlnet_conditioning="low_res")


def test_conditionings_are_those_of_the_libraries() -> None:
    photo = np.ascontiguousarray(data.astronaut()[:128, 128:288])
    tensor = torch.from_numpy(photo).permute(2, 0, 1)[None] / 127.5 - 1
    luma = np.asarray(Image.fromarray(photo).convert("L"), np.float32) / 255
    gray = conditioning_picture("grayscale", tensor)
    assert gray.shape == (1, 3, 128, 160) and np.array_equal(gray[0, 2].numpy(), luma)
    edges = conditioning_picture("canny", tensor)[0].numpy()
    assert np.array_equal(edges[1], feature.canny(luma, 1.0)) and 0.02 < edges.mean() < 0.3
    small = (
        Image.fromarray(photo).resize((40, 32), Image.Resampling.BICUBIC).resize((160, 128), Image.Resampling.BILINEAR)
    )
    found = conditioning_picture("low_res", tensor)[0].permute(1, 2, 0).numpy() * 255
    assert np.abs(found - np.asarray(small, np.float32)).max() < 3, "Pillow rounds to 8 bits twice"


TWO_PICTURES = ("num_eval_images=2", "num_validation_images=2")  # each follows its own


@pytest.fixture(scope="module")
def world(
    tmp_path_factory: pytest.TempPathFactory,
    new_small_run: Callable[[Path], SmallRun],
    new_world: Callable[[Path], DataWorld],
) -> tuple[Path, dict[str, Artifact], SmallRun]:
    """A small run file and everything that training needs."""
    small = new_small_run(tmp_path_factory.mktemp("control") / "run")
    run = load_run(small.config, TWO_PICTURES)
    return small.config, prepared(run, new_world(run.workspace)), small


def with_control(config: Path, workspace: Path, *more: str) -> Run:
    keys = (*KEYS, "max_train_steps=3", "validation_step_interval=3", "use_ema=false", *more)
    return load_run(config, (*TWO_PICTURES, f"workspace={workspace}", *(f"stage1.{key}" for key in keys)))


@pytest.fixture(scope="module")
def trained(
    world: tuple[Path, dict[str, Artifact], SmallRun], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Run, Artifact]:
    run = with_control(world[0], tmp_path_factory.mktemp("trained"))
    return run, train_stage(run, world[1], 1, run.workspace, how=run_here)


@pytest.mark.slow
def test_the_stock_pipeline_makes_the_pictures_of_the_trainer(
    world: tuple[Path, dict[str, Artifact], SmallRun], trained: tuple[Run, Artifact]
) -> None:
    """diffusers' pipeline, T5's own rows and Pillow's luma against the trainer's last validation."""
    lora = trained[1]
    assert lora.manifest.summary["reload_difference"] == 0.0
    pipeline = IFPipeline.from_pretrained(FOLDER, **NO_EXTRAS)
    pipeline.scheduler = load_scheduler(lora.path)
    pipeline.unet.to(memory_format=torch.channels_last)  # the trainer's order, which decides the last bits
    load_control(pipeline.unet, lora.path / FILE)
    texts = Embeds(world[1]["text_embeds"])
    held_out = [pair for file in shard_files(world[1]["eval_set"], 1)
                for pair in zip(open_shard(file), read_rows(file), strict=True)]  # fmt: skip
    number = 0
    for (width, height), group in groupby(held_out, lambda pair: (pair[1].width, pair[1].height)):
        part = list(group)
        files = [lora.path / "validation" / "step-00000003" / f"{number + k:03d}.png" for k in range(len(part))]
        said = [json.loads(Image.open(file).info["deepfloyd"]) for file in files]
        assert [one["prompt"] for one in said] == [row.caption for _, row in part]
        gray = np.stack([np.asarray(Image.fromarray(pixels).convert("L"), np.float32) / 255 for pixels, _ in part])
        made = pipeline(
            prompt_embeds=torch.stack([texts.of(row.caption) for _, row in part]),
            negative_prompt_embeds=torch.stack([texts.of("")] * len(part)),
            generator=[torch.Generator().manual_seed(one["seed"]) for one in said],
            width=width, height=height, num_inference_steps=2, guidance_scale=3.0, output_type="pt",
            cross_attention_kwargs={"control_image": torch.from_numpy(gray)[:, None].repeat(1, 3, 1, 1)},
        ).images  # fmt: skip
        found = ((made.permute(0, 2, 3, 1) / 2 + 0.5).clamp(0, 1) * 255).round().byte().numpy()
        expected = np.stack([np.asarray(Image.open(file)) for file in files])
        # The stored text was projected a caption at a time, this one several at once: bits of it may differ.
        assert np.abs(found.astype(int) - expected).max() <= 1 and np.mean(found != expected) < 1e-3
        number += len(part)
    assert number == 2


@pytest.mark.slow
def test_a_training_that_broke_off_ends_in_the_same_bytes(
    world: tuple[Path, dict[str, Artifact], SmallRun],
    trained: tuple[Run, Artifact],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = with_control(world[0], tmp_path, "checkpoint_step_interval=1", "gradient_checkpointing=true")
    steps = break_in_step(monkeypatch, 2)
    with pytest.raises(RuntimeError, match="broken"):
        train_stage(run, world[1], 1, tmp_path, how=run_here)
    lora = train_stage(run, world[1], 1, tmp_path, how=run_here)
    assert steps == [0, 1, 2, 2]
    assert lora.fingerprint == trained[1].fingerprint
    assert lora.hashes == trained[1].hashes


@pytest.mark.slow
def test_a_training_goes_on_from_a_control_and_survives_a_kill(
    world: tuple[Path, dict[str, Artifact], SmallRun],
    trained: tuple[Run, Artifact],
    tmp_path: Path,
) -> None:
    """Step 0 is the parent to the bit: each held-out loss, and each picture that it makes."""
    parent = trained[1]
    more = (f"init_lora={parent.path}", "checkpoint_step_interval=1")
    whole = train_stage(
        with_control(world[0], tmp_path / "whole", *more), world[1], 1, tmp_path / "whole", how=run_here
    )
    assert whole.manifest.inputs["parent"] == parent.hashes[FILE]
    assert whole.manifest.summary["eval_loss_parent"] == parent.manifest.summary["eval_loss"]
    assert (
        whole.manifest.summary["eval_loss_base"]
        == parent.manifest.summary["eval_loss_base"]
        != parent.manifest.summary["eval_loss"]
    )

    def losses(lora: Artifact, step: int) -> list[tuple[Any, ...]]:
        table = pq.read_table(lora.path / "validation.parquet").to_pylist()
        asked = [row for row in table if (row["model"], row["step"]) == ("trained", step)]
        return [(row["part"], row["image_id"], row["t"], row["loss"]) for row in asked]

    assert losses(whole, 0) == losses(parent, 3) != losses(whole, 3) and losses(whole, 0)
    for name in ("000.png", "001.png"):
        before = np.asarray(Image.open(parent.path / "validation" / "step-00000003" / name))
        assert np.array_equal(np.asarray(Image.open(whole.path / "validation" / "step-00000000" / name)), before)
    state, child = load_file(parent.path / FILE), load_file(whole.path / FILE)
    assert state.keys() == child.keys() and not all(torch.equal(state[name], child[name]) for name in state)

    run = with_control(world[0], tmp_path / "killed", *more)
    train_and_kill(run, world[1], 1, tmp_path / "killed", after_steps=2)
    lora = train_stage(run, world[1], 1, tmp_path / "killed", how=run_here)
    assert lora.manifest.summary["steps_of_this_process"] < 3
    assert lora.hashes == whole.hashes


@pytest.mark.slow
def test_a_run_ends_in_a_version_that_follows_a_picture(
    server: str, tmp_path: Path, new_small_run: Callable[[Path], SmallRun]
) -> None:
    """Through the command line: run, the card's own code, generate with and without a picture."""
    run = new_small_run(tmp_path / "run")
    keys = [f"--set=stage1.{key}" for key in (*KEYS, "max_train_steps=4")]
    done = run.call_here("run", str(run.config), *keys)
    assert done.returncode == 0, done.stderr
    (bundle,) = (run.workspace / "lora_bundle").iterdir()
    assert {path.name for path in (bundle / "stage1").iterdir()} == {FILE, "scheduler", "validation.parquet"}
    (samples,) = (run.workspace / "cascade_samples").iterdir()
    summary = json.loads((samples / "manifest.json").read_text())["summary"]
    assert 0 < summary["control_error_tuned"] < 1 and 0 < summary["control_error_base"] < 1
    names = run_card(bundle)
    assert names["conditioning"].shape == (1, 3, 64, 64) and hasattr(names["stage1"].unet, "control")
    assert "# in [0, 1]: its brightness in all three channels" in (bundle / "README.md").read_text()

    follow = tmp_path / "follow.jpg"
    Image.fromarray(data.astronaut()).save(follow)
    command = ["generate", str(run.config), "--prompt", "a purple star", *keys]

    assert generated(run, "--control", str(follow), *keys) != generated(run, "--version", "base", *keys)
    shown = next((run.workspace / "generated").glob("*/conditioning-*.png"))
    with Image.open(shown) as picture:
        assert picture.size == (64, 64)
        luma = Image.fromarray(data.astronaut()).resize((64, 64), Image.Resampling.LANCZOS).convert("L")
        assert np.abs(np.asarray(picture, int)[..., 0] - np.asarray(luma, int)).mean() < 3, "JPEG"
    refused = {
        (): "is a ControlNet: give its conditioning picture with --control",
        ("--version", "base", "--control", str(follow)): "is no ControlNet and takes no conditioning picture",
        ("--control", str(tmp_path / "none.png")): "none.png cannot be read",
        ("--control", str(run.config)): "run.toml cannot be read",
    }
    for more, says in refused.items():
        failed = run.call_here(*command, *more)
        assert failed.returncode == 2 and says in " ".join(failed.stderr.split()), failed.stderr
