"""What the trainer feeds the UNets is what diffusers feeds them, bit for bit; the formulas agree with NumPy and Pillow."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from training_parts import recipe_of_other_trainers, resized

from deepfloyd_core.config.flavours import FLAVOURS
from deepfloyd_core.config.stage import StageConfig
from deepfloyd_core.config.stages import Stage
from deepfloyd_core.diffusion.degradations import Degradation, degrade
from deepfloyd_core.diffusion.loss import (
    Text,
    huber_width,
    low_res,
    min_snr_weight,
    pseudo_huber,
    soft_min_snr_weight,
    squared_error,
    to_bytes,
    to_model_range,
    upscaled_input,
)
from deepfloyd_core.diffusion.variance import reverse_steps, vlb_bits
from deepfloyd_core.hashing import hash_seed
from deepfloyd_core.models.unet import load_scheduler, load_unet, stock_pipeline
from deepfloyd_core.training import forward as stage_loss
from deepfloyd_core.training.batches import Batch, Draws, draw
from deepfloyd_core.training.draws import timestep_weights, vary
from deepfloyd_core.training.forward import TrainingContext, batch_loss, prepare

STAGE2 = Path(FLAVOURS["tiny-ii"].repo)
STAGE1 = Path(FLAVOURS["tiny-i"].repo)


class UNetInput(Exception):
    """Carries the UNet's arguments out of a forward pass."""


@contextmanager
def spied(unet: UNet2DConditionModel) -> Iterator[dict[str, Any]]:
    """Keep what a UNet is fed, and end the forward pass there."""
    fed: dict[str, Any] = {}

    def hook(module: torch.nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        fed.update({"x": positional[0], "t": positional[1], **named})
        raise UNetInput

    handle = unet.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with pytest.raises(UNetInput):
            yield fed
    finally:
        handle.remove()


def one_text(rows: torch.Tensor) -> Callable[[list[str]], Text]:
    """T5's rows of one text, whatever is asked for."""
    return lambda names: Text(torch.stack([rows for _ in names]))


@pytest.fixture(scope="module")
def unet() -> Iterator[UNet2DConditionModel]:
    yield load_unet(STAGE2, torch.float32)


@dataclass(frozen=True)
class Case:
    """A picture with everything that is drawn for it."""

    x_0: torch.Tensor
    text: torch.Tensor
    draws: Draws

    @classmethod
    def drawn(cls, unet: UNet2DConditionModel, size: tuple[int, int], level: int, t: int) -> "Case":
        generator = torch.Generator().manual_seed(size[0] + level)
        pixels = torch.randint(0, 256, (1, size[1], size[0], 3), generator=generator, dtype=torch.uint8)
        text, x_0 = torch.randn((77, unet.config.encoder_hid_dim), generator=generator), to_model_range(pixels)
        noise, low_res_noise = (torch.randn(x_0.shape, generator=generator) for _ in range(2))
        one, other = torch.tensor([True]), torch.tensor([False])
        return cls(x_0, text, Draws(noise, low_res_noise, torch.tensor([t]), torch.tensor([level]), one, other))


def fed_by_the_trainer(unet: UNet2DConditionModel, case: Case) -> dict[str, Any]:
    context = TrainingContext(
        2, stage2(), 0, unet, load_scheduler(STAGE2), load_scheduler(STAGE2, "image_noising_scheduler"),
        one_text(case.text), torch.device("cpu"), Path(),
    )  # fmt: skip
    with spied(unet) as fed:
        stage_loss.predict_noise(context, stage_loss.feed(context, case.x_0, case.draws, ["caption"]))
    return fed


def fed_by_the_pipeline(unet: UNet2DConditionModel, case: Case, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """diffusers draws twice: the x_t it starts from, and the low-res picture's noise."""
    scheduler, draws, t = load_scheduler(STAGE2), case.draws, int(case.draws.t)
    bars = scheduler.alphas_cumprod
    drawn = iter([bars[t].sqrt() * case.x_0 + (1 - bars[t]).sqrt() * draws.noise, draws.low_res_noise])
    module = "diffusers.pipelines.deepfloyd_if.pipeline_if_superresolution"
    monkeypatch.setattr(f"{module}.randn_tensor", lambda *_, **__: next(drawn))
    text = case.text[None]
    with spied(unet) as fed:
        stock_pipeline(STAGE2, 2, unet, scheduler)(
            prompt_embeds=text, negative_prompt_embeds=text, image=low_res(case.x_0), noise_level=int(draws.level),
            height=case.x_0.shape[2], width=case.x_0.shape[3], timesteps=[t], guidance_scale=1.0, output_type="pt",
        )  # fmt: skip
    return fed


def differing(ours: dict[str, Any], theirs: dict[str, Any]) -> set[str]:
    """The arguments of the UNet that are not equal bit for bit."""
    names = ("x", "t", "class_labels", "encoder_hidden_states")
    return {name for name in names if not torch.equal(ours[name].flatten(), theirs[name].flatten())}


SIZES = ((256, 256), (384, 256))
PARITY = [
    *((size, level, 700) for size in SIZES for level in (0, 100, 250, 999)),
    ((64, 192), 999, 999),
    ((128, 64), 0, 3),
]


@pytest.mark.parametrize(("size", "level", "t"), PARITY)
def test_stage2_feeds_the_unet_what_the_stock_pipeline_feeds(
    unet: UNet2DConditionModel, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], level: int, t: int
) -> None:
    case = Case.drawn(unet, size, level, t)
    ours, theirs = fed_by_the_trainer(unet, case), fed_by_the_pipeline(unet, case, monkeypatch)
    assert not differing(ours, theirs)
    assert ours["x"].shape == (1, 6, size[1], size[0])
    assert ours["class_labels"].dtype == torch.int64


def test_the_comparison_with_the_stock_pipeline_finds_the_recipe_of_other_trainers(
    unet: UNet2DConditionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case.drawn(unet, (256, 256), 250, 700)
    theirs = fed_by_the_pipeline(unet, case, monkeypatch)
    monkeypatch.setattr(stage_loss, "feed", recipe_of_other_trainers)
    ours = fed_by_the_trainer(unet, case)
    assert differing(ours, theirs) == {"x", "class_labels"}
    assert torch.equal(ours["x"][:, :3], theirs["x"][:, :3]), "the half that both have is x_t"


def test_the_low_res_half_is_not_the_noisy_half(unet: UNet2DConditionModel) -> None:
    """The recipe of other trainers feeds x_t twice; then the low-res picture never appears."""
    x_0 = torch.zeros(1, 3, 64, 64)
    noising = load_scheduler(STAGE2, "image_noising_scheduler")
    small = torch.full((1, 3, 16, 16), 0.5)
    half = upscaled_input(small, torch.zeros_like(x_0), torch.tensor([0]), noising)
    assert torch.allclose(half, torch.full_like(half, 0.5), atol=1e-3)


def test_training_degrades_the_low_res_half_alone(unet: UNet2DConditionModel) -> None:
    case = Case.drawn(unet, (128, 128), 0, 500)
    how = Degradation(torch.tensor([2.0]), torch.zeros(1, 3, 32, 32), torch.tensor([40]))
    clean = fed_by_the_trainer(unet, case)
    spoilt = fed_by_the_trainer(unet, replace(case, draws=replace(case.draws, degradation=how)))
    expected = upscaled_input(
        degrade(low_res(case.x_0), how), case.draws.low_res_noise, case.draws.level,
        load_scheduler(STAGE2, "image_noising_scheduler"),
    )  # fmt: skip
    assert differing(clean, spoilt) == {"x"}
    assert torch.equal(clean["x"][:, :3], spoilt["x"][:, :3]) and torch.equal(spoilt["x"][:, 3:], expected)


def test_a_window_is_cut_from_what_the_whole_crop_would_be_fed(unet: UNet2DConditionModel) -> None:
    """Of the low-res half too: the low-res of a window alone would be enlarged to other places."""
    case = Case.drawn(unet, (256, 128), 100, 500)
    whole = fed_by_the_trainer(unet, case)["x"]
    draws = vary(case.draws, stage2(stage2_patch=64), 1, 0)
    rows, columns = draws.windows[0]
    fed = fed_by_the_trainer(unet, replace(case, draws=draws))["x"]
    assert fed.shape == (1, 6, 64, 64) and torch.equal(fed, whole[:, :, rows, columns])


def test_windows_lie_anywhere_in_a_picture_and_change_no_other_draw() -> None:
    shape = torch.Size((8, 3, 64, 96))
    drawn = [vary(draw(shape, 1, number, 0.1), stage2(stage2_patch=64), 1, number) for number in range(60)]
    assert {(rows.start, rows.stop) for draws in drawn for rows, _ in draws.windows} == {(0, 64)}
    starts = {columns.start for draws in drawn for _, columns in draws.windows}
    assert starts == set(range(0, 33, 4)), "480 draws of 9, each where a pixel of the low-res picture starts"
    assert drawn[3].windows == vary(draw(shape, 1, 3, 0.1), stage2(stage2_patch=64), 1, 3).windows
    assert torch.equal(drawn[3].noise, draw(shape, 1, 3, 0.1).noise)


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
    got = squared_error(torch.tensor(eps), torch.tensor(noise)) * min_snr_weight(torch.tensor(bar), gamma)
    assert float(got.mean()) == pytest.approx(expected, rel=1e-6)


def test_random_flip_mirrors_half_of_the_samples() -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (2, 16, 16, 3), generator=generator, dtype=torch.uint8)
    unet = load_unet(STAGE1, torch.float32)
    text = one_text(torch.randn((77, unet.config.encoder_hid_dim), generator=generator))

    def loss(flip: bool, pixels: torch.Tensor, number: int) -> float:
        config = StageConfig(
            model_flavour="tiny-i", mixed_precision="no", random_flip=flip, caption_dropout_probability=0.0
        )
        context = TrainingContext(1, config, 5, unet, load_scheduler(STAGE1), None, text, torch.device("cpu"), Path())
        with torch.inference_mode():
            return float(batch_loss(context, prepare(context, Batch(pixels, ["id"] * 2, np.arange(2)), number, [])))

    mirrored = 0
    for number in range(8):
        drawn = loss(True, pixels, number)
        turns = [(a, b) for a in (False, True) for b in (False, True)]
        expected = {
            turn: loss(False, torch.stack([p.flip(1) if t else p for p, t in zip(pixels, turn, strict=True)]), number)
            for turn in turns
        }
        found = [turn for turn in turns if expected[turn] == pytest.approx(drawn, rel=1e-6)]
        assert len(found) == 1
        mirrored += sum(found[0])
    assert 4 <= mirrored <= 12  # of 16


# ---- options of the objective, each beside a second computation in float64 ------------------------------------------


def stage(**keys: Any) -> StageConfig:
    return StageConfig.model_validate({"model_flavour": "tiny-i", "mixed_precision": "no", **keys})


def stage2(**keys: Any) -> StageConfig:
    return stage(model_flavour="tiny-ii", **keys)


BARS = load_scheduler(STAGE1).alphas_cumprod.double().numpy()


@pytest.mark.parametrize("sigma_data", [0.5, 1.0, 2.5])
def test_soft_min_snr_is_k_diffusions_weight_carried_over_to_epsilon(sigma_data: float) -> None:
    """k-diffusion weighs (error of x_0 / c_out)^2 by (s s_d)^2 / (s^2 + s_d^2)^2; error of x_0 = s times that of epsilon."""
    t = np.array([0, 10, 300, 700, 998])
    sigma = np.sqrt((1 - BARS[t]) / BARS[t])
    c_out = sigma * sigma_data / np.sqrt(sigma**2 + sigma_data**2)
    expected = (sigma * sigma_data) ** 2 / (sigma**2 + sigma_data**2) ** 2 / c_out**2 * sigma**2
    got = soft_min_snr_weight(torch.tensor(BARS[t]), sigma_data).numpy()
    assert got == pytest.approx(expected, rel=1e-9)
    assert got[0] < 0.05 < 0.95 < got[-1], "it weighs"


@pytest.mark.parametrize("schedule", ["constant", "snr", "exponential"])
def test_pseudo_huber_and_its_width_agree_with_numpy(schedule: str) -> None:
    rng = np.random.default_rng(0)
    t, c = np.array([0, 250, 600, 999]), 0.07
    eps, noise = rng.normal(size=(2, 4, 3, 4, 4))
    sigma = np.sqrt((1 - BARS[t]) / BARS[t])
    wide = {
        "constant": np.full(4, c),
        "snr": (1 - c) / (1 + sigma) ** 2 + c,
        "exponential": np.exp(math.log(c) / 1000 * t),
    }[schedule]
    width = huber_width(schedule, c, torch.tensor(t), torch.tensor(BARS[t], dtype=torch.float32))
    assert width.numpy() == pytest.approx(wide, rel=1e-5)
    shaped = wide.reshape(-1, 1, 1, 1)
    expected = (2 * shaped * (np.sqrt((eps - noise) ** 2 + shaped**2) - shaped)).mean((1, 2, 3))
    got = pseudo_huber(torch.tensor(eps, dtype=torch.float32), torch.tensor(noise, dtype=torch.float32), width)
    assert got.numpy() == pytest.approx(expected, rel=1e-5)


def bits_by_the_papers(
    eps: np.ndarray, raw: np.ndarray, noise: np.ndarray, x_0: np.ndarray, t: int, betas: np.ndarray
) -> float:
    """One sample's term of the bound, by Ho et al. 2020 (eq. 4, 7, 13, 15) and Nichol and Dhariwal 2021 (eq. 4 to 6, 15)."""
    alpha, bar = 1 - betas, np.cumprod(1 - betas)
    before = bar[t - 1] if t else 1.0
    x_t = np.sqrt(bar[t]) * x_0 + np.sqrt(1 - bar[t]) * noise
    guess = (x_t - np.sqrt(1 - bar[t]) * eps) / np.sqrt(bar[t])

    def posterior_mean(x: np.ndarray) -> np.ndarray:
        first = np.sqrt(before) * betas[t] / (1 - bar[t]) * x
        return np.asarray(first + np.sqrt(alpha[t]) * (1 - before) / (1 - bar[t]) * x_t)

    at = max(t, 1)  # the posterior's variance at 0 is zero
    smallest = (1 - bar[at - 1]) / (1 - bar[at]) * betas[at]
    share = (raw + 1) / 2
    variance = np.exp(share * np.log(betas[t]) + (1 - share) * np.log(smallest))
    if t:
        apart = posterior_mean(x_0) - posterior_mean(guess)
        nats = 0.5 * (np.log(variance / smallest) - 1 + (smallest + apart**2) / variance)
        return float(nats.mean() / np.log(2))
    below = np.vectorize(lambda z: 0.5 * math.erfc(-z / math.sqrt(2)))
    deviation = np.sqrt(variance)
    high = np.where(x_0 > 0.999, np.inf, x_0 + 1 / 255)
    low = np.where(x_0 < -0.999, -np.inf, x_0 - 1 / 255)
    mean = posterior_mean(guess)
    probability = below((high - mean) / deviation) - below((low - mean) / deviation)
    return float(-np.log2(np.maximum(probability, 1e-12)).mean())


@pytest.mark.parametrize("t", [0, 1, 2, 50, 500, 999])
def test_the_bounds_term_agrees_with_the_papers_in_float64(t: int) -> None:
    rng = np.random.default_rng(t)
    shape = (3, 3, 6, 6)
    x_0 = rng.integers(0, 256, shape) / 127.5 - 1
    x_0[0, 0, 0, :2] = -1, 1  # the ends, which take in all beyond
    noise = rng.normal(size=shape)
    eps, raw = noise + 0.3 * rng.normal(size=shape), rng.uniform(-1.2, 1.2, shape)
    betas = load_scheduler(STAGE1).betas
    beta = betas.double().numpy()
    expected = [bits_by_the_papers(eps[n], raw[n], noise[n], x_0[n], t, beta) for n in range(3)]
    eps_t, raw_t, noise_t, x_0_t = (torch.tensor(part, dtype=torch.float32) for part in (eps, raw, noise, x_0))
    got = vlb_bits(eps_t, raw_t, noise_t, x_0_t, reverse_steps(betas, torch.full((3,), t))).numpy()
    assert got == pytest.approx(expected, rel=2e-5)


def test_the_bounds_term_trains_the_variance_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    eps, raw, noise, x_0 = torch.randn((4, 2, 3, 4, 4), generator=generator).unbind(0)
    eps.requires_grad_(), raw.requires_grad_()
    steps = reverse_steps(load_scheduler(STAGE1).betas, torch.tensor([0, 400]))
    vlb_bits(eps, raw, noise, x_0.clamp(-1, 1), steps).sum().backward()
    assert eps.grad is None
    assert raw.grad is not None and bool(raw.grad.isfinite().all()) and float(raw.grad.abs().max()) > 0


def test_the_variance_that_is_trained_is_the_one_that_diffusers_samples_with() -> None:
    scheduler = load_scheduler(STAGE1, variance_type="learned_range")
    raw = torch.linspace(-1, 1, 9)
    for t in (1, 2, 37, 500, 998):
        steps = reverse_steps(scheduler.betas, torch.tensor([t]))
        ours = (raw + 1) / 2 * steps.log_max.item() + (1 - raw) / 2 * steps.log_min.item()
        theirs = scheduler._get_variance(t, predicted_variance=raw)
        assert ours.numpy() == pytest.approx(theirs.numpy(), rel=1e-3), t


# ---- draws ----------------------------------------------------------------------------------------------------------

SHAPE = torch.Size((8, 3, 4, 4))


def plain(number: int) -> Draws:
    return draw(SHAPE, 1, number, 0.1)


def test_without_options_the_draws_are_what_they_were() -> None:
    draws = plain(0)
    assert vary(draws, stage(), 1, 0) is draws
    assert draws.fed is draws.noise


@pytest.mark.parametrize(
    ("keys", "first", "end"),
    [
        ({"timestep_bias_strategy": "earlier", "timestep_bias_portion": 0.3}, 0, 300),
        ({"timestep_bias_strategy": "later"}, 750, 1000),
        ({"timestep_bias_strategy": "range", "timestep_bias_begin": 200, "timestep_bias_end": 450}, 200, 450),
    ],
)
def test_favoured_timesteps_come_as_often_as_asked(keys: dict[str, Any], first: int, end: int) -> None:
    config = stage(timestep_bias_multiplier=3.0, **keys)
    weights = np.ones(1000)
    weights[first:end] *= 3
    assert timestep_weights(config).numpy() == pytest.approx(weights / weights.sum(), rel=1e-6)
    drawn = torch.cat([vary(plain(number), config, 1, number).t for number in range(500)]).numpy()
    inside = ((drawn >= first) & (drawn < end)).mean()
    share = weights[first:end].sum() / weights.sum()
    assert inside == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / len(drawn)))
    assert drawn.dtype == np.int64 and drawn.min() >= 0 and drawn.max() <= 999


def test_noise_levels_are_drawn_from_the_band_alone_and_nothing_else_changes() -> None:
    config = stage2(noise_level_begin=100, noise_level_end=104)
    drawn = [vary(plain(number), config, 1, number) for number in range(50)]
    levels = torch.cat([draws.level for draws in drawn])
    assert sorted(set(levels.tolist())) == [100, 101, 102, 103] and levels.dtype == torch.int64
    assert np.bincount(levels)[100:].min() > 60, "uniform: 100 each"
    assert torch.equal(drawn[7].level, vary(plain(7), config, 1, 7).level)
    assert all(
        torch.equal(getattr(drawn[7], name), getattr(plain(7), name)) for name in ("noise", "t", "low_res_noise")
    )


def test_offset_noise_shifts_whole_colours_of_the_asked_share_of_samples() -> None:
    config = stage(offset_noise=True, noise_offset=0.4, noise_offset_probability=0.25)
    shifts = torch.cat([vary(plain(n), config, 1, n).noise - plain(n).noise for n in range(500)]).numpy()
    assert np.ptp(shifts, axis=(2, 3)).max() < 1e-5, "one number for each colour"
    shift = shifts.mean((2, 3))
    taken = (np.abs(shift) > 1e-6).all(1)
    assert taken.mean() == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / len(taken)))
    assert np.abs(shift[~taken]).max() < 1e-6
    assert shift[taken].std() == pytest.approx(0.4, rel=0.05)
    assert abs(np.corrcoef(shift[taken].T)[0, 1]) < 0.15, "each colour has its own"


def test_input_perturbation_changes_what_is_fed_and_not_the_target() -> None:
    config = stage(input_perturbation=0.2, input_perturbation_steps=4, gradient_accumulation_steps=2)
    found = []
    for number in (0, 1, 2, 7, 8, 100):
        draws = vary(plain(number), config, 1, number)
        assert torch.equal(draws.noise, plain(number).noise)
        found.append(float((draws.fed - draws.noise).std()))
    assert found == pytest.approx([0.2, 0.2, 0.15, 0.05, 0, 0], rel=0.12)
    constant = vary(plain(100), stage(input_perturbation=0.2), 1, 100)
    assert float((constant.fed - constant.noise).std()) == pytest.approx(0.2, rel=0.12)


def test_options_leave_the_other_draws_alone_and_repeat_themselves() -> None:
    config = stage(
        offset_noise=True, input_perturbation=0.1, timestep_bias_strategy="later", timestep_bias_multiplier=5.0
    )
    one, two, base = (vary(plain(3), config, 1, 3), vary(plain(3), config, 1, 3), plain(3))
    for name in ("noise", "fed_noise", "t"):
        assert torch.equal(getattr(one, name), getattr(two, name))
        assert not torch.equal(getattr(one, name), getattr(vary(plain(3), config, 2, 3), name)), "another seed"
    for name in ("low_res_noise", "level", "keep_caption", "mirror"):
        assert torch.equal(getattr(one, name), getattr(base, name))


# ---- the trainer's loss ----------------------------------------------------------------------------------------------


def halves(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the UNet below makes of its input."""
    return 0.9 * x[:, :3], 0.5 * x[:, :3].flip(-1)


class FakeUnet(torch.nn.Module):
    def forward(self, x: torch.Tensor, t: torch.Tensor, **_: Any) -> tuple[torch.Tensor]:
        return (torch.cat(halves(x), dim=1),)


ROLLED: dict[str, Any] = {
    "scheduled_sampling_max_step_offset": 400, "scheduled_sampling_probability": 0.5, "snr_gamma": 5.0,
}  # fmt: skip


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "min-SNR": {"snr_gamma": 5.0},
    "soft min-SNR": {"use_soft_min_snr": True, "soft_min_snr_sigma_data": 0.7},
    "huber": {"loss_type": "huber", "huber_c": 0.2},
    "smooth_l1": {"loss_type": "smooth_l1", "huber_schedule": "exponential", "snr_gamma": 2.0},
    "offset": {"offset_noise": True, "noise_offset_probability": 0.5},
    "perturbed": {"input_perturbation": 0.3},
    "late": {"timestep_bias_strategy": "later", "timestep_bias_multiplier": 50.0},
    "variance": {"train_variance": True},
    "variance and more": {"train_variance": True, "input_perturbation": 0.3, "snr_gamma": 5.0},
    "own errors": ROLLED,
    "own errors and more": {**ROLLED, "train_variance": True, "input_perturbation": 0.3},
}


@pytest.mark.parametrize("stage_number", [1, 2])
@pytest.mark.parametrize("name", OPTIONS)
def test_the_trainers_loss_with_each_option_agrees_with_numpy(name: str, stage_number: Stage) -> None:
    config = StageConfig.model_validate(
        {"model_flavour": "tiny-" + "i" * stage_number, "mixed_precision": "no", **OPTIONS[name]}
    )
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (4, 8, 8, 3), generator=generator, dtype=torch.uint8)
    folder = (STAGE1, STAGE2)[stage_number - 1]
    scheduler = load_scheduler(folder)
    noising = load_scheduler(folder, "image_noising_scheduler") if stage_number == 2 else None
    text = one_text(torch.zeros(2, 4))
    context = TrainingContext(
        stage_number, config, 7, FakeUnet(), scheduler, noising, text, torch.device("cpu"), Path()
    )
    got = float(batch_loss(context, prepare(context, Batch(pixels, ["id"] * 4, np.arange(4)), 11, [])))

    seed = hash_seed(7, stage_number)
    draws = vary(draw(torch.Size((4, 3, 8, 8)), seed, 11, 0.1), config, seed, 11)
    x_0, t, bars = to_model_range(pixels).double().numpy(), draws.t.numpy(), scheduler.alphas_cumprod.double().numpy()
    bar = bars[t].reshape(-1, 1, 1, 1)
    noise, fed = draws.noise.double().numpy(), draws.fed.double().numpy()
    x_t = np.sqrt(bar) * x_0 + np.sqrt(1 - bar) * fed
    if draws.rollout:
        later, taken = bars[draws.rollout.t.numpy()].reshape(-1, 1, 1, 1), draws.rollout.taken.numpy()
        assert set(taken) == {False, True}
        noisier = np.sqrt(later) * x_0 + np.sqrt(1 - later) * draws.rollout.noise.double().numpy()
        guess = (noisier - np.sqrt(1 - later) * halves(torch.from_numpy(noisier))[0].numpy()) / np.sqrt(later)
        x_t[taken] = (np.sqrt(bar) * guess.clip(-1, 1) + np.sqrt(1 - bar) * fed)[taken]
        # what added to x_0 alone gives this x_t; of the others it is what was drawn
        wanted = (x_t - np.sqrt(bar) * x_0) / np.sqrt(1 - bar)
        noise = noise + wanted - fed
    eps, raw = (half.numpy() for half in halves(torch.from_numpy(x_t)))
    error, flat = eps - noise, bar.reshape(-1)
    loss, snr = (error**2).mean((1, 2, 3)), flat / (1 - flat)
    if config.loss_type != "l2":
        wide = 0.1 ** (t / 1000) if name == "smooth_l1" else 0.8 / (1 + snr**-0.5) ** 2 + 0.2
        wide = wide.reshape(-1, 1, 1, 1)
        scale = 2 if name == "smooth_l1" else 2 * wide
        loss = (scale * (np.sqrt(error**2 + wide**2) - wide)).mean((1, 2, 3))
    if config.snr_gamma:
        loss = loss * np.minimum(snr, config.snr_gamma) / snr
    if config.use_soft_min_snr:
        loss = loss / (1 + snr * 0.7**2)
    if config.train_variance:
        betas = scheduler.betas.double().numpy()
        drawn = [True] * 4 if draws.rollout is None else ~draws.rollout.taken.numpy()
        loss = loss + [
            bits_by_the_papers(eps[n], raw[n], fed[n], x_0[n], int(t[n]), betas) if drawn[n] else 0.0 for n in range(4)
        ]
    assert got == pytest.approx(loss.mean(), rel=1e-4)


def test_own_errors_are_sought_within_the_offset_and_by_the_model_without_dropout() -> None:
    config, seen = stage2(**ROLLED | {"scheduled_sampling_probability": 1.0}), []
    drawn = [vary(draw(torch.Size((64, 3, 4, 4)), 1, number, 0.1), config, 1, number) for number in range(4)]
    offsets = torch.cat([made.rollout.t - made.t for made in drawn if made.rollout])
    room = 999 - torch.cat([made.t for made in drawn])
    assert (offsets >= room.clamp(max=1)).all() and (offsets <= room.clamp(max=400)).all()
    assert (offsets == room)[room < 40].float().mean() > 0.8
    assert offsets[room >= 400].float().mean() == pytest.approx(200, abs=30)
    plain = vary(draw(torch.Size((64, 3, 4, 4)), 1, 0, 0.1), stage2(snr_gamma=5.0), 1, 0)
    assert torch.equal(plain.t, drawn[0].t) and torch.equal(plain.noise, drawn[0].noise)

    class Watched(FakeUnet):
        def forward(self, x: torch.Tensor, t: torch.Tensor, **words: Any) -> tuple[torch.Tensor]:
            seen.append((self.training, torch.is_grad_enabled(), t))
            return super().forward(x, t, **words)

    noising, unet = load_scheduler(STAGE2, "image_noising_scheduler"), Watched().train()
    context = TrainingContext(
        2, config, 7, unet, load_scheduler(STAGE2), noising, one_text(torch.zeros(2, 4)), torch.device("cpu"),
        Path(),
    )  # fmt: skip
    prepared = prepare(context, Batch(torch.zeros(4, 8, 8, 3, dtype=torch.uint8), ["id"] * 4, np.arange(4)), 11, [])
    batch_loss(context, prepared)
    assert prepared.draws.rollout is not None
    first, second = seen
    assert first[:2] == (False, False) and torch.equal(first[2], prepared.draws.rollout.t)
    assert second[:2] == (True, True) and torch.equal(second[2], prepared.draws.t)


def test_own_errors_in_a_window_are_back_projected_where_samples_are() -> None:
    keys = ROLLED | {"scheduled_sampling_probability": 1.0, "stage2_patch": 64, "validation_back_projection": True}
    pixels = torch.randint(0, 256, (2, 72, 80, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    scheduler, noising = load_scheduler(STAGE2), load_scheduler(STAGE2, "image_noising_scheduler")
    context = TrainingContext(
        2, stage2(**keys), 7, FakeUnet(), scheduler, noising, one_text(torch.zeros(2, 4)), torch.device("cpu"),
        Path(),
    )  # fmt: skip
    prepared = prepare(context, Batch(pixels, ["id"] * 2, np.arange(2)), 11, [])
    draws, bars, x_0 = prepared.draws, scheduler.alphas_cumprod.numpy(), to_model_range(pixels)
    assert draws.rollout is not None
    fed, astray = stage_loss.roll_out(context, prepared, draws.rollout)
    for n, (rows, columns) in enumerate(draws.windows):
        whole = x_0[n].numpy().copy()
        truth, later, now = x_0[n, :, rows, columns].numpy(), bars[int(draws.rollout.t[n])], bars[int(draws.t[n])]
        noise = draws.rollout.noise[n, :, rows, columns].numpy()
        noisier = torch.from_numpy(np.sqrt(later) * truth + np.sqrt(1 - later) * noise)
        guess = ((noisier - np.sqrt(1 - later) * halves(noisier[None])[0][0]) / np.sqrt(later)).numpy().clip(-1, 1)
        whole[:, rows, columns] = guess
        for channel, wanted in zip(whole, low_res(x_0)[n].numpy(), strict=True):
            lacks = wanted - resized(channel, 20, 18).clip(-1, 1)
            channel[:] = (channel + resized(lacks, 80, 72)).clip(-1, 1)
        guess = whole[:, rows, columns]
        x_t = np.sqrt(now) * guess + np.sqrt(1 - now) * draws.noise[n, :, rows, columns].numpy()
        np.testing.assert_allclose(fed.x[n, :3].numpy(), x_t, atol=1e-4)
        assert torch.equal(fed.x[n, 3:], prepared.fed.x[n, 3:]) and int(fed.t[n]) == int(draws.t[n])
        np.testing.assert_allclose(astray[n].numpy(), (guess - truth) * np.sqrt(now / (1 - now)), rtol=1e-3, atol=1e-3)


def test_the_loss_of_a_window_agrees_with_numpy() -> None:
    config = stage2(stage2_patch=64, train_variance=True, snr_gamma=5.0)
    pixels = torch.randint(0, 256, (2, 72, 80, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    scheduler, text = load_scheduler(STAGE2), one_text(torch.zeros(2, 4))
    noising = load_scheduler(STAGE2, "image_noising_scheduler")
    context = TrainingContext(2, config, 7, FakeUnet(), scheduler, noising, text, torch.device("cpu"), Path())
    got = float(batch_loss(context, prepare(context, Batch(pixels, ["id"] * 2, np.arange(2)), 11, [])))

    seed = hash_seed(7, 2)
    draws = vary(draw(torch.Size((2, 3, 72, 80)), seed, 11, 0.1), config, seed, 11)
    bars, betas = scheduler.alphas_cumprod.double().numpy(), scheduler.betas.double().numpy()
    losses = []
    for n, (rows, columns) in enumerate(draws.windows):
        t = int(draws.t[n])
        x_0 = (pixels[n].double().numpy() / 127.5 - 1).transpose(2, 0, 1)[:, rows, columns]
        noise = draws.noise[n].double().numpy()[:, rows, columns]
        x_t = np.sqrt(bars[t]) * x_0 + np.sqrt(1 - bars[t]) * noise
        eps, raw = (half[0].numpy() for half in halves(torch.from_numpy(x_t[None])))
        snr = bars[t] / (1 - bars[t])
        weighed = ((eps - noise) ** 2).mean() * min(snr, 5.0) / snr
        losses.append(weighed + bits_by_the_papers(eps, raw, noise, x_0, t, betas))
    assert got == pytest.approx(np.mean(losses), rel=1e-4)
