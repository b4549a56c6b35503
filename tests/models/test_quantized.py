"""A frozen base in 8 or 4 bits: its weights are the formulas', and training beside it is that beside the rounded weights."""

import copy
import gc
import math
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist
from typing import Any, cast

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from data_world import DataWorld
from diffusers import IFPipeline, UNet2DConditionModel
from narrowing import known
from safetensors.torch import load_file, save_file
from small_run import SmallRun
from training_parts import FOLDERS, break_in_step, prepared, run_here, train_stage

from deepfloyd_core.adapters.bitfit import free_biases, load_biases, reload_biases, save_biases
from deepfloyd_core.adapters.controlnet import add_control, load_control, reload_control, save_control
from deepfloyd_core.adapters.files import BITFIT_FILE, CONTROL_FILE, LORA_FILE
from deepfloyd_core.adapters.lora import add_lora, lora_state, reload_saved, save_lora, trainable
from deepfloyd_core.config.run import Run
from deepfloyd_core.config.stage import StageConfig
from deepfloyd_core.config.stage_method import BasePrecision
from deepfloyd_core.config.stages import Stage
from deepfloyd_core.errors import ConfigError, ModelError
from deepfloyd_core.models.quantized import (
    Quantized,
    code_pairs,
    frozen_bytes,
    frozen_numbers,
    load_base,
    quantize_layer,
)
from deepfloyd_core.models.unet import DTYPES, autocast, load_projected_unet, load_unet, trained_scheduler
from deepfloyd_core.preflight.load import load_run
from deepfloyd_core.store.artifacts import Artifact
from deepfloyd_core.training.identity import lora_request
from deepfloyd_core.training.jobs import TrainingInputs
from deepfloyd_core.training.recompute import recompute_activations

CPU = torch.device("cpu")
Load = Callable[[Path, torch.dtype], UNet2DConditionModel]
WHOLE = ("conv_in", "conv_out", "time_embedding", "class_embedding", "encoder_hid_proj", "add_embedding")
KINDS: tuple[BasePrecision, ...] = ("int8", "nf4")


def settings(stage: Stage = 1, **keys: Any) -> StageConfig:
    first: dict[str, Any] = {"model_flavour": f"tiny-{'i' * stage}", "mixed_precision": "no"}
    if "use_bitfit" not in keys:
        first["lora_rank"] = 4
    return StageConfig.model_validate({**first, **keys})


def small(kind: BasePrecision, stage: Stage = 1, load: Load = load_unet, precision: str = "no") -> UNet2DConditionModel:
    return load_base(FOLDERS[stage], load is load_projected_unet, DTYPES[precision], kind, CPU)


def rounded(
    kind: BasePrecision, stage: Stage = 1, load: Load = load_unet, precision: str = "no"
) -> UNet2DConditionModel:
    """A plain UNet with the weights that a quantised one computes with."""
    unet = load(FOLDERS[stage], DTYPES[precision])
    for name, layer in small(kind, stage, load, precision).named_modules():
        if isinstance(layer, Quantized):
            unet.get_submodule(name).weight.data.copy_(layer.weight)
    return unet


def moved(unet: UNet2DConditionModel, by: float = 0.03) -> UNet2DConditionModel:
    """What is trained is moved, as training does."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _, param in sorted(trainable(unet).items()):
            param.add_(by * torch.randn(param.shape, generator=generator).to(param.dtype))
    return unet


def words(unet: UNet2DConditionModel, edge: int = 16) -> dict[str, Any]:
    generator, stage2 = torch.Generator().manual_seed(4), bool(unet.config.class_embed_type)
    return {
        "sample": torch.randn((2, unet.config.in_channels, edge, edge), generator=generator).to(unet.dtype),
        "timestep": torch.tensor([100, 700]),
        "encoder_hidden_states": torch.randn((2, 77, unet.config.encoder_hid_dim), generator=generator).to(unet.dtype),
        "class_labels": torch.tensor([20, 250]) if stage2 else None,
    }


def loss_of(unet: UNet2DConditionModel, precision: str = "no") -> torch.Tensor:
    torch.manual_seed(5)  # of the dropout
    with autocast(CPU, precision):
        return torch.as_tensor(unet.train()(**words(unet))[0]).float().square().mean()


def gradients(unet: UNet2DConditionModel, precision: str = "no") -> tuple[float, dict[str, torch.Tensor]]:
    loss = loss_of(unet, precision)
    loss.backward()
    return loss.item(), {name: param.grad for name, param in unet.named_parameters() if param.grad is not None}


Layer = torch.nn.Linear | torch.nn.Conv2d


def layer_of(plain: Layer, kind: BasePrecision) -> Layer:
    layer = copy.deepcopy(plain).requires_grad_(False)
    quantize_layer(layer, code_pairs(layer.weight.dtype, CPU) if kind == "nf4" else None)
    return layer


# ---- the numbers -----------------------------------------------------------------------------------------------------

with torch.random.fork_rng():
    torch.manual_seed(3)  # a weight halfway between two codes would be either, by the last bit
    SHAPES = [torch.nn.Linear(33, 7), torch.nn.Linear(64, 64), torch.nn.Conv2d(3, 5, 3), torch.nn.Conv2d(1, 1, 1)]


def as_bf16(values: np.ndarray) -> np.ndarray:
    """fp32 numbers rounded to bf16, to the nearest and ties to even."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)


def eight_bits(weight: np.ndarray) -> np.ndarray:
    rows = weight.reshape(len(weight), -1)
    scale = np.abs(rows).max(1, keepdims=True) / np.float32(127)
    whole = np.round(np.divide(rows, scale, out=np.zeros_like(rows), where=scale > 0))
    assert np.abs(whole).max() <= 127
    return np.reshape(whole * scale, weight.shape)


def normal_float() -> np.ndarray:
    """QLoRA, appendix E: quantiles of N(0, 1) at equal steps of probability, eight on one side and seven on the other."""
    offset, ppf = 0.9677083, NormalDist().inv_cdf
    above = [ppf(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    below = [-ppf(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    values = np.array(sorted([*above, *below, 0.0]))
    return np.asarray(values / values.max())


def four_bits(weight: np.ndarray) -> np.ndarray:
    flat = weight.reshape(-1)
    blocks = np.pad(flat, (0, -flat.size % 64)).reshape(-1, 64)
    scale = as_bf16(np.abs(blocks).max(1, keepdims=True))
    parts = np.divide(blocks, scale, out=np.zeros_like(blocks), where=scale > 0)
    codes = normal_float()
    nearest = codes[np.abs(parts[..., None] - codes).argmin(-1)]
    return np.reshape((nearest * scale).reshape(-1)[: flat.size], weight.shape)


@pytest.mark.parametrize(("kind", "formula", "exactly"), [("int8", eight_bits, 0.0), ("nf4", four_bits, 1e-6)])
@pytest.mark.parametrize("plain", SHAPES, ids=str)
def test_a_weight_is_what_the_formula_makes_of_it(
    kind: BasePrecision, formula: Callable[[np.ndarray], np.ndarray], exactly: float, plain: Layer
) -> None:
    layer = copy.deepcopy(plain)
    with torch.no_grad():
        layer.weight[-1] *= 1000 if len(layer.weight) > 1 else 0  # scales differ; a weight of zeros stays one
        layer.weight[0] *= 1e-3
    expected = formula(layer.weight.detach().numpy())
    found = layer_of(layer, kind).weight
    assert found.dtype == torch.float32 and found.shape == layer.weight.shape
    np.testing.assert_allclose(found.numpy(), expected, rtol=exactly, atol=exactly * np.abs(expected).max() / 1000)


@pytest.mark.parametrize("kind", KINDS)
def test_in_bf16_it_is_rounded_no_more_than_bf16_is(kind: BasePrecision) -> None:
    plain = torch.nn.Conv2d(32, 16, 3).to(torch.bfloat16)
    wide = layer_of(copy.deepcopy(plain).float(), kind).weight
    found = layer_of(plain, kind).weight
    assert found.dtype == torch.bfloat16
    assert (found.float() - wide).norm() / wide.norm() < (2e-3 if kind == "int8" else 4e-3)


def test_a_row_of_zeros_stays_one_and_nothing_hides_a_broken_weight() -> None:
    for kind in KINDS:
        plain = torch.nn.Linear(64, 3)
        with torch.no_grad():
            plain.weight[1] = 0
            plain.weight[2, 5] = math.nan
        layer = layer_of(plain, kind)
        assert isinstance(layer, Quantized)
        weight, scales = layer.weight, layer.scales.view(torch.float32 if kind == "int8" else torch.bfloat16)
        assert not (scales == 0).any(), "what a division by zero becomes as a whole number differs between machines"
        assert weight[0].isfinite().all() and torch.equal(weight[1], torch.zeros(64)) and weight[2].isnan().any()


# ---- layers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("plain", "shape"),
    [
        (torch.nn.Linear(96, 64), (2, 77, 96)),
        (torch.nn.Linear(96, 64, bias=False), (5, 96)),
        (torch.nn.Linear(5, 3), (4, 5)),
        (torch.nn.Conv2d(64, 32, 3, padding=1), (2, 64, 16, 16)),
        (torch.nn.Conv2d(64, 32, 3, padding=1, stride=2), (2, 64, 17, 15)),
        (torch.nn.Conv2d(64, 32, 1, bias=False), (1, 64, 16, 16)),
        (torch.nn.Conv2d(5, 7, (3, 1), padding=(2, 0), dilation=2), (2, 5, 16, 16)),
        (torch.nn.Conv2d(8, 12, 3, groups=4), (2, 8, 16, 16)),
    ],
    ids=str,
)
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_outputs_and_gradients_are_those_of_a_layer_with_the_rounded_weight(
    kind: BasePrecision, plain: Layer, shape: tuple[int, ...], order: torch.memory_format
) -> None:
    """Bit for bit, in any order of memory; the sum that is a bias's gradient is rounded otherwise."""
    layer, twin = layer_of(plain, kind), copy.deepcopy(plain).requires_grad_(False)
    twin.weight.copy_(layer.weight)
    found = []
    for module in (layer, twin):
        torch.manual_seed(0)
        x = torch.randn(shape)
        x = (x.contiguous(memory_format=order) if x.ndim == 4 else x).requires_grad_()
        if module.bias is not None:
            module.bias.requires_grad_(True)
        out = module(x)
        out.backward(torch.randn(out.shape))
        found.append((out, x.grad))
    assert all(torch.equal(ours, expected) for ours, expected in zip(*found, strict=True))
    if plain.bias is not None:
        torch.testing.assert_close(known(layer.bias).grad, known(twin.bias).grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("plain", [torch.nn.Linear(8, 4), torch.nn.Conv2d(8, 4, 3)], ids=str)
def test_autocast_holds_for_them_as_for_others(plain: Layer) -> None:
    """An fp32 input, as a norm gives it on a GPU, beside weights in bf16 and, with BitFit, a bias in fp32."""
    layer = layer_of(copy.deepcopy(plain).to(torch.bfloat16), "int8")
    twin = copy.deepcopy(plain).to(torch.bfloat16).requires_grad_(False)
    twin.weight.copy_(layer.weight)
    found = []
    for module in (layer, twin):
        bias = known(module.bias)
        bias.data = known(plain.bias).detach().clone()
        bias.requires_grad_(True)
        torch.manual_seed(0)
        x = torch.randn((2, 8) if plain.weight.ndim == 2 else (2, 8, 5, 5), requires_grad=True)
        with autocast(CPU, "bf16"):
            out = module(x)
        out.float().square().mean().backward()
        found.append((out, x.grad))
        assert known(bias.grad).dtype == torch.float32
    assert out.dtype == torch.bfloat16 and all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_peft_and_copies_see_ordinary_layers(kind: BasePrecision) -> None:
    layer = layer_of(torch.nn.Conv2d(8, 4, 3, padding=1), kind)
    assert isinstance(layer, torch.nn.Conv2d)
    made = type(layer)(8, 2, 3, bias=False)  # as peft makes the first half of an adapter
    assert type(made) is torch.nn.Conv2d and made.weight.requires_grad
    twin = copy.deepcopy(layer)
    assert type(twin) is type(layer) and torch.equal(twin.weight, layer.weight)


# ---- a UNet ----------------------------------------------------------------------------------------------------------


def expected_bytes(stage: Stage, kind: BasePrecision) -> tuple[int, int]:
    """Counted from the file alone: how many weights there are, and what they take in fp32 beside the small ones."""
    tensors = load_file(FOLDERS[stage] / "unet" / "diffusion_pytorch_model.safetensors")
    held = 256 * 8 if kind == "nf4" else 0  # a table of pairs of codes, for all layers
    for name, tensor in tensors.items():
        if not name.endswith(".weight") or tensor.ndim < 2 or name.split(".")[0] in WHOLE:
            held += 4 * tensor.numel()
        elif kind == "int8":
            held += tensor.numel() + 4 * len(tensor)
        else:
            blocks = -(-tensor.numel() // 64)
            held += 32 * blocks + 2 * blocks
    return sum(tensor.numel() for tensor in tensors.values()), held


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_a_unet_holds_the_small_weights_and_no_others(
    kind: BasePrecision, stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(
            "diffusers.ModelMixin.from_pretrained", lambda *_, **__: pytest.fail("the whole UNet is loaded")
        )
        unet = small(kind, stage)
    assert not unet.training and not trainable(unet)
    numbers, held = expected_bytes(stage, kind)
    assert frozen_numbers(unet) == numbers and frozen_bytes(unet) == held
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in unet.state_dict().values()}
    assert sum(storages.values()) == held
    assert held < 4 * numbers * (0.33 if kind == "int8" else 0.22)  # the tiny one's text modules are a tenth of it
    plain = load_unet(FOLDERS[stage], torch.float32)
    assert frozen_numbers(plain) == numbers and frozen_bytes(plain) == 4 * numbers


def test_a_folder_that_lacks_a_weight_is_refused(tmp_path: Path) -> None:
    shutil.copytree(FOLDERS[1] / "unet", tmp_path / "unet")
    file = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["mid_block.resnets.0.conv1.weight"]
    save_file(tensors, file)
    with pytest.raises(ModelError, match=r"lacks the weights mid_block\.resnets\.0\.conv1\.weight"):
        load_base(tmp_path, True, torch.float32, "int8", CPU)


CONVOLUTIONS = {"lora_target_modules": ["to_q", "conv1", "conv2"]}
WAYS: list[dict[str, Any]] = [
    {"lora_init_type": "gaussian"},
    {"lora_dropout": 0.3, **CONVOLUTIONS},
    {"use_dora": True, **CONVOLUTIONS},
    {"use_dora": True, "lora_dropout": 0.3, **CONVOLUTIONS},
]


# DoRA measures the rows of whole weights, which takes seconds.
PAIRED_WAYS = [
    pytest.param(kind, keys, marks=[pytest.mark.slow] if keys.get("use_dora") else [])
    for kind, keys in zip(KINDS * 2, WAYS, strict=True)
]


@pytest.mark.parametrize(("kind", "keys"), PAIRED_WAYS, ids=str)
def test_adapters_start_and_learn_as_beside_the_rounded_weights(kind: BasePrecision, keys: dict[str, Any]) -> None:
    """Bit for bit, through the whole UNet; recomputed or not."""
    unets = rounded(kind), small(kind), small(kind)
    for unet in unets:
        add_lora(unet, settings(**keys), 3)
    starts = [lora_state(unet) for unet in unets]
    assert all(torch.equal(tensor, starts[1][name]) for name, tensor in starts[0].items())
    recompute_activations(unets[2])
    expected, *found = (gradients(moved(unet)) for unet in unets)
    assert len(expected[1]) == len(starts[0]) and all(grad.abs().max() > 0 for grad in expected[1].values())
    for loss, grads in found:
        assert loss == expected[0] and grads.keys() == expected[1].keys()
        assert all(torch.equal(grad, expected[1][name]) for name, grad in grads.items())


@pytest.mark.parametrize(("stage", "kind"), [(1, "int8"), (2, "nf4")])
def test_in_bf16_too(stage: Stage, kind: BasePrecision) -> None:
    found = []
    for make in (small, rounded):
        unet = make(kind, stage, precision="bf16")
        add_lora(unet, settings(stage, mixed_precision="bf16"), 3)
        found.append(gradients(moved(unet), "bf16"))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(grad, found[1][1][name]) for name, grad in found[0][1].items())


@pytest.mark.parametrize(("kind", "keys"), [("nf4", WAYS[1]), ("int8", WAYS[2])], ids=str)
def test_no_whole_weight_waits_for_the_backward_pass(
    kind: BasePrecision, keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    unet, plain = small(kind), load_unet(FOLDERS[1], torch.float32)
    made: list[weakref.ref[torch.Tensor]] = []
    whole = cast(property, Quantized.weight).fget
    assert whole is not None

    def watched(layer: Quantized) -> torch.Tensor:
        weight: torch.Tensor = whole(layer)
        made.append(weakref.ref(weight))
        return weight

    monkeypatch.setattr(Quantized, "weight", property(watched))
    held = {}
    for name, model in (("small", unet), ("plain", plain)):
        add_lora(model, settings(**keys), 3)
        own = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
        kept: dict[int, int] = {}

        def pack(tensor: torch.Tensor, kept: dict[int, int] = kept) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        made.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = loss_of(model)
        gc.collect()
        assert not [ref for ref in made if ref() is not None]
        assert bool(made) == (name == "small")
        held[name] = sum(size for place, size in kept.items() if place not in own)
        loss.backward()
    assert held["small"] < held["plain"], "nor are the inputs of convolutions held, which torch keeps for nothing"


@pytest.mark.parametrize("kind", KINDS)
def test_moving_and_casting_a_unet_leaves_its_small_weights(kind: BasePrecision) -> None:
    unet = small(kind)
    before = {name: layer.weight for name, layer in unet.named_modules() if isinstance(layer, Quantized)}
    held = frozen_bytes(unet)
    changes: tuple[Callable[[], object], ...] = (
        lambda: unet.to(memory_format=torch.channels_last),
        lambda: unet.to(CPU),
        lambda: unet.half().float(),
    )
    for change in changes:
        change()
        assert frozen_bytes(unet) == held
        for name, weight in before.items():
            assert torch.equal(unet.get_submodule(name).weight, weight)


# ---- what is saved ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "kind", "keys"), [(1, "int8", WAYS[1]), (1, "nf4", WAYS[2]), (2, "int8", WAYS[2]), (2, "nf4", {})]
)
def test_the_file_comes_back_in_place_and_is_removed_again(
    tmp_path: Path, stage: Stage, kind: BasePrecision, keys: dict[str, Any]
) -> None:
    unet = small(kind, stage, load_projected_unet)
    names, held = set(unet.state_dict()), frozen_bytes(unet)
    add_lora(unet, settings(stage, **keys), 3)
    moved(unet)
    save_lora(unet, stage, FOLDERS[stage], tmp_path)
    trained_scheduler(FOLDERS[stage], False).save_pretrained(tmp_path / "scheduler")
    assert not [name for name in load_file(tmp_path / LORA_FILE) if "values" in name or "scales" in name]
    assert reload_saved(unet, stage, FOLDERS[stage], tmp_path) == 0.0
    unet.unload_lora()
    assert set(unet.state_dict()) == names and frozen_bytes(unet) == held


@pytest.mark.parametrize("kind", KINDS)
def test_a_control_shares_the_small_weights_wherever_they_move(tmp_path: Path, kind: BasePrecision) -> None:
    config = settings(controlnet=True, controlnet_conditioning="grayscale", lora_target_modules=["to_q", "conv1"])
    unet, twin = small(kind), rounded(kind)
    numbers, held, found = frozen_numbers(unet), frozen_bytes(unet), []
    for made in (unet, twin):
        add_control(made, config, 7)
        moved(made)
        made._apply(lambda tensor: tensor.clone())  # as `.to` does it for another device
        torch.manual_seed(8)
        picture = torch.rand((2, 3, 16, 16))
        loss = made.train()(**words(made), cross_attention_kwargs={"control_image": picture})[0].square().mean()
        loss.backward()
        found.append((loss, {name: known(param.grad) for name, param in trainable(made).items()}))
    assert frozen_numbers(unet) == numbers and frozen_bytes(unet) == held
    assert torch.equal(found[0][0], found[1][0]) and len(found[0][1]) > 20
    assert all(torch.equal(grad, found[1][1][name]) for name, grad in found[0][1].items())
    save_control(unet, 1, FOLDERS[1], tmp_path)
    assert reload_control(unet, 1, FOLDERS[1], tmp_path) == 0.0
    load_control(load_unet(FOLDERS[1], torch.float32), tmp_path / CONTROL_FILE)


@pytest.mark.parametrize(("kind", "precision"), [("int8", "no"), ("nf4", "bf16")])
def test_biases_can_be_trained_beside_small_weights(tmp_path: Path, kind: BasePrecision, precision: str) -> None:
    found, unets = [], [small(kind, precision=precision), rounded(kind, precision=precision)]
    for unet in unets:
        free_biases(unet, settings(use_bitfit=True, mixed_precision=precision), 0)
        found.append(gradients(moved(unet, 0.01), precision))
    assert found[0][0] == found[1][0] and found[0][1].keys() == found[1][1].keys()
    for name, grad in found[0][1].items():
        error = (grad - found[1][1][name]).norm() / grad.norm()
        assert error < (1e-5 if precision == "no" else 1e-2), name
    save_biases(unets[0], 1, FOLDERS[1], tmp_path)
    assert reload_biases(unets[0], 1, FOLDERS[1], tmp_path) < 1e-6
    load_biases(load_unet(FOLDERS[1], torch.float32), tmp_path / BITFIT_FILE)


# ---- a training ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(
    tmp_path_factory: pytest.TempPathFactory,
    new_small_run: Callable[[Path], SmallRun],
    new_world: Callable[[Path], DataWorld],
) -> tuple[Path, dict[str, Artifact]]:
    """A run file of Stage I, and everything that its training needs."""
    small_run = new_small_run(tmp_path_factory.mktemp("quantized") / "run")
    run = load_run(small_run.config)
    return small_run.config, prepared(run, new_world(run.workspace))


def configured(file: Path, precision: str, *more: str) -> Run:
    keys = (
        "validation_step_interval=0",
        "max_train_steps=6",
        "train_batch_size=1",
        f"base_model_precision={precision}",
        *more,
    )
    return load_run(file, tuple(f"stage1.{key}" for key in keys))


def losses(lora: Artifact) -> np.ndarray:
    return np.array(pq.read_table(lora.path / "metrics.parquet")["loss"])


@pytest.fixture(scope="module")
def loras(world: tuple[Path, dict[str, Artifact]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    file, made = world
    out = tmp_path_factory.mktemp("loras")
    return {kind: train_stage(configured(file, kind), made, 1, out, how=run_here) for kind in ("no_change", *KINDS)}


@pytest.mark.slow
def test_it_learns_as_the_whole_weights_do(loras: dict[str, Artifact]) -> None:
    plain = loras["no_change"]
    for kind, base, error, gain in (("int8", 0.02, 3e-4, 0.1), ("nf4", 0.5, 8e-3, 0.4)):
        lora = loras[kind]
        assert 0 < lora.manifest.summary["eval_loss_base"] / plain.manifest.summary["eval_loss_base"] - 1 < base
        assert 0 < np.abs(losses(lora) - losses(plain)).max() < error
        assert abs(lora.manifest.summary["eval_gain"][0] / plain.manifest.summary["eval_gain"][0] - 1) < gain
        assert lora.manifest.summary["eval_gain"][0] > 3e-4  # at t = 400, where the loss is 0.017
        assert lora.manifest.summary["reload_difference"] == 0.0
        assert lora.manifest.summary["frozen_parameters"] == plain.manifest.summary["frozen_parameters"]
        assert lora.manifest.summary["frozen_bytes"] < plain.manifest.summary["frozen_bytes"] / (
            3.5 if kind == "int8" else 6
        )
        assert lora.hashes[LORA_FILE] != plain.hashes[LORA_FILE]


def test_the_product_is_a_lora_of_the_whole_weights(loras: dict[str, Artifact]) -> None:
    absent = dict.fromkeys(("safety_checker", "feature_extractor", "watermarker"))
    for kind in KINDS:
        pipeline = IFPipeline.from_pretrained(FOLDERS[1], **absent, requires_safety_checker=False)
        pipeline.load_lora_weights(loras[kind].path)
        loaded = [value for name, value in pipeline.unet.state_dict().items() if "lora_" in name]
        file = load_file(loras[kind].path / LORA_FILE)
        assert len(loaded) == len(file) and file.keys() == load_file(loras["no_change"].path / LORA_FILE).keys()
        assert sum(value.double().abs().sum() for value in loaded) == sum(v.double().abs().sum() for v in file.values())


@pytest.mark.parametrize("kind", [pytest.param("int8", marks=pytest.mark.slow), "nf4"])
def test_a_training_that_goes_on_from_a_checkpoint_has_the_bytes_of_an_unbroken_one(
    world: tuple[Path, dict[str, Artifact]],
    loras: dict[str, Artifact],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: BasePrecision,
) -> None:
    """Recomputing its activations from there on, which changes no byte either."""
    file, made = world
    break_in_step(monkeypatch, 5)
    with pytest.raises(RuntimeError, match="broken"):
        train_stage(configured(file, kind), made, 1, tmp_path, how=run_here)
    lora = train_stage(configured(file, kind, "gradient_checkpointing=true"), made, 1, tmp_path, how=run_here)
    assert lora.manifest.summary["steps_of_this_process"] == 6 - 4
    assert lora.hashes == loras[kind].hashes and lora.fingerprint == loras[kind].fingerprint


def test_it_is_part_of_the_identity(world: tuple[Path, dict[str, Artifact]]) -> None:
    file, made = world
    inputs = TrainingInputs(pixels=made["stage1_pixels"], text=made["text_embeds"], eval_set=made["eval_set"])
    plain, eight, four = (lora_request(configured(file, kind), 1, FOLDERS[1], inputs) for kind in ("no_change", *KINDS))
    assert [request.spec["base_model_precision"] for request in (plain, eight, four)] == ["no_change", *KINDS]
    assert len({plain.fingerprint, eight.fingerprint, four.fingerprint}) == 3


# ---- settings --------------------------------------------------------------------------------------------------------


def test_simpletuners_name_of_the_same_is_taken_and_others_are_refused_with_the_nearest(small_run: SmallRun) -> None:
    def load(value: str, key: str = "base_model_precision") -> tuple[BasePrecision, ...]:
        config = load_run(small_run.config, (f"{key}={value}",)).config
        return tuple(config.stage(stage).base_model_precision for stage in config.stages)

    assert load("int8-quanto") == ("int8", "int8")
    assert load("int8-quanto", "stage2.base_model_precision") == ("no_change", "int8")
    for value, nearest in (
        ("nf4-bnb", "nf4"), ("int4-quanto", "nf4"), ("int8-torchao", "int8"), ("fp8-quanto", "int8"),
        ("uint2-sdnq", "nf4"), ("int16-sdnq", "no_change"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=f"base_model_precision is '{value}'.*Set the nearest, {nearest}"):
            load(value)
    with pytest.raises(
        ConfigError, match=r"stage1\.base_model_precision is 'int7'; input should be 'no_change', 'int8' or"
    ):
        load("int7")


def test_a_full_training_of_small_weights_is_refused_before_anything_is_loaded(small_run: SmallRun) -> None:
    settings = ("model_type=full", "base_model_precision=nf4", "lora_rank=16", "lora_dropout=0.0")
    with pytest.raises(
        ConfigError, match=r"stage1.*base_model_precision is 'nf4', and model_type is 'full'.*Remove it"
    ):
        load_run(small_run.config, tuple(f"stage1.{key}" for key in settings))
