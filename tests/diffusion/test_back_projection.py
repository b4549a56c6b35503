"""Back-projection agrees with Pillow, and the stock pipeline samples pictures with it that fit their low-res ones."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from small_run import SmallRun
from training_parts import resized

from deepfloyd_core.config.flavours import FLAVOURS
from deepfloyd_core.diffusion.back_projection import back_projected, back_projecting
from deepfloyd_core.diffusion.loss import low_res
from deepfloyd_core.models.unet import load_scheduler, load_unet, stock_pipeline
from deepfloyd_core.preflight.load import load_run
from deepfloyd_core.sampling.jobs import SampledStage
from deepfloyd_core.sampling.sampler import make_sampler, sample_upscaled

STAGE2 = Path(FLAVOURS["tiny-ii"].repo)


def test_it_adds_pillows_enlargement_of_what_a_pillow_downscale_lacks() -> None:
    rng = np.random.default_rng(5)
    made, truth = (rng.uniform(-0.4, 0.4, (2, 3, 32, 48)).astype(np.float32) for _ in range(2))
    small = low_res(torch.from_numpy(truth))
    got = back_projected(torch.from_numpy(made), small).numpy()
    flat = (made.reshape(-1, 32, 48), small.reshape(-1, 8, 12).numpy(), got.reshape(-1, 32, 48))
    for picture, wanted, found in zip(*flat, strict=True):
        expected = picture + resized(wanted - resized(picture, 12, 8), 48, 32)
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_it_leaves_what_the_low_res_size_cannot_hold() -> None:
    board = torch.tensor([[0.5, -0.5], [-0.5, 0.5]]).repeat(16, 16).expand(1, 3, -1, -1)
    got = board
    for _ in range(8):
        got = back_projected(got, torch.full((1, 3, 8, 8), 0.25))
    assert low_res(got).sub(0.25).abs().max() < 1e-3, "its downscale is the low-res picture"
    assert (got - 0.25 - board)[..., 4:-4, 4:-4].abs().max() < 1e-2, "and the pattern is still there"


def _by_hand(unet: UNet2DConditionModel, scheduler: DDPMScheduler, x_t: np.ndarray, other: torch.Tensor, text: torch.Tensor,
             small: np.ndarray, noise: list[np.ndarray]) -> np.ndarray:  # fmt: skip
    """Ancestral sampling (Ho et al. 2020, algorithm 2) in NumPy, each step's picture back-projected with Pillow."""
    bars = scheduler.alphas_cumprod.double().numpy()
    steps = [int(t) for t in scheduler.timesteps]
    for number, t in enumerate(steps):
        before = bars[steps[number + 1]] if number + 1 < len(steps) else 1.0
        fed = torch.cat([torch.from_numpy(x_t).float(), other], 1)
        with torch.no_grad():
            out = unet(fed, t, text, class_labels=torch.zeros(len(fed), dtype=torch.int64)).sample
        x_0 = ((x_t - np.sqrt(1 - bars[t]) * out[:, :3].double().numpy()) / np.sqrt(bars[t])).clip(-1, 1)
        for picture, wanted in zip(x_0.reshape(-1, *x_0.shape[-2:]), small.reshape(-1, *small.shape[-2:]), strict=True):
            height, width = picture.shape
            now = resized(picture.astype(np.float32), width // 4, height // 4).clip(-1, 1)
            picture[:] = (picture + resized(wanted - now, width, height)).clip(-1, 1)
        alpha = bars[t] / before
        mean = (np.sqrt(before) * (1 - alpha) * x_0 + np.sqrt(alpha) * (1 - before) * x_t) / (1 - bars[t])
        x_t = mean + np.sqrt((1 - alpha) * (1 - before) / (1 - bars[t])) * noise[number]
    return x_t


def test_the_stock_pipeline_with_it_is_ancestral_sampling_with_back_projected_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    unet = load_unet(STAGE2, torch.float32).eval()
    scheduler = load_scheduler(STAGE2)
    pipeline = stock_pipeline(STAGE2, 2, unet, scheduler)
    rng = np.random.default_rng(1)
    small = rng.uniform(-0.8, 0.8, (1, 3, 16, 24)).astype(np.float32)
    text = torch.from_numpy(rng.normal(0, 0.1, (1, 77, 64)).astype(np.float32))
    drawn: list[np.ndarray] = []

    def draw(shape: tuple[int, ...], **_: Any) -> torch.Tensor:
        drawn.append(rng.normal(size=shape).astype(np.float32))
        return torch.from_numpy(drawn[-1])

    for module in ("pipelines.deepfloyd_if.pipeline_if_superresolution", "schedulers.scheduling_ddpm"):
        monkeypatch.setattr(f"diffusers.{module}.randn_tensor", draw)
    plain = pipeline.scheduler
    pipeline.scheduler = back_projecting(plain, torch.from_numpy(small))
    made = pipeline(
        prompt_embeds=text, image=torch.from_numpy(small), noise_level=0, num_inference_steps=4, guidance_scale=1.0,
        width=96, height=64, output_type="pt",
    ).images.numpy()  # fmt: skip
    assert plain.step.__func__ is type(plain).step, "the scheduler that was given is as it was"

    start, low_noise, *noise = drawn
    other = torch.nn.functional.interpolate(torch.from_numpy(small), (64, 96), mode="bilinear", align_corners=True)
    other = pipeline.image_noising_scheduler.add_noise(other, torch.from_numpy(low_noise), torch.tensor([0]))
    noise += [np.zeros_like(start)] * (4 - len(noise))
    expected = _by_hand(unet, pipeline.scheduler, start.astype(np.float64), other, text, small, noise)
    np.testing.assert_allclose(made, expected, atol=2e-3)


def test_the_key_makes_samples_that_fit_their_low_res_pictures_in_every_batch(small_run: SmallRun) -> None:
    rng = np.random.default_rng(2)
    corners = torch.from_numpy(rng.uniform(-0.7, 0.7, (3, 3, 2, 2)).astype(np.float32))  # more than a batch
    small = torch.nn.functional.interpolate(corners, (8, 8), mode="bilinear")
    text = torch.zeros(3, 77, 64)
    fit = {}
    for said in ("false", "true"):
        run = load_run(small_run.config, (f"stage2.validation_back_projection={said}",))
        sampler = make_sampler(
            SampledStage(stage=2, settings=run.config.stage(2), model=STAGE2), None, run.config, lambda count: None
        )
        made = sample_upscaled(sampler, text, text, [0, 1, 2], small)
        assert made.shape == (3, 3, 32, 32)
        fit[said] = (low_res(made) - small).abs().mean((1, 2, 3))
    assert fit["true"].max() < 0.02 and fit["false"].min() > 3 * float(fit["true"].max())
