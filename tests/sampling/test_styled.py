"""Another style for a picture: the three branches of IF's own library, computed here one by one with diffusers' UNet."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, IFPipeline
from PIL import Image
from small_run import SmallRun

from deepfloyd_core.config.run import Run
from deepfloyd_core.models.unet import load_unet, order_channels_last
from deepfloyd_core.preflight.drawn_from import start_faults
from deepfloyd_core.preflight.generate import GenerateOptions, pictures_of, prompt_rows, recorded_options
from deepfloyd_core.preflight.load import load_run
from deepfloyd_core.processes.jobs import Job
from deepfloyd_core.sampling.generate import generate_pictures
from deepfloyd_core.sampling.identity import generate_request
from deepfloyd_core.sampling.jobs import DrawnFrom, StartPicture, generate_job
from deepfloyd_core.store.pinned import pinned
from deepfloyd_core.types import no_report

STEPS, GUIDANCE, SHARE = 4, 3.0, 0.15
KEYS = tuple(
    f"stage{stage}.{name}={value}"
    for stage in (1, 2)
    for name, value in (("validation_num_inference_steps", STEPS), ("validation_guidance", GUIDANCE))
)
CONTENT, STYLE = "a purple star", "a green square"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    rows, columns = np.mgrid[:256, :256]
    Image.fromarray(np.stack([rows, columns, 255 - rows], axis=2).astype(np.uint8)).save(tmp_path / "image.png")
    return tmp_path / "image.png"


def _drawn(run: Run, models: dict[Any, Path], out: Path, options: GenerateOptions) -> dict[str, Path]:
    """Do the job in this process. Returns its PNGs by their size."""
    out.mkdir()
    assert options.image
    start = StartPicture(image=pinned(options.image), strength=options.noise_strength)
    given = DrawnFrom(start=start, style=options.style)
    pictures = pictures_of(run, options)
    identity = generate_request(run, pictures, "base", models, None, given)
    generate_pictures(Job(generate_job(run, pictures, "base", models, identity, None, given), out, no_report))
    return {file.stem.rpartition("-")[2]: file for file in out.glob("picture-*.png")}


def _pixels(file: Path) -> np.ndarray:
    with Image.open(file) as picture:
        return np.asarray(picture).astype(int)


class _Pooled(torch.nn.Module):
    """In place of what a UNet makes of its text for the timestep: a value of our own."""

    def __init__(self, value: torch.Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self, _: torch.Tensor) -> torch.Tensor:
        return self.value


@torch.no_grad()
def _by_hand(folder: Path, image: Path, texts: dict[str, torch.Tensor], seed: int) -> np.ndarray:
    """Stage I: half of the noise, then each step from three calls of the UNet, of one picture each."""
    unet = load_unet(folder, torch.float32)
    order_channels_last(unet)
    pool = unet.add_embedding
    pooled = {name: pool(text) for name, text in texts.items()}
    scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    scheduler.set_timesteps(STEPS)
    times = scheduler.timesteps[STEPS // 2 :]
    small = Image.open(image).resize((64, 64), Image.Resampling.LANCZOS)
    known = torch.from_numpy(np.array(small)).permute(2, 0, 1)[None].float() / 127.5 - 1
    generator = torch.Generator().manual_seed(seed)
    x_t = scheduler.add_noise(known, torch.randn(known.shape, generator=generator), times[:1])

    def out(time: torch.Tensor, text: str, style: str) -> torch.Tensor:
        unet.add_embedding = _Pooled(pooled[style])
        made: torch.Tensor = unet(x_t, time, texts[text]).sample
        return made

    for time in times:
        negative, content, style = out(time, "", ""), out(time, CONTENT, STYLE), out(time, STYLE, STYLE)
        towards = (1 - SHARE) * content[:, :3] + SHARE * style[:, :3]
        noise = negative[:, :3] + GUIDANCE * (towards - negative[:, :3])
        if scheduler.config.variance_type == "learned_range":
            noise = torch.cat([noise, content[:, 3:]], 1)
        x_t = scheduler.step(noise, time, x_t, generator=generator).prev_sample
    made: np.ndarray = ((x_t[0].clamp(-1, 1) / 2 + 0.5) * 255).round().permute(1, 2, 0).numpy().astype(int)
    return made


def test_a_picture_in_another_style_is_that_of_three_branches(
    small_run: SmallRun, models: dict[Any, Path], image: Path
) -> None:
    run = load_run(small_run.config, KEYS)
    options = GenerateOptions((CONTENT,), "base", seeds="3", image=image, style=STYLE)
    ours = _drawn(run, models, small_run.folder / "out", options)
    text = IFPipeline.from_pretrained(
        models[1], unet=None, safety_checker=None, feature_extractor=None, watermarker=None
    )
    embeds = dict(zip((CONTENT, ""), text.encode_prompt(CONTENT, device="cpu"), strict=True))
    embeds[STYLE] = text.encode_prompt(STYLE, device="cpu")[0]
    known = _by_hand(models[1], image, embeds, 3)
    assert np.abs(_pixels(ours["64x64"]) - known).max() <= 1, "a batch of three rounds otherwise"
    with Image.open(ours["256x256"]) as picture:
        assert f"Style: {STYLE}" in picture.info["parameters"]
    again, _ = recorded_options(GenerateOptions(image=image), ours["256x256"])
    assert (again.style, again.strength, again.prompts) == (STYLE, 0.5, (CONTENT,))


def test_content_in_its_own_style_is_the_picture_varied_and_then_upscaled(
    small_run: SmallRun, models: dict[Any, Path], image: Path
) -> None:
    """u + g ((1 - m) c + m c - u) is plain guidance, in both stages."""
    run = load_run(small_run.config, KEYS)
    styled = _drawn(
        run, models, small_run.folder / "styled", GenerateOptions((STYLE,), "base", image=image, style=STYLE)
    )
    varied = _drawn(
        run, models, small_run.folder / "varied", GenerateOptions((STYLE,), "base", image=image, strength=0.5)
    )
    assert np.abs(_pixels(styled["64x64"]) - _pixels(varied["64x64"])).max() <= 1
    large, small = _pixels(styled["256x256"]), _pixels(styled["64x64"])
    assert np.abs(large.reshape(64, 4, 64, 4, 3).mean((1, 3)) - small).mean() < 12, (
        "upscaled from noise, not from the image"
    )


def test_a_style_that_cannot_be_given_is_refused(small_run: SmallRun, image: Path) -> None:
    run, plain = load_run(small_run.config, KEYS), load_run(small_run.config)

    def refused(of: Run, **given: Any) -> list[str]:
        return list(start_faults(of, GenerateOptions(("x",), "base", **given), [(64, 64)]))

    assert refused(run, style="x", image=image) == []
    assert refused(run, style="x") == [
        "--style is given without --image, the picture to start from. Give both, or neither."
    ]
    assert refused(run, style=" ", image=image) == ["The style is empty."]
    for name in ("mask", "control"):
        found = refused(run, style="x", image=image, **{name: image})
        assert found[0] == f"--style gives all of a picture another style. Leave out --{name}."
    assert refused(plain, style="x", image=image) == [
        "--style works through the guidance, and stage2.validation_guidance is 1. Set it above 1."
    ]
    assert [row.prompt for row in prompt_rows(GenerateOptions(style="in oil"))] == ["in oil"]
