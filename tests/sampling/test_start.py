"""Pictures that start from one of the user's own: img2img and inpainting of diffusers' pipelines, called by hand."""

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from drawn_here import drawn_here, pixels
from PIL import Image
from small_run import SmallRun

from deepfloyd_core.config.stages import STAGES
from deepfloyd_core.models.unet import load_unet, order_channels_last, stock_pipeline
from deepfloyd_core.pictures.decode import read_mask
from deepfloyd_core.preflight.drawn_again import recorded_options
from deepfloyd_core.preflight.drawn_from import start_faults
from deepfloyd_core.preflight.generate import GenerateOptions
from deepfloyd_core.preflight.load import load_run
from deepfloyd_core.sampling.drawn_picture import drawn_picture

KEYS = tuple(
    f"stage{stage}.{name}={value}"
    for stage in (1, 2)
    for name, value in (("validation_num_inference_steps", 5), ("validation_guidance", 3.0))
)


@pytest.fixture
def mask(tmp_path: Path) -> Path:
    """The right half is white."""
    pixels = np.zeros((256, 256), np.uint8)
    pixels[:, 128:] = 255
    Image.fromarray(pixels).save(tmp_path / "mask.png")
    return tmp_path / "mask.png"


def _by_hand(models: dict[Any, Path], names: tuple[str, str], image: Path, more: dict[str, Any]) -> list[np.ndarray]:
    """Both stages of diffusers, from files that Pillow has opened."""
    made: list[np.ndarray] = []
    text = diffusers.IFPipeline.from_pretrained(
        models[1], unet=None, safety_checker=None, feature_extractor=None, watermarker=None
    )
    embeds, negative = text.encode_prompt("a purple star", device="cpu")
    small: dict[str, Any] = {}
    for stage, name in zip(STAGES, names, strict=True):
        unet = load_unet(models[stage], torch.float32)
        order_channels_last(unet)
        plain = stock_pipeline(
            models[stage], stage, unet, diffusers.DDPMScheduler.from_pretrained(models[stage], subfolder="scheduler")
        )
        pipeline = getattr(diffusers, name)(**plain.components, requires_safety_checker=False)
        edge = 64 if stage == 1 else 256
        fitted = [Image.open(image).resize((edge, edge), Image.Resampling.LANCZOS)]
        given = {"image": fitted} if stage == 1 else {"original_image": fitted, "noise_level": 100, **small}
        result = pipeline(
            prompt_embeds=embeds, negative_prompt_embeds=negative, num_inference_steps=5, guidance_scale=3.0,
            generator=[torch.Generator().manual_seed(3)], output_type="pt", **given, **more,
        ).images  # fmt: skip
        small = {"image": result}
        made.append(((result[0].clamp(-1, 1) / 2 + 0.5) * 255).round().permute(1, 2, 0).numpy().astype(int))
    return made


@pytest.mark.parametrize("masked", [False, True])
def test_both_stages_are_those_of_diffusers(
    small_run: SmallRun, models: dict[Any, Path], image: Path, mask: Path, masked: bool
) -> None:
    run = load_run(small_run.config, KEYS)
    part = mask if masked else None
    options = GenerateOptions(("a purple star",), "base", seeds="3", image=image, mask=part, strength=0.8)
    ours = drawn_here(run, models, small_run.folder / "out", options)
    if masked:
        names = "IFInpaintingPipeline", "IFInpaintingSuperResolutionPipeline"
        more: dict[str, Any] = {"strength": 0.8, "mask_image": [Image.open(mask)]}
    else:
        names, more = ("IFImg2ImgPipeline", "IFImg2ImgSuperResolutionPipeline"), {"strength": 0.8}
    for stock, size in zip(_by_hand(models, names, image, more), ("64x64", "256x256"), strict=True):
        assert np.array_equal(pixels(ours[size]), stock)
    with Image.open(ours["256x256"]) as picture:
        assert "Denoising strength: 0.8" in picture.info["parameters"]
    if masked:
        assert np.array_equal(pixels(ours["256x256"])[:, :128], pixels(image)[:, :128]), "black stays, to the byte"
        assert np.abs(pixels(ours["256x256"])[:, 128:] - pixels(image)[:, 128:]).mean() > 5


def test_less_strength_stays_nearer(small_run: SmallRun, models: dict[Any, Path], image: Path) -> None:
    run = load_run(small_run.config, KEYS)
    near, far = (
        drawn_here(
            run, models, small_run.folder / name, GenerateOptions(("a star",), "base", image=image, strength=strength)
        )
        for name, strength in (("near", 0.2), ("far", None))
    )
    small = pixels(image)[::4, ::4]
    assert np.abs(pixels(near["64x64"]) - small).mean() < np.abs(pixels(far["64x64"]) - small).mean()
    assert drawn_picture(far["64x64"]).strength == 0.7, "as diffusers' img2img"
    again, _ = recorded_options(GenerateOptions(image=image), near["64x64"])
    assert (again.strength, again.image, again.prompts, again.sizes) == (0.2, image, ("a star",), "64x64")


def test_a_picture_that_nothing_can_start_from_is_refused(small_run: SmallRun, image: Path, mask: Path) -> None:
    run, folder = load_run(small_run.config, KEYS), small_run.folder
    marked = Image.new("L", (256, 256))
    marked.save(folder / "black.png")
    marked.paste(255, (100, 100, 103, 103))
    marked.save(folder / "dot.png")
    stroke = Image.new("RGBA", (256, 256), (255, 255, 255, 0))
    stroke.save(folder / "clear.png")
    stroke.paste((255, 255, 255, 255), (0, 0, 256, 100))
    stroke.save(folder / "stroke.png")
    Image.new("L", (64, 256), 255).save(folder / "narrow.png")
    (folder / "text.png").write_text("no picture")

    def refused(**given: Any) -> list[str]:
        options = GenerateOptions(("x",), "base", **given)
        return list(start_faults(run, options, run.config.stages, [(64, 64)]))

    assert refused() == refused(image=image, mask=mask) == refused(image=image, strength=1.0) == []
    assert refused(mask=mask) == ["--mask is given without --image, the picture to start from. Give both, or neither."]
    assert refused(strength=0.5)[0].startswith("--strength is given without --image")
    for strength in (0.0, 1.1, -1.0, float("nan")):
        assert refused(image=image, strength=strength)[0].endswith("give a number above 0, at most 1.")
    assert refused(image=image, strength=0.1) == [
        f"The strength is 0.1 and Stage {number} has 5 steps: that is less than one." for number in ("I", "II")
    ]
    assert "text.png cannot be read" in refused(image=folder / "text.png")[0]
    assert refused(image=image, mask=folder / "narrow.png") == [
        f"The mask {folder / 'narrow.png'} has 64x256 px, and the image 256x256. They must have the same size."
    ]
    for name in ("black", "clear", "dot"):
        (fault,) = refused(image=image, mask=folder / f"{name}.png")
        assert "has nothing white at Stage I's 64x64 px, so nothing would be drawn anew" in fault
    assert refused(image=image, mask=folder / "stroke.png") == []
    assert read_mask(folder / "stroke.png", (64, 64)).mean() == 25 / 64
