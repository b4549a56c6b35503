"""Options of a data set through the data stages: the guide's file, sizes, limits, faces, unreadable folders, preview."""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from artifact_rows import ledger, live_rows, shown_rows
from data_world import DataWorld
from PIL import Image
from small_run import SmallRun

from deepfloyd_core.config.stages import STAGES
from deepfloyd_core.crops import preview
from deepfloyd_core.crops.preview import save_preview
from deepfloyd_core.crops.rows import eval_ids
from deepfloyd_core.errors import DataError
from deepfloyd_core.index import judge
from deepfloyd_core.index.scan import scan
from deepfloyd_core.store.artifacts import Artifact

PSNR_40 = 255**2 / 10**4


def smooth(seed: int, width: int, height: int) -> np.ndarray:
    """A picture whose character survives shrinking."""
    small = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (9, 7, 3), dtype=np.uint8))
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


def pixels_of(row: dict[str, Any]) -> np.ndarray:
    return np.frombuffer(row["pixels"], np.uint8).reshape(row["height"], row["width"], 3)


# ---- the guide's data file --------------------------------------------------------------------------------------------

GUIDE = """
[
    {
        "id": "primary-dataset",
        "type": "local",
        "instance_data_dir": "PICTURES",
        "crop": true,
        "crop_aspect": "square",
        "crop_style": "random",
        "resolution": 64,
        "resolution_type": "pixel",
        "minimum_image_size": 64,
        "maximum_image_size": 256,
        "target_downsample_size": 128,
        "prepend_instance_prompt": false,
        "instance_prompt": "Your Subject Trigger Phrase or Word",
        "caption_strategy": "instanceprompt",
        "repeats": 1
    },
    {
        "id": "an example backend for text embeds.",
        "dataset_type": "text_embeds",
        "default": true,
        "disable": false,
        "type": "local",
        "cache_dir": "/training/cache/deepfloyd/text/dreambooth"
    }
]
"""


def stepped_down(picture: Image.Image, short: int) -> np.ndarray:
    """A picture brought to a shorter edge in steps of 25 %, with Pillow alone."""
    goal = round(picture.width * short / min(picture.size)), round(picture.height * short / min(picture.size))
    while picture.width > 1.5 * goal[0] or picture.height > 1.5 * goal[1]:
        step = max(goal[0], round(picture.width * 0.75)), max(goal[1], round(picture.height * 0.75))
        picture = picture.resize(step, Image.Resampling.LANCZOS)
    return np.asarray(picture.resize(goal, Image.Resampling.LANCZOS))


GUIDE_SIZES = {
    "large": (900, 620), "above": (300, 257), "at": (256, 400), "own": (90, 200), "least": (64, 64), "small": (63, 400),
}  # fmt: skip


@pytest.fixture(scope="module")
def guided(
    server: str, tmp_path_factory: pytest.TempPathFactory, new_small_run: Callable[[Path], SmallRun]
) -> SmallRun:
    """What `deepfloyd prepare` made with the guide's data file of pictures of several sizes."""
    run = new_small_run(tmp_path_factory.mktemp("guide") / "run")
    for path in run.pictures.iterdir():
        path.unlink()
    for number, (name, size) in enumerate(GUIDE_SIZES.items()):
        Image.fromarray(smooth(number, *size)).save(run.pictures / f"{name}.png")
    (run.folder / "data.json").write_text(GUIDE.replace("PICTURES", str(run.pictures)))
    config = json.loads('{"model_type": "deepfloyd-lora", "model_family": "deepfloyd", "model_flavour": "tiny-i"}')
    paths = {
        "workspace": str(run.workspace),
        "data_backend_config": str(run.folder / "data.json"),
        "num_eval_images": 1,
    }
    (run.folder / "config.json").write_text(json.dumps({**config, **paths}))
    done = run.call_here("prepare", str(run.folder / "config.json"))
    assert done.returncode == 0, done.stderr
    assert "cache_dir is ignored" in done.stderr
    return run


def guided_crops(run: SmallRun) -> list[dict[str, Any]]:
    (made,) = run.workspace.glob("stage1_pixels/*")
    return shown_rows(Artifact("stage1_pixels", made.name, made))


@pytest.mark.slow
def test_the_guides_data_file_takes_the_pictures_that_its_text_says_twice(guided: SmallRun) -> None:
    (index,) = guided.workspace.glob("image_index/*/index.parquet")
    reasons = {row["source"]: row["reason"] for row in pq.read_table(index).to_pylist()}
    assert reasons == {f"{name}.png": "too_small" if name == "small" else None for name in GUIDE_SIZES}
    rows = guided_crops(guided)
    shown = {f"{name}.png": 2 for name in GUIDE_SIZES if name != "small"}
    assert Counter(row["source"] for row in rows) == shown, "repeats: 1"
    places = {(row["source"], row["repeat"]): (row["crop_left"], row["crop_top"]) for row in rows}
    assert all(places[f"{name}.png", 0] != places[f"{name}.png", 1] for name in ("large", "above", "at", "own"))


@pytest.mark.slow
def test_the_guides_data_file_crops_and_shrinks_as_its_text_says(guided: SmallRun) -> None:
    for row in guided_crops(guided):
        assert (row["width"], row["height"], row["crop_style"]) == (64, 64, "random")
        assert row["caption"] == "Your Subject Trigger Phrase or Word"
        original = Image.open(guided.pictures / row["source"])
        large = min(original.size) > 256
        scaled = stepped_down(original, 128) if large else np.asarray(original)
        left = row["crop_left"] * scaled.shape[1] / original.width
        top = row["crop_top"] * scaled.shape[0] / original.height
        assert (left, top) == (pytest.approx(round(left)), pytest.approx(round(top))), (
            "whole pixels of the scaled picture"
        )
        expected = scaled[round(top) : round(top) + 64, round(left) : round(left) + 64]
        if large:
            assert np.mean((pixels_of(row).astype(float) - expected) ** 2) <= PSNR_40
            assert row["crop_height"] == pytest.approx(64 * original.height / scaled.shape[0])
        else:
            assert np.array_equal(pixels_of(row), expected), "at or below the maximum: its own pixels"


# ---- sizes ------------------------------------------------------------------------------------------------------------


def test_each_picture_goes_to_the_bucket_of_its_shape_at_both_stages(world: DataWorld) -> None:
    shapes = {
        "square.png": (400, 390),
        "wide.png": (600, 400),
        "tall.png": (300, 533),
        "odd.png": (90, 70),
        "pan.png": (900, 128),
    }
    for number, (name, size) in enumerate(shapes.items()):
        world.add(name, smooth(number, *size))
    run = world.load({"crop_aspect": "preserve"}, shard_mib=0.1, max_rejected_share=0.5)
    index = world.index(run)
    row = ledger(index)["pan.png"]
    assert (row["reason"], row["detail"]) == ("aspect_out_of_range", "900x128 px, aspect 7.03")
    for stage, times in zip(STAGES, (1, 4), strict=True):
        pixels = world.pixels(run, index, stage)
        found = {row["source"]: (row["width"] // times, row["height"] // times) for row in live_rows(pixels)}
        expected = {"square.png": (64, 64), "wide.png": (96, 64), "tall.png": (64, 112), "odd.png": (80, 64)}
        assert found == {name: size for name, size in expected.items() if stage == 1 or name != "odd.png"}
        for file in pixels.path.glob("*.parquet"):
            sizes = {(row["width"], row["height"]) for row in pq.read_table(file).to_pylist()}
            assert len(sizes) == 1, "one size a file"
            assert "x".join(map(str, sizes.pop())) in file.name
        assert set(pixels.manifest.summary["sizes"]) == {f"{w * times}x{h * times}" for w, h in found.values()}
        assert (pixels.path / "sheet.jpg").is_file()


def test_without_a_crop_all_of_the_picture_is_in_it(world: DataWorld) -> None:
    world.add("a.png", smooth(0, 600, 400))
    world.add("b.png", smooth(1, 640, 480))
    run = world.load({"crop": False, "crop_style": "random", "maximum_image_size": 100, "target_downsample_size": 70},
                     stages=(1,))  # fmt: skip
    rows = {row["source"]: row for row in live_rows(world.pixels(run, world.index(run), 1))}
    exact, cut = rows["a.png"], rows["b.png"]
    assert (exact["crop_left"], exact["crop_top"], exact["crop_width"], exact["crop_height"]) == (0, 0, 600, 400)
    assert (cut["width"], cut["height"], cut["crop_style"]) == (88, 64, "center")
    assert (cut["crop_left"], cut["crop_width"]) == (0, 640)
    assert cut["crop_top"] == pytest.approx(480 / 66)
    assert cut["crop_height"] == pytest.approx(480 * 64 / 66), "what the alignment leaves over is cut centrally"


def test_the_eval_set_holds_out_pictures_of_several_sizes(world: DataWorld) -> None:
    for number in range(8):
        world.add(f"{number}.png", smooth(number, 300 + 100 * (number % 3), 300))
    run = world.load({"crop_aspect": "preserve", "crop_style": "random"}, num_eval_images=5)
    held_out = world.eval_set(run, world.index(run))
    assert len(eval_ids(held_out)) == 5
    for stage in (1, 2):
        rows = live_rows(held_out, stage)
        assert len(rows) == 5
        assert len({(row["width"], row["height"]) for row in rows}) > 1
        assert {row["crop_style"] for row in rows} == {"center"}


@pytest.mark.slow
def test_a_run_trains_and_samples_both_stages_on_several_sizes(
    server: str, tmp_path: Path, new_small_run: Callable[[Path], SmallRun]
) -> None:
    run = new_small_run(tmp_path / "run")
    entries = json.loads((run.folder / "data.json").read_text())
    (run.folder / "data.json").write_text(json.dumps([{**entry, "crop_aspect": "preserve"} for entry in entries]))
    keys = ("stage1.max_train_steps=4", "stage2.max_train_steps=2", "validation_resolution=96x64", "num_eval_images=3")
    done = run.call_here("run", str(run.config), *(part for key in keys for part in ("--set", key)))
    assert done.returncode == 0, done.stderr
    for stage in (1, 2):
        (manifest,) = run.workspace.glob(f"stage{stage}_pixels/*/manifest.json")
        assert len(json.loads(manifest.read_text())["summary"]["sizes"]) > 1
    (bundle,) = (run.workspace / "lora_bundle").iterdir()
    assert {"sheet.png", "eval.png"} <= {path.name for path in bundle.iterdir()}


# ---- limits -----------------------------------------------------------------------------------------------------------


def test_a_limited_set_uses_the_same_pictures_as_others_come_and_go(world: DataWorld) -> None:
    for number in range(12):
        world.add(f"{number}.png", smooth(number, 70, 70))
    world.add("broken.png", b"no picture")

    def used(**keys: Any) -> set[str]:
        run = world.load({"max_num_samples": 5}, stages=(1,), **keys)
        index = world.index(run)
        rows = ledger(index)
        out = {source for source, row in rows.items() if row["reason"] == "beyond_max_num_samples"}
        accepted = {source for source, row in rows.items() if row["status"] == "accepted"}
        assert len(accepted) == min(5, len(accepted | out))
        assert {row["source"] for row in live_rows(world.pixels(run, index, 1))} == accepted
        return accepted

    before = used(max_rejected_share=0.17)  # 1 of 6: what is left out by request does not count
    with pytest.raises(DataError, match=r"1 of 6 pictures was rejected .*: a share of 0\.17"):
        used(max_rejected_share=0.16)
    for name in sorted({f"{number}.png" for number in range(12)} - before)[:4]:
        (world.folder / "pictures" / name).unlink()
    assert used() == before, "those that were not used are not missed"
    for number in range(20, 30):
        world.add(f"{number}.png", smooth(number, 70, 70))
    assert 0 < len(used() & before) < 5, "of a larger set a few others have smaller hashes"
    assert used(seed=1) != used(seed=2)


def test_a_directory_that_cannot_be_listed_is_a_row(world: DataWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    world.add("good.png", smooth(0, 70, 70))
    world.add("locked/hidden.png", smooth(1, 70, 70))
    scandir = os.scandir

    def refusing(path: str) -> Iterator[os.DirEntry[str]]:
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)  # root, who may run the tests, can list everything
    run = world.load(stages=(1,), max_rejected_share=0.5)
    rows = ledger(world.index(run))
    assert {source: row["reason"] for source, row in rows.items()} == {"good.png": None, "locked/": "unreadable"}


# ---- faces ------------------------------------------------------------------------------------------------------------


def test_a_face_places_the_crop_and_the_shard_says_where_there_was_none(world: DataWorld) -> None:
    pytest.importorskip("cv2", reason="faces need OpenCV: pip install 'deepfloyd-pipeline[face]'")
    import skimage

    folder = Path(skimage.__file__).parent / "data"
    for name in ("astronaut.png", "coffee.png", "coins.png"):
        world.add(name, (folder / name).read_bytes(), "a picture")
    run = world.load({"crop_style": "face", "maximum_image_size": 256, "target_downsample_size": 128}, stages=(1,))
    index = world.index(run)
    faces = {source: row["face"] for source, row in ledger(index).items()}
    assert faces["coffee.png"] is None and faces["coins.png"] is None
    left, top, width, height = faces["astronaut.png"]
    assert abs(left + width / 2 - 225) < 15 and abs(top + height / 2 - 115) < 15, "the middle of her face"
    rows = {row["source"]: row for row in live_rows(world.pixels(run, index, 1))}
    assert {source: row["crop_style"] for source, row in rows.items()} == {
        "astronaut.png": "face", "coffee.png": "center", "coins.png": "center",
    }  # fmt: skip
    row = rows["astronaut.png"]
    assert row["crop_left"] <= left and left + width <= row["crop_left"] + row["crop_width"]
    assert row["crop_top"] <= top and top + height <= row["crop_top"] + row["crop_height"]


# ---- preview ----------------------------------------------------------------------------------------------------------


def test_the_preview_shows_the_crops_and_decodes_nothing_else(
    world: DataWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(9):
        world.add(f"{number}.png", smooth(number, 150, 90), f"caption {number} " + "long " * 60)
    world.add("broken.png", b"no picture")
    run = world.load({"crop_style": "random", "crop_aspect": "preserve"}, stages=(1,), max_rejected_share=0.5)
    decoded: list[str] = []

    def recorded(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def decode(*arguments: Any) -> Any:
            decoded.append(name)
            return real(*arguments)

        return decode

    for module, name in ((preview, "take_crops"), (judge, "check_decodes")):
        monkeypatch.setattr(module, name, recorded(name, getattr(module, name)))
    paths = [world.folder / name for name in ("one.png", "two.png")]
    assert [save_preview(run, 4, path)[0] for path in paths] == [4, 4]
    assert Counter(decoded) == {"take_crops": 8, "check_decodes": 8}, "four pictures twice"
    assert paths[0].read_bytes() == paths[1].read_bytes()
    sheet = np.asarray(Image.open(paths[0]))
    assert sheet.shape[0] > 2 * preview.CELL_PX
    shown, _ = preview.choose_shown(run, 4, scan(run))
    box = np.all(sheet == STAGES[1].colour, axis=-1)
    assert box.sum() > 4 * 4 * 50, "the boxes are drawn"
    planned = {(row["source"], row["crop_left"]) for row in live_rows(world.pixels(run, world.index(run), 1))}
    assert {(one.row.source, one.crops[1].crop.source_box[0]) for one in shown} <= planned, (
        "the crops of the run itself"
    )
    count, unusable = save_preview(run, 1000, paths[0])
    said = "1 other cannot be used (1 unsupported). For example broken.png: not a picture of a known format."
    assert (count, unusable) == (9, said)


def test_the_preview_is_a_command_that_prints_where_it_is(world: DataWorld) -> None:
    import subprocess
    import sys

    for number in range(3):
        world.add(f"{number}.png", smooth(number, 100, 80))
    for number in range(3, 5):
        world.add(f"{number}.png", smooth(number, 100, 80), caption=None)
    world.load(stages=(1,))
    command = [sys.executable, "-P", "-m", "flows", "prepare", str(world.folder / "run.json"), "--preview", "24"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=world.folder)
    assert done.returncode == 0, done.stderr
    path = world.folder / "workspace" / "preview.png"
    assert done.stdout.strip() == f"3 pictures with their crops: {path}"
    assert done.stderr.startswith("note: 2 others cannot be used (2 caption_missing). For example ")
    assert Image.open(path).format == "PNG"
    made = {found.name for found in path.parent.iterdir()}
    assert made == {".scan", ".locks", path.name}, "no artifact was made, no server started"


def test_a_preview_without_a_usable_picture_says_so(world: DataWorld) -> None:
    world.add("small.png", smooth(0, 20, 20))
    with pytest.raises(DataError, match="No picture of the data sets can be used"):
        save_preview(world.load(stages=(1,)), 3, world.folder / "preview.png")
