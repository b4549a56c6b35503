"""The data stages on real photographs: those inside the installed scikit-image and scikit-learn, at 64 px and 256 px."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from data_world import DataWorld
from photographs import photographs, upright_rgb
from PIL import Image, ImageOps, UnidentifiedImageError

from deepfloyd_core.store.artifacts import Artifact


def pillow_size(path: Path) -> tuple[int, int] | None:
    """Upright size of a photograph, None for the one TIFF that Pillow does not know."""
    try:
        return ImageOps.exif_transpose(Image.open(path)).size
    except UnidentifiedImageError:
        assert path.name == "multipage_rgb.tif"
        return None


def centre_crop(picture: Image.Image, edge: int) -> np.ndarray:
    """Shorter edge to `edge` by the literal recipe, then the middle."""
    short = min(picture.size)
    goal = round(picture.width * edge / short), round(picture.height * edge / short)
    while picture.width > 1.5 * goal[0] or picture.height > 1.5 * goal[1]:
        step = max(goal[0], round(picture.width * 0.75)), max(goal[1], round(picture.height * 0.75))
        picture = picture.resize(step, Image.Resampling.LANCZOS)
    picture = picture.resize(goal, Image.Resampling.LANCZOS)
    left, top = (goal[0] - edge) // 2, (goal[1] - edge) // 2
    return np.asarray(picture.crop((left, top, left + edge, top + edge)))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, new_world: Callable[[Path], DataWorld]) -> dict[str, Artifact]:
    """Index and pixels of both stages."""
    world = new_world(tmp_path_factory.mktemp("photographs"))
    for name, path in photographs().items():
        copy = world.folder / "pictures" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    run = world.load({"caption_strategy": "filename"}, max_rejected_share=0.5)
    index = world.index(run)
    return {"index": index, "stage1": world.pixels(run, index, 1), "stage2": world.pixels(run, index, 2)}


def rows_of(artifact: Artifact) -> list[dict[str, Any]]:
    return [row for file in sorted(artifact.path.glob("*.parquet")) for row in pq.read_table(file).to_pylist()]


def test_there_are_photographs_to_look_at() -> None:
    names = {name.split("/")[1] for name in photographs()}
    assert {"china.jpg", "flower.jpg", "astronaut.png", "coffee.png", "rocket.jpg", "retina.jpg"} <= names


def test_what_is_accepted_is_what_pillow_says_is_large_enough(prepared: dict[str, Artifact]) -> None:
    sizes = {name: pillow_size(path) for name, path in photographs().items()}
    ledger = {row["source"]: row for row in rows_of(prepared["index"])}
    assert set(ledger) == set(sizes)
    for name, size in sizes.items():
        row = ledger[name]
        assert (row["width"], row["height"]) == (size or (None, None)), name
        assert row["reason"] == ("unsupported" if size is None else None if min(size) >= 64 else "too_small"), name
    for stage, edge in ((1, 64), (2, 256)):
        fit = {name for name, size in sizes.items() if size and min(size) >= edge}
        pixels = prepared[f"stage{stage}"]
        assert {row["source"] for row in rows_of(pixels)} == fit
        assert prepared["index"].manifest.summary[f"stage{stage}"] == len(fit)
        assert pixels.manifest.summary["pictures"] == pixels.manifest.summary["rows"] == len(fit)


@pytest.mark.parametrize(("stage", "edge"), [(1, 64), (2, 256)])
def test_crops_equal_an_independent_computation_to_40_db(prepared: dict[str, Artifact], stage: int, edge: int) -> None:
    for row in rows_of(prepared[f"stage{stage}"]):
        crop = np.frombuffer(row["pixels"], np.uint8).reshape(edge, edge, 3)
        expected = centre_crop(upright_rgb(photographs()[row["source"]]), edge)
        error = np.mean((crop.astype(float) - expected) ** 2)
        assert error <= 255**2 / 10**4, f"{row['source']}: {10 * np.log10(255**2 / error):.1f} dB"


def test_a_photograph_in_adobe_rgb_becomes_srgb(prepared: dict[str, Artifact]) -> None:
    source = "skimage/rocket.jpg"
    raw = Image.open(photographs()[source])
    assert b"Adobe RGB" in raw.info["icc_profile"]
    (crop,) = [row["pixels"] for row in rows_of(prepared["stage1"]) if row["source"] == source]
    untouched = centre_crop(raw.convert("RGB"), 64)
    error = np.mean((np.frombuffer(crop, np.uint8).reshape(64, 64, 3).astype(float) - untouched) ** 2)
    assert 10 * np.log10(255**2 / error) < 35, "the profile was not applied"


def test_contact_sheets_show_the_crops(prepared: dict[str, Artifact]) -> None:
    for stage, edge, cell in ((1, 64, 64), (2, 256, 128)):
        pixels = prepared[f"stage{stage}"]
        sheet = np.asarray(Image.open(pixels.path / "sheet.jpg").convert("RGB")).astype(float)
        row = rows_of(pixels)[0]
        crop = Image.fromarray(np.frombuffer(row["pixels"], np.uint8).reshape(edge, edge, 3))
        shown = np.asarray(crop.resize((cell, cell), Image.Resampling.LANCZOS)).astype(float)
        assert np.mean((sheet[6 : 6 + cell, 6 : 6 + cell] - shown) ** 2) < 255**2 / 10**2.5, "25 dB, JPEG as it is"
