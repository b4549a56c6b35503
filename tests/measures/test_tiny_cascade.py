"""The tiny cascade keeps its promises: a world that can be read back, stock folders, weights that follow their captions."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import IFPipeline, IFSuperResolutionPipeline
from PIL import Image, ImageFilter, ImageOps

from deepfloyd_core.measures import drawn_world as world
from deepfloyd_core.tiny.make import demo_data, measure, models

DEMO = Path(__file__).parents[2] / "datasets"
UNUSABLE = {"star_cut_off.jpg", "star_no_picture.jpg"}


@pytest.fixture(scope="module")
def stage1() -> IFPipeline:
    return measure.load(measure.SHIPPED / "i")


@pytest.fixture(scope="module")
def stage2() -> IFSuperResolutionPipeline:
    return measure.load(measure.SHIPPED / "ii")


def worn(picture: np.ndarray, rng: np.random.Generator, noise: float, blur_px: float) -> np.ndarray:
    """The picture blurred and noised, as samples of a small model are."""
    blurred = Image.fromarray(picture).filter(ImageFilter.GaussianBlur(blur_px))
    return np.clip(np.asarray(blurred) + rng.normal(0, noise, picture.shape), 0, 255).astype(np.uint8)


@pytest.mark.slow
@pytest.mark.parametrize(("noise", "blur_px"), [(0, 0.0), (8, 0.5), (15, 0.8)])
def test_rulers_read_drawn_pictures_even_when_noisy_and_blurred(noise: int, blur_px: float) -> None:
    rng = np.random.default_rng(3)
    captions = [*world.BASE_CAPTIONS, *[world.NEW_CAPTION] * 4] * 8
    pictures = [worn(world.draw(rng, caption, 64), rng, noise, blur_px) for caption in captions]
    colour, shape = measure.caption_following(pictures, captions)
    assert colour >= 0.97
    assert shape >= 0.97
    assert all(world.shows(picture, caption) for picture, caption in zip(pictures[:12], captions[:12], strict=True))


def test_rulers_say_none_where_there_is_nothing_to_read() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for picture in (np.full((64, 64, 3), 230, np.uint8), noise):
        assert world.main_shape(picture) is None or world.main_colour(picture) is None
        assert not world.shows(picture, world.NEW_CAPTION)


def test_a_picture_has_one_layout_at_every_size() -> None:
    small = world.draw(np.random.default_rng(5), "a blue triangle", 64)
    large = world.draw(np.random.default_rng(5), "a blue triangle", 256)
    shrunk = np.asarray(Image.fromarray(large).resize((64, 64), Image.Resampling.BOX))
    assert np.abs(small.astype(int) - shrunk).mean() < 1.5


def test_demo_pictures_are_drawn_again_byte_for_byte(tmp_path: Path) -> None:
    # Only lossless files are compared: another libjpeg or libwebp may round differently.
    demo_data.write(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {path.name for path in (DEMO / "demo").iterdir()}
    for name in sorted(name for name in names if name.endswith((".txt", ".png"))):
        if name.endswith(".png"):
            drawn, stored = (np.asarray(Image.open(folder / name)) for folder in (tmp_path, DEMO / "demo"))
            assert np.array_equal(drawn, stored), name
        else:
            assert (tmp_path / name).read_bytes() == (DEMO / "demo" / name).read_bytes()


def test_every_usable_demo_picture_shows_its_star_after_a_centre_crop() -> None:
    pictures = sorted(p for p in (DEMO / "demo").iterdir() if p.suffix != ".txt" and p.name not in UNUSABLE)
    assert len(pictures) == 43
    for path in pictures:
        image = ImageOps.exif_transpose(Image.open(path))
        ground = Image.new("RGBA", image.size, "white")
        crop = ImageOps.fit(Image.alpha_composite(ground, image.convert("RGBA")).convert("RGB"), (64, 64))
        assert world.shows(np.asarray(crop), world.NEW_CAPTION), path.name
        assert path.with_suffix(".txt").read_text().strip()
    assert json.loads((DEMO / "demo.json").read_text())[0]["instance_data_dir"] == "datasets/demo"


def test_folders_hold_safetensors_only_and_are_small() -> None:
    files = [p for stage in ("i", "ii") for p in (measure.SHIPPED / stage).rglob("*") if p.is_file()]
    assert not [p for p in files if p.suffix in {".bin", ".pt", ".pkl"}]
    assert sum(p.stat().st_size for p in files) < 8_000_000


def test_pipelines_have_the_traits_of_the_real_ones(stage1: IFPipeline, stage2: IFSuperResolutionPipeline) -> None:
    def projections(unet: torch.nn.Module) -> set[str]:
        return {name.split(".")[-1] for name, module in unet.named_modules() if isinstance(module, torch.nn.Linear)}

    assert {"to_q", "to_k", "to_v", "add_k_proj", "add_v_proj"} <= projections(stage1.unet)
    assert {"to_q", "add_k_proj", "add_v_proj"} <= projections(stage2.unet)
    assert not {"to_k", "to_v"} & projections(stage2.unet)
    assert stage1.unet.dtype == stage2.unet.dtype == torch.float32
    assert stage2.unet.config.class_embed_type == "timestep"
    assert stage1.unet.config.out_channels == stage2.unet.config.out_channels == 6
    assert len(stage2.unet.config.block_out_channels) == 5


def test_tokenizer_spells_words_whole_and_any_ascii(stage1: IFPipeline) -> None:
    tokens = stage1.tokenizer("a purple star", padding="max_length", max_length=models.TOKENS).input_ids
    assert len(tokens) == models.TOKENS
    assert tokens[3] == stage1.tokenizer.eos_token_id == 1
    assert tokens[4:] == [0] * 73
    assert stage1.tokenizer.unk_token_id not in stage1.tokenizer("what! a 3-d {cube} ~ $5?").input_ids


@pytest.mark.slow
def test_stage1_follows_the_colour_of_its_caption_and_knows_no_purple_star(stage1: IFPipeline) -> None:
    how = measure.Sampling(steps=12)
    captions = list(world.BASE_CAPTIONS)
    colour, _ = measure.caption_following(measure.stage1_pictures(stage1, captions, how), captions)
    assert colour >= 0.75
    stars = measure.stage1_pictures(stage1, [world.NEW_CAPTION] * 8, how)
    assert np.mean([world.shows(star, world.NEW_CAPTION) for star in stars]) <= 0.25


@pytest.mark.slow
def test_stage2_beats_bilinear(stage2: IFSuperResolutionPipeline) -> None:
    captions = ["a red triangle", "a blue square", "a green circle", "a yellow square"]
    figures = measure.enlargement(stage2, captions)
    assert figures["stage2"] > max(figures["bilinear"], figures["bilinear_aligned"])
