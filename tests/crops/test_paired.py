"""Pictures of a second place that a ControlNet follows: found by name, cropped as their pictures, fed beside them."""

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from artifact_rows import finished_names, ledger, live_rows
from data_world import DataWorld, Picture
from model_cards import generated, run_card
from narrowing import known
from PIL import Image
from small_run import SmallRun
from training_parts import FOLDERS, planned_name

from deepfloyd_core.adapters.controlnet import add_control
from deepfloyd_core.adapters.lora import trainable
from deepfloyd_core.config.run import Run
from deepfloyd_core.config.stage import StageConfig
from deepfloyd_core.crops.conditioning import plan_conditioning
from deepfloyd_core.crops.eval_pictures import eval_pictures
from deepfloyd_core.crops.identity import conditioning_request
from deepfloyd_core.crops.pixels import ShardPlan, ShardResult, build_shard, build_shards
from deepfloyd_core.crops.preview import save_preview
from deepfloyd_core.crops.rows import eval_ids
from deepfloyd_core.crops.summary import CropsSummary
from deepfloyd_core.diffusion.conditioning import as_conditioning, conditioning_picture
from deepfloyd_core.diffusion.loss import Text, to_model_range
from deepfloyd_core.errors import ConfigError, DataError, StorageError
from deepfloyd_core.index.identity import index_request
from deepfloyd_core.index.pairs import same_aspect
from deepfloyd_core.index.scan import scan
from deepfloyd_core.models.unet import load_scheduler, load_unet
from deepfloyd_core.sampling.specs import sample_specs
from deepfloyd_core.store.artifacts import Artifact, WorkDir, materialise
from deepfloyd_core.training.batches import MixedOrder, OrderSettings, TrainingRows
from deepfloyd_core.training.eval_loss import grid_pictures
from deepfloyd_core.training.forward import TrainingContext, batch_loss, prepare
from deepfloyd_core.training.identity import lora_request
from deepfloyd_core.training.jobs import TrainingInputs

FOLDER = FOLDERS[1]
PAIRED = {"model_flavour": "tiny-i", "controlnet": True, "controlnet_conditioning": "paired"}
OWN_SCALE: dict[str, Any] = {"minimum_image_size": 64, "maximum_image_size": 256, "target_downsample_size": 256}


def photo(seed: int, width: int, height: int) -> Image.Image:
    """Smooth colours that differ everywhere: a few noise pixels, enlarged."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 7, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def turned(picture: Image.Image) -> bytes:
    """A JPEG whose EXIF says that it lies on its side."""
    exif, out = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    picture.save(out, "JPEG", quality=90, exif=exif)
    return out.getvalue()


@dataclass(frozen=True)
class PairedWorld:
    """A world of pictures with a second folder."""

    world: DataWorld

    @property
    def pairs(self) -> Path:
        """The second folder."""
        return self.world.folder / "pairs"

    def add(self, name: str, picture: Picture, pair: Picture | None = None, pair_name: str | None = None) -> None:
        """A picture, and its pair under the name of its own."""
        self.world.add(name, picture)
        if pair is not None:
            self.add_pair(pair_name or name, pair)

    def add_pair(self, name: str, pair: Picture) -> None:
        path = self.pairs / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(pair, bytes):
            path.write_bytes(pair)
        else:
            (Image.fromarray(pair) if isinstance(pair, np.ndarray) else pair).save(path, compress_level=1)

    def edges(self, **keys: Any) -> dict[str, Any]:
        """The entry of the second folder."""
        return {"id": "edges", "dataset_type": "conditioning", "instance_data_dir": str(self.pairs), **keys}

    def load(self, *others: dict[str, Any], stage1: dict[str, Any] = PAIRED, **keys: Any) -> Run:
        """A run of Stage I on one set of pictures with these keys."""
        self.pairs.mkdir(exist_ok=True)
        first = {"conditioning_data": "edges", "crop_style": "random", **keys}
        return self.world.load(first, self.edges(), *others, stages=(1,), stage1=stage1, max_rejected_share=0.95)

    def made(self, run: Run) -> dict[str, Artifact]:
        """The data stages."""
        index = self.world.index(run)
        made = {"index": index, "pixels": self.world.pixels(run, index, 1), "eval_set": self.world.eval_set(run, index)}
        made["pairs"] = self.world.conditioning(run, index, made["pixels"])
        made["eval_pairs"] = self.world.conditioning(run, index, made["eval_set"])
        return made


@pytest.fixture
def paired(world: DataWorld) -> PairedWorld:
    return PairedWorld(world)


def both(made: dict[str, Artifact]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Each row of the pixels and of the eval set with that of its pair, as pyarrow reads them."""
    found = []
    for pictures, pairs in (("pixels", "pairs"), ("eval_set", "eval_pairs")):
        found += list(zip(live_rows(made[pictures]), live_rows(made[pairs]), strict=True))
    return found


SHAPES: dict[str, dict[str, Any]] = {
    "random squares": {"repeats": 2},
    "at their own scale": OWN_SCALE,
    "preserved": {"crop_aspect": "preserve"},
    "drawn shapes": {"crop_aspect": "random", "crop_aspect_buckets": [1.0, 0.75, 1.5], "repeats": 1},
    "whole": {"crop": False},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_pairs_that_are_the_pictures_themselves_come_out_as_the_same_bytes(paired: PairedWorld, shape: str) -> None:
    for number, size in enumerate([(200, 150), (150, 200), (96, 96), (300, 260), (128, 160)]):
        paired.add(f"{number}.png", photo(number, *size))
    paired.world.add("deep/turned.jpg", turned(photo(9, 220, 140)))
    shutil.copytree(paired.world.folder / "pictures", paired.pairs)
    rows = both(paired.made(paired.load(**SHAPES[shape])))
    assert len(rows) >= 6 + 1
    for picture, pair in rows:
        assert pair["pixels"] == picture["pixels"] and pair["source"] == picture["source"]
    assert len({picture["pixels"] for picture, _ in rows}) >= 6


def colour(name: str) -> tuple[int, int, int]:
    """A colour of each name's own, which no crop or resize changes."""
    red, green, blue = np.random.default_rng(list(name.encode())).integers(0, 256, 3).tolist()
    return red, green, blue


def test_every_row_is_followed_by_the_pair_of_its_own_picture(paired: PairedWorld) -> None:
    """Two sets with two folders, several sizes, names that differ in case and extension, more pairs than pictures."""
    other = paired.world.folder / "other"
    for number in range(12):
        name = f"{'ab'[number % 2]}/{'xyZ'[number % 3]}{number}"
        size = (150, 100) if number % 2 else (100, 140)
        paired.add(f"{name}.png", photo(number, *size), Image.new("RGB", size, colour(name)), f"{name}.webp")
        Path(paired.pairs / f"{name}.webp").unlink()
        paired.add_pair(f"{name}.bmp", Image.new("RGB", size, colour(name)))
        paired.add_pair(f"{name.swapcase()}.bmp", Image.new("RGB", size))
        (other / "pictures").mkdir(parents=True, exist_ok=True)
        photo(100 + number, 90, 90).save(other / "pictures" / f"{number}.png")
        (other / "pairs").mkdir(exist_ok=True)
        Image.new("RGB", (90, 90), colour(f"{number}")).save(other / "pairs" / f"{number}.png")
    run = paired.load(
        {"id": "a set", "instance_data_dir": str(other / "pictures"), "conditioning_data": "its", "crop_aspect": "square",
         "caption_strategy": "filename"},
        {"id": "its", "dataset_type": "conditioning", "instance_data_dir": str(other / "pairs")},
        crop_aspect="preserve", repeats=1,
    )  # fmt: skip
    made = paired.made(run)
    rows = both(made)
    assert (
        made["pixels"].manifest.summary["shown_per_epoch"] == 24 + 12
        and len({picture["dataset_id"] for picture, _ in rows}) == 2
    )
    for picture, pair in rows:
        pixels = np.frombuffer(pair["pixels"], np.uint8).reshape(-1, 3)
        assert (pixels == colour(picture["source"].removesuffix(".png"))).all(), picture["source"]
        assert len(pixels) == picture["width"] * picture["height"]
    said = ledger(made["index"])["a/x0.png"]
    assert said["conditioning"] == "a/x0.bmp" and len(said["conditioning_id"]) == 64

    trained = TrainingRows(made["pixels"], eval_ids(made["eval_set"]), made["pairs"])
    order = MixedOrder(trained, {}, OrderSettings(3, 1, 20, 7, True))
    names = {row["image_id"]: row["source"] for row in ledger(made["index"]).values()}
    for number in range(20):
        batch = trained.take(*order.batch(number))
        assert batch.pairs is not None and batch.pairs.shape == batch.pixels.shape
        for pair, image in zip(batch.pairs, trained.image_ids(batch), strict=True):
            assert (pair.numpy() == colour(names[image].removesuffix(".png"))).all()


@pytest.mark.parametrize("size", [(150, 100), (600, 400)])
def test_a_pair_of_another_size_is_cropped_where_its_picture_is(paired: PairedWorld, size: tuple[int, int]) -> None:
    """Against Pillow's own resize of the box that the picture's shard names."""
    picture = photo(3, 300, 200)
    pair = picture.resize(size, Image.Resampling.LANCZOS)
    for number in range(2):
        paired.add(f"{number}.png", photo(number, 300, 200), pair)
    rows = both(paired.made(paired.load(repeats=3, **OWN_SCALE)))
    assert len({row["crop_left"] for row, _ in rows}) > 2
    for row, own in rows:
        scale = size[0] / 300
        left, top, width, height = (row[f"crop_{name}"] * scale for name in ("left", "top", "width", "height"))
        expected = pair.resize((64, 64), Image.Resampling.LANCZOS, (left, top, left + width, top + height))
        found = np.frombuffer(own["pixels"], np.uint8).reshape(64, 64, 3).astype(float)
        error = np.square(found - np.asarray(expected, float)).mean()
        assert error < 255**2 / 10**3.5, "35 dB"


def test_pairs_are_decoded_as_pictures_are(paired: PairedWorld) -> None:
    """EXIF turned, alpha on white, 16-bit and 8-bit gray."""
    clear = np.zeros((64, 64, 4), np.uint8)
    clear[:, 32:] = 10, 20, 30, 255
    wide = np.full((64, 64), 257 * 100, np.uint16)
    lying = Image.new("RGB", (64, 64), (200, 0, 0))
    lying.paste((0, 0, 200), (0, 0, 64, 32))  # the upper half, which is at the right once it is turned upright
    pairs: dict[str, np.ndarray] = {"clear": clear, "wide": wide, "gray": np.full((64, 64), 7, np.uint8)}
    for number, (name, pair) in enumerate(pairs.items()):
        paired.add(f"{name}.png", photo(number, 64, 64), pair)
    paired.add("lying.png", photo(8, 64, 64), turned(lying), "lying.jpg")
    rows = [pair for _, pair in both(paired.made(paired.load()))]
    seen = {row["source"]: np.frombuffer(row["pixels"], np.uint8).reshape(64, 64, 3).astype(int) for row in rows}
    assert (seen["clear.png"][:, :32] == 255).all() and (seen["clear.png"][:, 32:] == (10, 20, 30)).all()
    assert (seen["wide.png"] == 100).all() and (seen["gray.png"] == 7).all()
    assert np.abs(seen["lying.jpg"][:, 40:] - (0, 0, 200)).max() < 12
    assert np.abs(seen["lying.jpg"][:, :24] - (200, 0, 0)).max() < 12


def test_a_picture_without_a_pair_that_can_be_followed_is_a_row_of_the_ledger(paired: PairedWorld) -> None:
    good = photo(1, 120, 80)
    buffer = io.BytesIO()
    photo(2, 120, 80).save(buffer, "JPEG")
    paired.add("good.png", good, good)
    paired.add("rounded.png", photo(4, 121, 80), photo(4, 60, 40))
    paired.add("last.png", photo(5, 120, 80), good)
    paired.add("alone.png", good)
    paired.add("Case.png", good, good, "case.png")
    paired.add("cut.png", good, buffer.getvalue()[:-200], "cut.jpg")
    paired.add("text.png", good, b"no picture", "text.png")
    paired.add("shape.png", good, photo(1, 120, 84))
    paired.add("turned.png", good, photo(1, 80, 120))
    paired.add("two.png", good, good, "two.png")
    paired.add_pair("two.jpg", good)
    paired.add("broken.png", b"no picture")
    paired.world.add("untold.png", good, caption=None)
    run = paired.load()
    index = paired.world.index(run)
    rows = {source.removesuffix(".png"): row for source, row in ledger(index).items()}
    assert {name: row["reason"] for name, row in rows.items()} == {
        "good": None, "rounded": None, "last": None, "alone": "conditioning_missing", "Case": "conditioning_missing",
        "cut": "conditioning_unreadable", "text": "conditioning_unreadable", "shape": "conditioning_aspect",
        "turned": "conditioning_aspect", "two": "conditioning_ambiguous", "broken": "unsupported",
        "untold": "caption_missing",
    }  # fmt: skip
    assert rows["shape"]["detail"] == "shape.png is 120x84 px, its picture 120x80 px"
    assert rows["two"]["detail"] == "two.jpg and two.png" and rows["two"]["conditioning_id"] is None
    assert "cut.jpg" in rows["cut"]["detail"] and "truncated" in rows["cut"]["detail"]
    assert index.manifest.summary["accepted"] == 3 and (index.path / "rejected.png").exists()
    assert save_preview(run, 12, paired.world.folder / "preview.png")[0] == 3
    with pytest.raises(DataError, match=r"2 conditioning_aspect, 2 conditioning_missing.*max_rejected_share = 0.1"):
        paired.world.index(paired.world.load(
            {"conditioning_data": "edges"}, paired.edges(), stages=(1,), stage1=PAIRED, max_rejected_share=0.1
        ))  # fmt: skip


def test_a_pair_that_would_not_fit_into_memory_is_a_row_of_the_ledger(paired: PairedWorld) -> None:
    paired.add("small.png", photo(1, 120, 120), photo(1, 120, 120))
    paired.add("bomb.png", photo(2, 120, 120), Image.new("L", (7000, 7000)))
    run = paired.world.load(
        {"conditioning_data": "edges"}, paired.edges(), stages=(1,), stage1=PAIRED, max_rejected_share=0.9,
        num_eval_images=0, decode_memory_mib=256,
    )  # fmt: skip
    rows = ledger(paired.world.index(run))
    assert {name: row["reason"] for name, row in rows.items()} == {
        "small.png": None, "bomb.png": "conditioning_unreadable",
    }  # fmt: skip
    assert "7000x7000 px take 514 MiB" in rows["bomb.png"]["detail"]


def test_shapes_are_the_same_up_to_what_rounding_makes() -> None:
    assert (
        same_aspect((300, 200), (150, 100)) and same_aspect((301, 200), (100, 66)) and same_aspect((64, 64), (65, 65))
    )
    assert same_aspect((1000, 1000), (1009, 1000)) and not same_aspect((1000, 1000), (1011, 1000))
    assert not same_aspect((100, 50), (103, 50)) and not same_aspect((200, 100), (100, 200))


@pytest.mark.parametrize(
    ("keys", "others", "says"),
    [
        ({"conditioning_data": "edgs"}, [], r"conditioning_data is 'edgs'; enabled entries .* conditioning: 'edges'"),
        ({"conditioning_data": None}, [], "set, which feeds stage 1, has no conditioning_data. Add an entry"),
        ({}, [{"id": "more", "caption_strategy": "filename"}], "more, which feeds stage 1, has no conditioning_data"),
        ({}, [{"id": "x", "dataset_type": "conditioning", "type": "csv"}], "x: type is 'csv'; input should be 'local' or"),
        ({}, [{"id": "x", "dataset_type": "conditioning", "source_dataset_id": "set"}],
         "x: source_dataset_id is 'set', and no enabled picture set of that id has conditioning_data = 'x'"),
        ({}, [{"id": "x", "dataset_type": "conditioning", "conditioning_type": "mask"}], "conditioning_type is 'mask'"),
        ({}, [{"id": "x", "dataset_type": "conditioning", "edges": 1}], "edges is not a known key"),
        ({}, [{"id": "x", "dataset_type": "conditioning", "video": {"frames": 1}}], "IF makes pictures, not video"),
        ({}, [{"id": "edges", "dataset_type": "conditioning"}], "the id 'edges' is used 2 times"),
    ],
)  # fmt: skip
def test_entries_that_do_not_fit_are_refused_with_the_remedy(
    paired: PairedWorld, keys: dict[str, Any], others: list[dict[str, Any]], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        paired.load(*others, **keys)


def test_a_place_of_pairs_that_is_not_there_is_refused_only_where_it_is_used(paired: PairedWorld) -> None:
    gone = paired.edges(instance_data_dir=str(paired.world.folder / "gone"))
    with pytest.raises(ConfigError, match=r"edges: instance_data_dir is .*gone', which is not a directory"):
        paired.world.load({"conditioning_data": "edges"}, gone, stages=(1,), stage1=PAIRED)
    paired.world.load({"conditioning_data": "edges"}, gone, stages=(1,))
    disabled = paired.edges(disabled=True)
    with pytest.raises(ConfigError, match="enabled entries of dataset_type conditioning: none"):
        paired.world.load({"conditioning_data": "edges"}, disabled, stages=(1,), stage1=PAIRED)


def test_what_has_no_effect_is_said(paired: PairedWorld) -> None:
    """And changes no identity of a run that follows no pairs."""
    paired.add("a.png", photo(1, 80, 80), photo(1, 80, 80))
    run = paired.load(
        {"id": "idle", "dataset_type": "conditioning", "conditioning_type": "controlnet", "resolution": 512},
        {"id": "large", "resolution": 256, "conditioning_data": "edges"},
    )
    notes = "\n".join(run.notes)
    assert "idle: has no effect: no picture set names it as conditioning_data" in notes
    assert (
        "idle: caption_strategy, resolution are ignored; a conditioning picture is cropped and resized like its picture"
        in notes
    )
    assert "large: conditioning_data has no effect: large does not feed stage 1" in notes
    assert "set: conditioning_data" not in notes
    canny = paired.load(stage1={**PAIRED, "controlnet_conditioning": "canny"})
    assert any("set: conditioning_data has no effect: no stage has controlnet_cond" in note for note in canny.notes)
    plain = paired.world.load({"crop_style": "random"}, stages=(1,))
    assert not plain.notes
    requests = [index_request(one, scan(one)) for one in (canny, plain)]
    assert requests[0] == requests[1]
    assert paired.world.load(
        {"conditioning_data": "edges"}, paired.edges(source_dataset_id="set"), stages=(1,), stage1=PAIRED
    ).config.paired


def lora_of(run: Run, made: dict[str, Artifact]) -> str:
    """Fingerprint of the LoRA that a run would train; of its text only the kind counts here."""
    inputs = TrainingInputs(
        pixels=made["pixels"], text=made["index"], eval_set=made["eval_set"], conditioning=made["pairs"],
        eval_conditioning=made["eval_pairs"],
    )  # fmt: skip
    return lora_request(run, 1, FOLDER, inputs).fingerprint


def test_a_changed_pair_costs_its_own_rows_and_trains_anew(
    paired: PairedWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deepfloyd_core.training.identity.text_identity", lambda text: "same")
    for number in range(8):
        paired.add(f"{number}.png", photo(number, 100, 80), photo(50 + number, 100, 80))
    run = paired.load(repeats=1)
    first = paired.made(run)
    assert first["pairs"].manifest.summary["decoded"] == 8 and first["pixels"].manifest.summary["decoded"] == 8

    paired.add_pair("of nobody.png", photo(3, 9, 9))
    again = paired.made(run)
    assert again == first, "nothing changed for any picture"

    paired.add_pair("3.png", photo(99, 100, 80))
    changed = paired.made(run)
    counts = {name: changed[name].manifest.summary for name in ("index", "pairs")}
    assert counts["index"]["judged_now"] == 1 and counts["index"]["judged_before"] == 7
    assert (changed["pixels"], changed["eval_set"]) == (first["pixels"], first["eval_set"])
    assert counts["pairs"]["decoded"] == 1
    assert counts["pairs"]["shards_taken_over"] == 1 and counts["pairs"]["shards"] == 2
    for (_, before), (picture, after) in zip(both(first), both(changed), strict=True):
        assert (before["pixels"] != after["pixels"]) == (picture["source"] == "3.png")
    assert lora_of(run, changed) != lora_of(run, first)
    assert {row["source"]: row["pixels"] for row in live_rows(changed["pairs"])}.keys() == {
        f"{n}.png" for n in range(8)
    }


def test_an_interrupted_build_goes_on_and_ends_in_the_same_bytes(
    paired: PairedWorld, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for number in range(24):
        paired.add(f"{number:02d}.png", photo(number, 100, 80), photo(50 + number, 100, 80))
    run = paired.world.load(
        {"conditioning_data": "edges", "repeats": 1}, paired.edges(), stages=(1,), stage1=PAIRED, shard_mib=0.1
    )
    whole = paired.made(run)["pairs"]
    assert whole.manifest.summary["shards"] >= 3
    index = paired.world.index(run)
    pixels = paired.world.pixels(run, index, 1)
    request, built = conditioning_request(run, index, pixels), list[str]()

    def breaks(shard: ShardPlan, out: Path, older: Artifact | None) -> ShardResult:
        if len(built) == 2:
            raise OSError("no space left")
        built.append(shard.name)
        return build_shard(shard, out, older)

    def build(work: WorkDir) -> CropsSummary:
        return build_shards(plan_conditioning(run, index, work), work, pixels)

    with monkeypatch.context() as patched, pytest.raises(StorageError, match="no space"):
        patched.setattr("deepfloyd_core.crops.pixels.build_shard", breaks)
        materialise(tmp_path / "elsewhere", request, build)
    part = next((tmp_path / "elsewhere").rglob(built[0]))
    inode = part.stat().st_ino
    resumed = materialise(tmp_path / "elsewhere", request, build)
    assert part.stat().st_ino == inode, "the finished shard stays"
    assert resumed.hashes == whole.hashes and resumed.fingerprint == whole.fingerprint


def test_the_sheet_shows_each_crop_beside_its_pair(paired: PairedWorld) -> None:
    for number in range(3):
        paired.add(f"{number}.png", Image.new("RGB", (64, 64), colour(f"{number}")), Image.new("L", (64, 64), 9))
    made = paired.made(paired.load())
    for pictures, pairs, count in (("pixels", "pairs", 3), ("eval_set", "eval_pairs", 1)):
        with Image.open(made[pairs].path / "sheet.jpg") as sheet:
            seen = np.asarray(sheet, int)
        assert seen.shape[1] == 2 * count * 70 + 6
        for number, row in enumerate(live_rows(made[pictures])):
            left, right = (seen[38, 6 + 70 * (2 * number + k) + 32] for k in (0, 1))
            assert np.abs(left - colour(row["source"].removesuffix(".png"))).max() < 20
            assert np.abs(right - 9).max() < 20


def luma_pairs(paired: PairedWorld) -> dict[str, Artifact]:
    """Pictures at their own scale, whose pairs are their luma: cropping and making it come to the same."""
    for number in range(5):
        picture = photo(number, 90 + number, 70 + number)
        paired.add(f"{number}.png", picture, picture.convert("L"))
    return paired.made(paired.load(repeats=2, **OWN_SCALE))


def context_of(conditioning: str, **keys: Any) -> TrainingContext:
    config = StageConfig.model_validate(
        {**PAIRED, "controlnet_conditioning": conditioning, "mixed_precision": "no", "random_flip": True, **keys}
    )
    unet, generator = load_unet(FOLDER, torch.float32), torch.Generator().manual_seed(2)
    add_control(unet, config, 7)
    with torch.no_grad():
        for param in trainable(unet).values():  # it starts where the picture has no effect yet
            param.add_(0.05 * torch.randn(param.shape, generator=generator))
    text = Text(torch.zeros(1, 3, unet.encoder_hid_proj.in_features))

    def texts(ids: list[str]) -> Text:
        return Text(text.rows.repeat(len(ids), 1, 1))

    return TrainingContext(1, config, 7, unet, load_scheduler(FOLDER), None, texts, torch.device("cpu"), Path())


def test_a_step_follows_the_pairs_as_it_follows_what_is_made_of_the_pictures(paired: PairedWorld) -> None:
    """Luma by Pillow before the crop, against `grayscale`, which makes it of the crop: flipped alike, the same loss."""
    made = luma_pairs(paired)
    rows = TrainingRows(made["pixels"], eval_ids(made["eval_set"]), made["pairs"])
    order = MixedOrder(rows, {}, OrderSettings(4, 1, 4, 7, True))
    own, gray = context_of("paired"), context_of("grayscale")
    flipped = []
    for number in range(3):
        batch = rows.take(*order.batch(number))
        first, second = (prepare(context, batch, number, []) for context in (own, gray))
        control = known(first.fed.control)
        assert torch.equal(control, known(second.fed.control))
        straight = as_conditioning(known(batch.pairs))
        flipped += [not torch.equal(one, two) for one, two in zip(control, straight, strict=True)]
        assert flipped[-len(batch.rows) :] == first.draws.mirror.tolist()
        if number == 0:
            assert torch.equal(batch_loss(own, first), batch_loss(gray, second))
    assert any(flipped) and not all(flipped)


def test_the_held_out_pictures_are_followed_by_their_own_pairs(paired: PairedWorld) -> None:
    made = luma_pairs(paired)
    rows = TrainingRows(made["pixels"], eval_ids(made["eval_set"]), made["pairs"])
    order = MixedOrder(rows, {}, OrderSettings(2, 1, 4, 7, True))
    grid = grid_pictures(made["eval_set"], rows, order, 1, made["eval_pairs"])
    assert {item.part for item in grid} == {"held_out", "seen"}
    for item in grid:
        luma = np.asarray(Image.fromarray(item.pixels[0].numpy()).convert("L"))
        assert np.array_equal(known(item.pair)[0].numpy(), np.stack([luma] * 3, axis=-1))
    run = paired.load(repeats=2, **OWN_SCALE)
    (wanted,) = sample_specs(1, run.config.stage(1), run.config, [], made["eval_set"], made["eval_pairs"])
    gray = conditioning_picture("grayscale", to_model_range(torch.from_numpy(wanted.truth)[None]))
    assert torch.equal(known(wanted.input_picture), gray)


def test_without_held_out_pictures_there_are_no_pairs_of_them(paired: PairedWorld) -> None:
    for number in range(2):
        paired.add(f"{number}.png", photo(number, 90, 80), photo(number, 90, 80))
    run = paired.world.load(
        {"conditioning_data": "edges"}, paired.edges(), stages=(1,), stage1=PAIRED, num_eval_images=0
    )
    made = paired.made(run)
    assert (len(live_rows(made["eval_set"])), len(live_rows(made["eval_pairs"]))) == (0, 0)
    assert eval_pictures(made["eval_set"], 1, made["eval_pairs"]) == []
    assert sample_specs(1, run.config.stage(1), run.config, [], made["eval_set"], made["eval_pairs"]) == []
    assert len(both(made)) == 2


def test_in_a_run_of_both_stages_the_first_follows_pairs_and_the_second_is_as_ever(paired: PairedWorld) -> None:
    for number, size in enumerate([(280, 300), (300, 260), (256, 256), (100, 80), (80, 100), (90, 90)]):
        paired.add(f"{number}.png", photo(number, *size), photo(number, *size).convert("L"))
    first = {"conditioning_data": "edges", "crop_aspect": "preserve", **OWN_SCALE}
    run = paired.world.load(first, paired.edges(), stage1=PAIRED, num_eval_images=2)
    made = paired.made(run)
    plain = paired.world.load({**first, "conditioning_data": None})
    assert [row["pixels"] for row in live_rows(paired.world.pixels(run, made["index"], 2))] == [
        row["pixels"] for row in live_rows(paired.world.pixels(plain, paired.world.index(plain), 2))
    ]
    found = eval_pictures(made["eval_set"], 1, made["eval_pairs"])
    assert len(found) == 2 and found[0].row.width * found[0].row.height == found[0].pixels.size // 3
    for one in found:
        luma = np.asarray(Image.fromarray(one.pixels).convert("L"), int)
        assert one.pair is not None and np.abs(one.pair[..., 0] - luma).max() <= 2, "rounded before or after the resize"
    assert [one.pair for one in eval_pictures(made["eval_set"], 2)] == [None, None]


def test_pairs_of_other_pictures_are_not_fed(paired: PairedWorld) -> None:
    for number in range(4):
        paired.add(f"{number}.png", photo(number, 90, 70), photo(number, 90, 70))
    made, other = paired.made(paired.load()), paired.made(paired.load(repeats=1))
    with pytest.raises(ValueError, match="are not those of"):
        TrainingRows(made["pixels"], frozenset(), other["pairs"])
    with pytest.raises(ValueError, match="'paired' conditioning is not computed from a picture"):
        conditioning_picture("paired", torch.zeros(1, 3, 8, 8))  # type: ignore[arg-type]


def add_pairs(run: SmallRun) -> Path:
    """The second folder of a small run: its pictures in gray at half the size."""
    pairs = run.folder / "pairs"
    pairs.mkdir()
    for path in run.pictures.glob("*.png"):
        with Image.open(path) as picture:
            picture.convert("L").resize((picture.width // 2, picture.height // 2)).save(pairs / path.name)
    (entry,) = json.loads((run.folder / "data.json").read_text())
    edges = {"id": "edges", "type": "local", "dataset_type": "conditioning", "instance_data_dir": str(pairs)}
    (run.folder / "data.json").write_text(json.dumps([{**entry, "conditioning_data": "edges"}, edges]))
    return pairs


@pytest.mark.slow
def test_a_run_ends_in_a_version_that_follows_pictures_of_its_kind(
    server: str, tmp_path: Path, new_small_run: Callable[[Path], SmallRun]
) -> None:
    """Through the command line: run, the same again, the card's own code, generate, and a pair that changes."""
    run = new_small_run(tmp_path / "run")
    pairs = add_pairs(run)
    keys = [
        f"--set={key}" for key in ("stage1.controlnet=true", "stage1.controlnet_conditioning=paired",
                                   "stage1.max_train_steps=3", "stage2.max_train_steps=1")
    ]  # fmt: skip

    def summary(kind: str) -> dict[str, Any]:
        (path,) = (run.workspace / kind).iterdir()
        counts: dict[str, Any] = json.loads((path / "manifest.json").read_text())["summary"]
        return counts

    done = run.call_here("run", str(run.config), *keys)
    assert done.returncode == 0, done.stderr
    assert "conditioning_data" not in done.stderr
    first = finished_names(run.workspace)
    assert summary("image_index")["reasons"] == {"unsupported": 1}
    assert summary("stage1_conditioning")["rows"] == summary("stage1_pixels")["rows"]
    assert summary("stage1_pixels")["shown_per_epoch"] == 16
    assert summary("eval_conditioning")["rows"] == 1
    assert not [name for name in summary("cascade_samples") if name.startswith("control_error")]
    assert run.call_here("run", str(run.config), *keys).returncode == 0 and finished_names(run.workspace) == first
    assert planned_name(run, keys) in first
    assert run.call_here("verify", str(run.workspace)).returncode == 0

    (bundle,) = (run.workspace / "lora_bundle").iterdir()
    names = run_card(bundle)
    assert names["conditioning"].shape == (1, 3, 64, 64) and hasattr(names["stage1"].unet, "control")
    assert "# in [0, 1]: like those of conditioning_data" in (bundle / "README.md").read_text()

    follow = tmp_path / "follow.png"
    photo(1, 96, 64).save(follow)
    assert generated(run, "--control", str(follow), *keys) != generated(run, "--version", "base", *keys)
    with Image.open(next((run.workspace / "generated").glob("*/conditioning-*.png"))) as shown:
        expected = photo(1, 96, 64).crop((16, 0, 80, 64))
        assert np.array_equal(np.asarray(shown), np.asarray(expected)), "as it is, cut to the size"
    missing = run.call_here("generate", str(run.config), "--prompt", "a star", *keys)
    assert missing.returncode == 2 and "give its conditioning picture with --control" in missing.stderr

    Image.new("L", (64, 64), 9).save(pairs / "star_000.png")  # of another shape, unless it is square
    changed = run.call_here("prepare", str(run.config), *keys)
    assert changed.returncode == 0, changed.stderr
    new = finished_names(run.workspace) - first
    assert len([name for name in new if name.startswith("stage1_conditioning/")]) == 1
