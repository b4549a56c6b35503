"""What the trainer feeds the UNets is what diffusers feeds them, bit for bit; the formulas agree with NumPy and Pillow."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from deepfloyd_core.batches import Batch, Draws
from deepfloyd_core.config import StageConfig
from deepfloyd_core.flavours import FLAVOURS
from deepfloyd_core.models import load_scheduler, load_unet, stock_pipeline
from deepfloyd_core.objective import Text, low_res, min_snr_weight, noise_loss, to_bytes, to_model_range, upscaled_input
from deepfloyd_core.train import Setup, _predict, batch_loss

STAGE2 = Path(FLAVOURS["tiny-ii"].repo)
STAGE1 = Path(FLAVOURS["tiny-i"].repo)


class Fed(Exception):
    """Carries the UNet's arguments out of a forward pass."""


@contextmanager
def spied(unet: Any) -> Iterator[dict[str, Any]]:
    """Keep what a UNet is fed, and end the forward pass there."""
    fed: dict[str, Any] = {}

    def hook(module: Any, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        fed.update({"x": positional[0], "t": positional[1], **named})
        raise Fed

    handle = unet.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with pytest.raises(Fed):
            yield fed
    finally:
        handle.remove()


def one_text(rows: torch.Tensor) -> Callable[[list[str]], Text]:
    """T5's rows of one text, whatever is asked for."""
    return lambda names: Text(torch.stack([rows for _ in names]))


@pytest.fixture(scope="module")
def unet() -> Iterator[Any]:
    yield load_unet(STAGE2, torch.float32)


@pytest.mark.parametrize(
    ("width", "height", "level", "t"), [(256, 256, 250, 700), (128, 64, 0, 3), (64, 192, 999, 999)]
)
def test_stage2_feeds_the_unet_what_the_stock_pipeline_feeds(
    unet: Any, monkeypatch: pytest.MonkeyPatch, width: int, height: int, level: int, t: int
) -> None:
    generator = torch.Generator().manual_seed(width + level)
    pixels = torch.randint(0, 256, (1, height, width, 3), generator=generator, dtype=torch.uint8)
    text = torch.randn((77, unet.config.encoder_hid_dim), generator=generator)
    x_0 = to_model_range(pixels)
    noise, low_res_noise = torch.randn(x_0.shape, generator=generator), torch.randn(x_0.shape, generator=generator)
    scheduler = load_scheduler(STAGE2)
    setup = Setup(
        2, StageConfig(model_flavour="tiny-ii", mixed_precision="no"), 0, unet, scheduler,
        load_scheduler(STAGE2, "image_noising_scheduler"), one_text(text), torch.device("cpu"),
    )  # fmt: skip
    draws = Draws(
        noise, low_res_noise, torch.tensor([t]), torch.tensor([level]), torch.tensor([True]), torch.tensor([False])
    )
    with spied(unet) as ours:
        _predict(setup, x_0, draws, ["caption"])

    # The pipeline draws twice: the x_t it starts from, and the low-res picture's noise.
    bars = scheduler.alphas_cumprod
    x_t = bars[t].sqrt() * x_0 + (1 - bars[t]).sqrt() * noise
    drawn = iter([x_t, low_res_noise])
    module = "diffusers.pipelines.deepfloyd_if.pipeline_if_superresolution"
    monkeypatch.setattr(f"{module}.randn_tensor", lambda *_, **__: next(drawn))
    pipeline = stock_pipeline(STAGE2, 2, unet, scheduler)
    with spied(unet) as theirs:
        pipeline(
            prompt_embeds=text[None], negative_prompt_embeds=text[None], image=low_res(x_0), noise_level=level,
            width=width, height=height, timesteps=[t], guidance_scale=1.0, output_type="pt",
        )  # fmt: skip
    assert torch.equal(ours["x"], theirs["x"])
    assert torch.equal(ours["class_labels"], theirs["class_labels"])
    assert ours["class_labels"].dtype == torch.int64
    assert int(ours["t"]) == int(theirs["t"])
    assert torch.equal(ours["encoder_hidden_states"], theirs["encoder_hidden_states"])


def test_the_low_res_half_is_not_the_noisy_half(unet: Any) -> None:
    """The recipe of other trainers feeds x_t twice; then the low-res picture never appears."""
    x_0 = torch.zeros(1, 3, 64, 64)
    noising = load_scheduler(STAGE2, "image_noising_scheduler")
    small = torch.full((1, 3, 16, 16), 0.5)
    half = upscaled_input(small, torch.zeros_like(x_0), torch.tensor([0]), noising)
    assert torch.allclose(half, torch.full_like(half, 0.5), atol=1e-3)


def test_stage1_noise_follows_ho_et_al(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    x_0, noise = torch.rand((2, 3, 8, 8), generator=generator), torch.randn((2, 3, 8, 8), generator=generator)
    scheduler = load_scheduler(STAGE1)
    t = torch.tensor([10, 900])
    # squaredcos_cap_v2 (Nichol and Dhariwal 2021, eq. 17), betas capped at 0.999, in float64.
    f = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    bar = np.cumprod(1 - np.minimum(1 - f[1:] / f[:-1], 0.999))[t.numpy()].reshape(2, 1, 1, 1)
    expected = np.sqrt(bar) * x_0.numpy() + np.sqrt(1 - bar) * noise.numpy()
    assert np.abs(scheduler.add_noise(x_0, noise, t).numpy() - expected).max() < 1e-5


def test_low_res_is_pillows_bicubic() -> None:
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (16, 24, 3), dtype=np.uint8)).resize(
        (96, 64), Image.Resampling.BICUBIC
    )
    ours = to_bytes(low_res(to_model_range(torch.from_numpy(np.asarray(smooth).copy())[None])))[0].numpy()
    theirs = np.asarray(smooth.resize((24, 16), Image.Resampling.BICUBIC))
    assert np.abs(ours.astype(int) - theirs.astype(int)).max() <= 1


def test_pixels_survive_the_model_range() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).repeat(3).reshape(1, 16, 16, 3)
    in_range = to_model_range(pixels)
    assert float(in_range.min()) == -1.0 and float(in_range.max()) == 1.0
    assert torch.equal(to_bytes(in_range), pixels)


@pytest.mark.parametrize("gamma", [None, 1.0, 5.0])
def test_min_snr_weights_and_loss_agree_with_numpy(gamma: float | None) -> None:
    rng = np.random.default_rng(2)
    bar = rng.uniform(0.01, 0.99, 4)
    eps, noise = rng.normal(size=(4, 3, 2, 2)), rng.normal(size=(4, 3, 2, 2))
    snr = bar / (1 - bar)
    weight = np.ones(4) if gamma is None else np.minimum(snr, gamma) / snr
    expected = (((eps - noise) ** 2).mean(axis=(1, 2, 3)) * weight).mean()
    got = noise_loss(torch.tensor(eps), torch.tensor(noise), min_snr_weight(torch.tensor(bar), gamma))
    assert float(got) == pytest.approx(expected, rel=1e-6)


def test_random_flip_mirrors_half_of_the_samples() -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (2, 16, 16, 3), generator=generator, dtype=torch.uint8)
    unet = load_unet(STAGE1, torch.float32)
    text = one_text(torch.randn((77, unet.config.encoder_hid_dim), generator=generator))

    def loss(flip: bool, pixels: torch.Tensor, number: int) -> float:
        config = StageConfig(
            model_flavour="tiny-i", mixed_precision="no", random_flip=flip, caption_dropout_probability=0.0
        )
        setup = Setup(1, config, 5, unet, load_scheduler(STAGE1), None, text, torch.device("cpu"))
        with torch.inference_mode():
            return float(batch_loss(setup, Batch(pixels, ["id"] * 2, np.arange(2)), number))

    mirrored = 0
    for number in range(20):
        drawn = loss(True, pixels, number)
        turns = [(a, b) for a in (False, True) for b in (False, True)]
        expected = {
            turn: loss(False, torch.stack([p.flip(1) if t else p for p, t in zip(pixels, turn, strict=True)]), number)
            for turn in turns
        }
        found = [turn for turn in turns if expected[turn] == pytest.approx(drawn, rel=1e-6)]
        assert len(found) == 1
        mirrored += sum(found[0])
    assert 10 <= mirrored <= 30  # of 40
