"""The forecast of memory: its weights are those of the model, its calls grow with what they hold, a GPU's batch fits."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

from deepfloyd_core.config.flavours import FLAVOURS, STAGE3_REPOS
from deepfloyd_core.config.run import Run
from deepfloyd_core.config.run_machine import Machine
from deepfloyd_core.config.stage3 import Stage3Config
from deepfloyd_core.errors import ModelError
from deepfloyd_core.models import random_stage3
from deepfloyd_core.models.headers import UNET_WEIGHTS
from deepfloyd_core.models.memory import Forecast, text_forecast, unet_forecast, vae_forecast
from deepfloyd_core.models.random_weights import UNETS
from deepfloyd_core.models.text_encoders import T5_XXL
from deepfloyd_core.models.unet import load_unet
from deepfloyd_core.sampling import forecasts
from deepfloyd_core.sampling.forecasts import pictures_at_once, stage3_forecast, texts_forecast
from deepfloyd_core.sampling.jobs import SampledStage
from deepfloyd_core.sampling.sampler import make_sampler, sample
from deepfloyd_core.sampling.stage3_jobs import Stage3
from deepfloyd_core.sampling.texts_jobs import TextsRequest

CPU, GPU = torch.device("cpu"), torch.device("cuda")
FP32 = torch.float32


def test_weights_are_those_of_the_model_and_calls_grow_with_what_they_hold(models: dict[Any, Path]) -> None:
    for stage, edge in ((1, 64), (2, 256)):
        one = unet_forecast(models[stage], (edge, edge), 2, FP32, GPU)
        assert one.weights == sum(param.nbytes for param in load_unet(models[stage], FP32).parameters())
        assert unet_forecast(models[stage], (edge, edge), 8, FP32, GPU).call == pytest.approx(4 * one.call, rel=0.02)
        half = unet_forecast(models[stage], (edge, edge), 2, torch.bfloat16, GPU)
        assert half.weights * 2 == one.weights and half.call == pytest.approx(one.call / 2, rel=0.02)
        wide = unet_forecast(models[stage], (2 * edge, edge), 2, FP32, GPU)
        assert 1.9 * one.call < wide.call < 2.6 * one.call
        assert unet_forecast(models[stage], (edge, edge), 2, FP32, CPU).call > one.call, "a CPU's kernels have buffers"


def test_a_call_holds_the_skips_and_the_block_that_runs(models: dict[Any, Path]) -> None:
    """Bounds by hand: not less than what the decoder needs of the encoder, not more than all that a call ever makes."""
    skips, made = 0, 0
    unet = load_unet(models[2], FP32)

    def add(_: Any, __: Any, out: Any) -> None:
        nonlocal made
        tensors = [one for one in tree_leaves(out) if isinstance(one, torch.Tensor)]
        made += sum(one.nbytes for one in tensors)

    def skip(_: Any, __: Any, out: Any) -> None:
        nonlocal skips
        skips += sum(one.nbytes for one in out[1])

    for module in unet.modules():
        if not list(module.children()):
            module.register_forward_hook(add)
    for block in unet.down_blocks:
        block.register_forward_hook(skip)
    text = torch.zeros(2, 77, unet.config.encoder_hid_dim)
    with torch.no_grad():
        unet(torch.zeros(2, 6, 256, 256), torch.zeros(2), text, class_labels=torch.zeros(2))
    assert skips < unet_forecast(models[2], (256, 256), 2, FP32, GPU).call < made


def test_fewer_pictures_at_once_are_the_same_up_to_rounding(run: Run, models: dict[Any, Path]) -> None:
    settings = run.config.stage(1).model_copy(update={"validation_num_inference_steps": 3})
    calls, made = list[int](), list[torch.Tensor]()
    for count in (None, 2):
        one = SampledStage(stage=1, settings=settings.model_copy(update={"sample_batch_size": count}), model=models[1])
        sampler = make_sampler(one, None, Machine(device="cpu"), lambda done: None)
        text = torch.randn(
            5, 77, sampler.pipeline.unet.config.encoder_hid_dim, generator=torch.Generator().manual_seed(0)
        )
        sampler.pipeline.unet.register_forward_pre_hook(lambda unet, args: calls.append(len(args[0])))
        made.append(sample(sampler, text, torch.zeros_like(text), [1, 2, 3, 4, 5], (64, 64)))
    assert calls == [10] * 3 + [4] * 6 + [2] * 3, "with guidance"
    assert torch.allclose(made[0], made[1], atol=1e-4)


def test_a_gpu_samples_as_many_at_once_as_fit(
    run: Run, models: dict[Any, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = SampledStage(stage=1, settings=run.config.stage(1), model=models[1])
    machine, free = Machine(device="cuda"), 0
    monkeypatch.setattr(forecasts, "pick_device", lambda name, gpu=0: torch.device(name))
    monkeypatch.setattr(forecasts, "free_bytes", lambda device: free if device.type == "cuda" else None)
    assert pictures_at_once(one, [(64, 64)], machine) == (16, None), "a small model is loaded before it is forecast"
    monkeypatch.setattr(forecasts, "SAID_FROM", 0)
    calls = {count: unet_forecast(models[1], (96, 64), 2 * count, FP32, GPU) for count in (16, 8, 4, 1)}
    for count, found in calls.items():
        free = int(found.total / 0.9) + 1
        assert pictures_at_once(one, [(64, 64), (96, 64)], machine) == (count, found)
    free = calls[1].weights + 1
    assert pictures_at_once(one, [(96, 64)], machine)[0] == 1, "it may be less than forecast"
    free = calls[1].weights - 1
    with pytest.raises(
        ModelError, match=r"weights of Stage I take 0.0 GB, and the GPU has 0.0 GB free\. End what else"
    ):
        pictures_at_once(one, [(96, 64)], machine)
    assert pictures_at_once(one, [(64, 64)], Machine(device="cpu"))[0] == 1
    free = 1 << 40
    assert pictures_at_once(one, [(64, 64)], machine, styled=True)[0] == 10, (
        "in another style a picture has three parts"
    )


# Of the table in docs/generate.md: what is sampled at once on a card of 12 GB, and GB of weights and of all, in bf16.
ON_12_GB = {"i-xlarge-4.3b": (64, 8, 8.6, 10.0), "ii-large-1.2b": (256, 2, 2.5, 4.2)}


def _written(folder: Path, configs: dict[str, Any], weights: str, size: int) -> Path:
    """A model's folder whose weights are a hole in a file. configs: by part."""
    for part, config in configs.items():
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(json.dumps(config))
    with (folder / weights).open("wb") as file:
        file.truncate(size)
    return folder


@pytest.fixture
def card_of_12_gb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecasts, "pick_device", lambda name, gpu=0: torch.device(name))
    monkeypatch.setattr(forecasts, "free_bytes", lambda device: 12_000_000_000)


@pytest.mark.usefixtures("card_of_12_gb")
@pytest.mark.parametrize("flavour", ON_12_GB)
def test_the_largest_unets_fit_on_12_gb_in_bf16(run: Run, tmp_path: Path, flavour: str) -> None:
    edge, count, weights, total = ON_12_GB[flavour]
    folder = _written(tmp_path / "m", {"unet": UNETS[flavour]}, f"unet/{UNET_WEIGHTS}", 2_000_000_000)
    stage = FLAVOURS[flavour].stage
    keys = {"mixed_precision": "bf16", "validation_guidance": 7.0}
    one = SampledStage(stage=stage, settings=run.config.stage(stage).model_copy(update=keys), model=folder)
    at_once, found = pictures_at_once(one, [(edge, edge)], Machine(device="cuda"))
    assert found is not None and found.total <= 0.9 * 12e9
    assert (at_once, round(found.weights / 1e9, 1), round(found.total / 1e9, 1)) == (count, weights, total)


@pytest.mark.usefixtures("card_of_12_gb")
def test_so_do_stage_iii_and_the_text_encoder_and_what_does_not_fit_is_refused(run: Run, tmp_path: Path) -> None:
    parts = {"unet": random_stage3.UNET, "vae": random_stage3.VAE, "text_encoder": random_stage3.TEXT}
    folder = _written(tmp_path / "x4", parts, f"unet/{UNET_WEIGHTS}", 1_000_000_000)
    settings = Stage3Config(model_flavour="x4-upscaler", mixed_precision="bf16")
    found = stage3_forecast(Stage3(settings=settings, model=folder), [(256, 256)], Machine(device="cuda"))
    assert found is not None and (round(found.weights / 1e9, 1), round(found.total / 1e9, 1)) == (1.8, 5.1)
    xxl = _written(tmp_path / "t5", {"text_encoder": T5_XXL}, "text_encoder/model.safetensors", 9_000_000_000)

    def forecast(dtype: str, streaming: bool = False) -> Forecast | None:
        keys = run.config.model_copy(update={"text_encoder_dtype": dtype})
        machine = Machine(device="cuda", text_encoder_streaming=streaming)
        return texts_forecast(
            TextsRequest(machine=machine, texts=("x",), keys=keys, encoder_name="t5", encoder=xxl, embeds=None)
        )

    assert forecast("bf16") == Forecast(2 * 4_762_310_656, 0), "9.5 GB, of 10.8 that may be used"
    with pytest.raises(ModelError, match=r"weights of T5 take 19.0 GB, and the GPU has 12.0 GB free.*streaming = true"):
        forecast("fp32")
    assert forecast("fp32", streaming=True) is None


def test_stage_iii_holds_its_three_models_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(STAGE3_REPOS["tiny-iii"])
    settings = Stage3Config(model_flavour="tiny-iii", mixed_precision="bf16")
    stage3, machine = Stage3(settings=settings, model=folder), Machine(device="cpu")
    assert stage3_forecast(stage3, [(64, 64)], machine) is None
    assert stage3_forecast(Stage3(), [(64, 64)], machine) is None
    monkeypatch.setattr(forecasts, "SAID_FROM", 0)
    found = stage3_forecast(stage3, [(64, 32), (300, 16)], machine)
    unet = unet_forecast(folder, (256, 32), 2, torch.bfloat16, CPU)
    decoded = vae_forecast(folder, (256, 32), CPU)
    text = text_forecast(folder, torch.bfloat16)
    assert found == Forecast(unet.weights + decoded.weights + text.weights, max(unet.call, decoded.call))
    assert str(found) == f"{found.total / 1e9:.1f} GB of memory"
