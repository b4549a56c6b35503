"""Each scheduler samples as the stock pipeline with diffusers' own class of that name, whose settings stand here."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from small_run import SmallRun

from deepfloyd_core.config.flavours import FLAVOURS
from deepfloyd_core.config.stage_sampling import SCHEDULER_KINDS
from deepfloyd_core.config.stages import Stage
from deepfloyd_core.diffusion.loss import low_res
from deepfloyd_core.errors import ConfigError
from deepfloyd_core.models.folders import resolve
from deepfloyd_core.models.unet import load_unet, order_channels_last, stock_pipeline
from deepfloyd_core.preflight.load import load_run
from deepfloyd_core.sampling import schedulers as module
from deepfloyd_core.sampling.jobs import SampledStage
from deepfloyd_core.sampling.sampler import Sampler, Start, make_sampler, sample_from_text, sample_upscaled
from deepfloyd_core.sampling.schedulers import make_scheduler

OF_IF: dict[str, Any] = {
    "beta_schedule": "squaredcos_cap_v2", "thresholding": True, "dynamic_thresholding_ratio": 0.95,
}  # fmt: skip
MADE: dict[str, Callable[..., Any]] = {
    "ddpm": lambda most: DDPMScheduler(**OF_IF, sample_max_value=most),
    "ddim": lambda most: DDIMScheduler(**OF_IF, sample_max_value=most),
    "dpm++": lambda most: DPMSolverMultistepScheduler(**OF_IF, sample_max_value=most, lambda_min_clipped=-5.1),
    "unipc": lambda most: UniPCMultistepScheduler(**OF_IF, sample_max_value=most),
}
NAMES = sorted(MADE)
TEXT = torch.randn(2, 77, 64, generator=torch.Generator().manual_seed(0)) * 0.2
SMALL = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 1.6 - 0.8


def _sampler(run: SmallRun, stage: Stage, name: str, *more: str) -> Sampler:
    keys = (f"stage{stage}.validation_noise_scheduler={name}", f"stage{stage}.validation_num_inference_steps=4")
    loaded = load_run(run.config, (*keys, *(f"stage{stage}.{one}" for one in more)))
    settings = loaded.config.stage(stage)
    one = SampledStage(stage=stage, settings=settings, model=resolve(settings.model, stage))
    return make_sampler(one, None, loaded.config, lambda count: None)


def _stock(stage: Stage, name: str, most: float) -> Any:
    folder = FLAVOURS[f"tiny-{'i' * stage}"].repo
    unet = load_unet(resolve(folder, stage), torch.float32)
    order_channels_last(unet)
    pipeline = stock_pipeline(resolve(folder, stage), stage, unet, make_scheduler("ddpm", DDPMScheduler()))
    pipeline.scheduler = MADE[name](most)
    if pipeline.scheduler.config.get("variance_type") is None:  # which the pipeline asks each scheduler for
        pipeline.scheduler.register_to_config(variance_type=None)
    return pipeline


def test_every_choice_is_held_against_diffusers_own() -> None:
    assert sorted(SCHEDULER_KINDS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_both_stages_sample_as_the_stock_pipelines_with_it(small_run: SmallRun, name: str) -> None:
    common = {"prompt_embeds": TEXT, "negative_prompt_embeds": -TEXT, "num_inference_steps": 4, "output_type": "pt"}

    def seeds() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in (3, 4)]

    stock = _stock(1, name, 1.5)(**common, width=64, height=64, guidance_scale=3.0, generator=seeds()).images
    made = sample_from_text(_sampler(small_run, 1, name, "validation_guidance=3.0"), TEXT, -TEXT, [3, 4], (64, 64))
    assert torch.equal(made, stock.clamp(-1, 1))
    stock = _stock(2, name, 1.0)(
        **common, image=SMALL, width=64, height=64, noise_level=100, guidance_scale=1.0, generator=seeds()
    ).images
    made = sample_upscaled(_sampler(small_run, 2, name), TEXT, -TEXT, [3, 4], SMALL)
    assert torch.equal(made, stock.clamp(-1, 1)) and made.isfinite().all()


@pytest.mark.parametrize(("name", "most"), [("dpm++", 990), ("unipc", 999), ("ddim", 1000)])
def test_no_more_steps_are_taken_than_a_scheduler_has(small_run: SmallRun, name: str, most: int) -> None:
    own = MADE["ddpm"](1.0)
    scheduler: Any = make_scheduler(name, own)  # type: ignore[arg-type]
    scheduler.set_timesteps(most)
    picture = torch.zeros(1, 3, 8, 8)
    for t in scheduler.timesteps:
        picture = scheduler.step(torch.zeros_like(picture), t, picture, return_dict=False)[0]
    assert picture.isfinite().all()
    keys = (f"stage1.validation_noise_scheduler={name}", f"stage1.validation_num_inference_steps={most + 1}")
    with pytest.raises(ConfigError, match=f"takes at most {most}|less than or equal to 1000"):
        load_run(small_run.config, keys)


@pytest.mark.parametrize("name", NAMES)
def test_back_projection_and_img2img_work_with_it(small_run: SmallRun, name: str) -> None:
    fit = {
        said: (low_res(sample_upscaled(_sampler(small_run, 2, name, said), TEXT, TEXT, [3, 4], SMALL)) - SMALL)
        .abs()
        .mean()
        for said in ("validation_back_projection=true", "validation_back_projection=false")
    }
    assert fit["validation_back_projection=true"] < 0.5 * fit["validation_back_projection=false"]
    pictures = torch.nn.functional.interpolate(SMALL, (64, 64), mode="bilinear")
    sampler = _sampler(small_run, 1, name)
    near, far = (
        sample_from_text(sampler, TEXT, TEXT, [3, 4], (64, 64), start=Start(pictures, strength))
        for strength in (0.3, 1.0)
    )
    assert (near - pictures).abs().mean() < (far - pictures).abs().mean()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("most", [1.0, 1.5])
def test_thresholding_of_a_large_picture_is_that_of_a_small_one(
    monkeypatch: pytest.MonkeyPatch, name: Any, most: float
) -> None:
    own = MADE["ddpm"](most)
    sample = torch.randn(2, 3, 40, 50, generator=torch.Generator().manual_seed(0)) * 1.2
    known = own._threshold_sample(sample)
    assert torch.equal(make_scheduler(name, own)._threshold_sample(sample), known)
    monkeypatch.setattr(module, "MOST_VALUES", 100)
    torch.testing.assert_close(make_scheduler(name, own)._threshold_sample(sample), known, rtol=1e-6, atol=1e-6)


def test_a_picture_that_torchs_quantile_does_not_take_is_thresholded() -> None:
    own = MADE["ddpm"](1.5)
    large = torch.full((1, 3, 2400, 2400), 1.2)
    with pytest.raises(RuntimeError, match="too large"):
        own._threshold_sample(large)
    assert float(make_scheduler("ddpm", own)._threshold_sample(large).amax()) == 1.0
