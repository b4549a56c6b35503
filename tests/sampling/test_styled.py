"""Another style for a picture: the three branches of IF's own library, computed here one by one with diffusers' UNet."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler, IFPipeline
from drawn_here import drawn_here, pixels
from PIL import Image
from small_run import SmallRun

from deepfloyd_core.config.run import Run
from deepfloyd_core.config.stages import Stage
from deepfloyd_core.models.unet import load_unet, order_channels_last
from deepfloyd_core.preflight.drawn_again import recorded_options
from deepfloyd_core.preflight.drawn_from import start_faults
from deepfloyd_core.preflight.generate import GenerateOptions, prompt_rows
from deepfloyd_core.preflight.load import load_run
from deepfloyd_core.sampling.styled import StyledUnet

STEPS, GUIDANCE, SHARES = 4, 3.0, {1: 0.25, 2: 0.5}  # IF's `positive_mixer` of its stages
KEYS = tuple(
    f"stage{stage}.{name}={value}"
    for stage in (1, 2)
    for name, value in (("validation_num_inference_steps", STEPS), ("validation_guidance", GUIDANCE))
)
CONTENT, STYLE = "a purple star", "a green square"


class _Pooled(torch.nn.Module):
    """In place of what a UNet makes of its text for the timestep: a value of our own."""

    def __init__(self, value: torch.Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self, _: torch.Tensor) -> torch.Tensor:
        return self.value


@torch.no_grad()
def _by_hand(
    folder: Path, stage: Stage, texts: dict[str, torch.Tensor], x_t: torch.Tensor, first: int,
    generator: torch.Generator, beside: torch.Tensor | None = None, level: int | None = None,
) -> torch.Tensor:  # fmt: skip
    """A stage's steps from one on, each from three calls of the UNet, of one picture each. beside: the low-res picture."""
    unet = load_unet(folder, torch.float32)
    order_channels_last(unet)
    pool = unet.add_embedding
    pooled = {name: pool(text) for name, text in texts.items()}
    scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    scheduler.set_timesteps(STEPS)
    labels = None if level is None else torch.tensor([level])

    def out(time: torch.Tensor, text: str, style: str) -> torch.Tensor:
        unet.add_embedding = _Pooled(pooled[style])
        sample = x_t if beside is None else torch.cat([x_t, beside], 1)
        made: torch.Tensor = unet(sample, time, texts[text], class_labels=labels).sample
        return made

    for time in scheduler.timesteps[first:]:
        negative, content, style = out(time, "", ""), out(time, CONTENT, STYLE), out(time, STYLE, STYLE)
        towards = (1 - SHARES[stage]) * content[:, :3] + SHARES[stage] * style[:, :3]
        noise = negative[:, :3] + GUIDANCE * (towards - negative[:, :3])
        if scheduler.config.variance_type == "learned_range":
            noise = torch.cat([noise, content[:, 3:]], 1)
        x_t = scheduler.step(noise, time, x_t, generator=generator).prev_sample
    return x_t


def _varied(folder: Path, image: Path, texts: dict[str, torch.Tensor]) -> torch.Tensor:
    """Stage I: half of the noise on the picture, and the second half of the steps."""
    scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    scheduler.set_timesteps(STEPS)
    small = Image.open(image).resize((64, 64), Image.Resampling.LANCZOS)
    known = torch.from_numpy(np.array(small)).permute(2, 0, 1)[None].float() / 127.5 - 1
    generator = torch.Generator().manual_seed(3)
    time = scheduler.timesteps[STEPS // 2 : STEPS // 2 + 1]
    x_t = scheduler.add_noise(known, torch.randn(known.shape, generator=generator), time)
    return _by_hand(folder, 1, texts, x_t, STEPS // 2, generator)


def _upscaled(folder: Path, small: torch.Tensor, level: int, texts: dict[str, torch.Tensor]) -> torch.Tensor:
    """Stage II: from noise, beside the noised low-res picture, as diffusers' pipeline orders its draws."""
    generator = torch.Generator().manual_seed(3)
    x_t = torch.randn(1, 3, 256, 256, generator=generator)
    large = torch.nn.functional.interpolate(small.clamp(-1, 1), (256, 256), mode="bilinear", align_corners=True)
    noising = DDPMScheduler.from_pretrained(folder, subfolder="image_noising_scheduler")
    noise = torch.randn(large.shape, generator=generator)
    beside = noising.add_noise(large, noise, torch.tensor([level]))
    return _by_hand(folder, 2, texts, x_t, 0, generator, beside, level)


def _bytes(picture: torch.Tensor) -> np.ndarray:
    made: np.ndarray = ((picture[0].clamp(-1, 1) / 2 + 0.5) * 255).round().permute(1, 2, 0).numpy().astype(int)
    return made


def test_a_picture_in_another_style_is_that_of_three_branches(
    small_run: SmallRun, models: dict[Any, Path], image: Path
) -> None:
    run = load_run(small_run.config, KEYS)
    options = GenerateOptions((CONTENT,), "base", seeds="3", image=image, style=STYLE)
    ours = drawn_here(run, models, small_run.folder / "out", options)
    text = IFPipeline.from_pretrained(
        models[1], unet=None, safety_checker=None, feature_extractor=None, watermarker=None
    )
    embeds = dict(zip((CONTENT, ""), text.encode_prompt(CONTENT, device="cpu"), strict=True))
    embeds[STYLE] = text.encode_prompt(STYLE, device="cpu")[0]
    small = _varied(models[1], image, embeds)
    assert np.abs(pixels(ours["64x64"]) - _bytes(small)).max() <= 1, "a batch of three rounds otherwise"
    large = _upscaled(models[2], small, run.config.stage(2).validation_noise_level, embeds)
    assert np.abs(pixels(ours["256x256"]) - _bytes(large)).max() <= 2
    with Image.open(ours["256x256"]) as picture:
        assert f"Style: {STYLE}" in picture.info["parameters"]
    again, _ = recorded_options(GenerateOptions(image=image), ours["256x256"])
    assert (again.style, again.strength, again.prompts) == (STYLE, 0.5, (CONTENT,))


def test_several_pictures_at_once_are_each_alone(models: dict[Any, Path]) -> None:
    draw = torch.Generator().manual_seed(0)
    unet = load_unet(models[2], torch.float32)
    width = unet.config.encoder_hid_dim
    style, texts = torch.randn(1, 77, width, generator=draw), torch.randn(4, 77, width, generator=draw)
    sample, labels = torch.randn(4, 6, 32, 32, generator=draw), torch.tensor([1, 2, 1, 2])
    styled = StyledUnet(unet, style, 0.5)
    with torch.no_grad():
        (both,) = styled(sample, 500, texts, class_labels=labels)
        for number in range(2):
            pair = [number, number + 2]
            (alone,) = styled(sample[pair], 500, texts[pair], class_labels=labels[pair])
            assert torch.allclose(both[pair], alone, atol=1e-4)


def test_content_in_its_own_style_is_the_picture_varied_and_then_upscaled(
    small_run: SmallRun, models: dict[Any, Path], image: Path
) -> None:
    """u + g ((1 - m) c + m c - u) is plain guidance, in both stages."""
    run = load_run(small_run.config, KEYS)
    styled = drawn_here(
        run, models, small_run.folder / "styled", GenerateOptions((STYLE,), "base", image=image, style=STYLE)
    )
    varied = drawn_here(
        run, models, small_run.folder / "varied", GenerateOptions((STYLE,), "base", image=image, strength=0.5)
    )
    assert np.abs(pixels(styled["64x64"]) - pixels(varied["64x64"])).max() <= 1
    large, small = pixels(styled["256x256"]), pixels(styled["64x64"])
    assert np.abs(large.reshape(64, 4, 64, 4, 3).mean((1, 3)) - small).mean() < 12, (
        "upscaled from noise, not from the image"
    )


def test_a_style_that_cannot_be_given_is_refused(small_run: SmallRun, image: Path) -> None:
    run, plain = load_run(small_run.config, KEYS), load_run(small_run.config)

    def refused(of: Run, **given: Any) -> list[str]:
        return list(start_faults(of, GenerateOptions(("x",), "base", **given), of.config.stages, [(64, 64)]))

    assert refused(run, style="x", image=image) == []
    assert refused(run, style="x") == [
        "--style is given without --image, the picture to start from. Give both, or neither."
    ]
    assert refused(run, style=" ", image=image) == ["The style is empty."]
    found = refused(run, style="x", image=image, mask=image)
    assert found[0] == "--style gives all of a picture another style. Leave out --mask."
    more = [key.replace(f"steps={STEPS}", "steps=20") if key.startswith("stage1") else key for key in KEYS]
    assert refused(load_run(small_run.config, tuple(more)), style="x", image=image, strength=0.2) == [], (
        "Stage II, of 4 steps, starts from noise"
    )
    assert refused(plain, style="x", image=image) == [
        "--style works through the guidance, and stage2.validation_guidance is 1. Set it above 1."
    ]
    assert [row.prompt for row in prompt_rows(GenerateOptions(style="in oil"))] == ["in oil"]
