"""From a directory to shards: one ledger row for each file, its captions, the same bytes in any order, a fixed eval set."""

import hashlib
import io
import json
import logging
import math
import os
import random
import shutil
import struct
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pyarrow.parquet as pq
import pytest
from artifact_rows import ledger, live_rows, shown_rows
from data_world import DataWorld
from PIL import Image, ImageOps

import tasks.artifact_page
import tasks.eval_set
import tasks.image_index
from deepfloyd_core.crops.eval_choice import choice_notes, choose_held_out
from deepfloyd_core.crops.identity import pixels_request
from deepfloyd_core.crops.pixels import build_shard, build_shards, plan_shards
from deepfloyd_core.crops.preview import save_preview
from deepfloyd_core.crops.rows import eval_ids
from deepfloyd_core.crops.shards import ShardRow, open_shard, write_shard
from deepfloyd_core.crops.summary import CropsSummary
from deepfloyd_core.errors import ConfigError, DataError
from deepfloyd_core.index.identity import index_request
from deepfloyd_core.index.scan import others_of, scan
from deepfloyd_core.index.summary import IndexSummary
from deepfloyd_core.store.artifacts import Artifact, WorkDir, materialise, verify_artifact
from deepfloyd_core.training.batches import BatchOrder, TrainingRows
from tasks.endings import ending

SHARD_COLUMNS = [
    "image_id", "source", "dataset_id", "width", "height", "original_width", "original_height", "crop_left", "crop_top",
    "crop_width", "crop_height", "repeat", "caption", "caption_id", "crop_style", "method", "pixels_xxh3", "pixels",
]  # fmt: skip


def noise(seed: int, width: int = 272, height: int = 260) -> np.ndarray:
    """A smooth random picture: two noises of 8 px, so that shrinking keeps its character."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


def bomb() -> bytes:
    """A small PNG whose header promises 65,535 x 65,535 pixels."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    data = buffer.getvalue()
    head = b"IHDR" + struct.pack(">II", 65535, 65535) + data[24:29]
    return data[:12] + head + struct.pack(">I", zlib.crc32(head)) + data[33:]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# ---- the ledger -------------------------------------------------------------------------------------------------------


# Of `odd_files`: hidden files and those of another kind are no rows.
REASONS = {
    "photo.jpg": None, "deep/er/photo.PNG": None, "small.png": "too_small", "stage one only.png": None,
    "cut.jpg": "truncated", "png in truth.jpg": None, "no suffix": None,
    "empty.webp": "unsupported", "bomb.png": "decompression_bomb", "uncaptioned.png": "caption_missing",
    "blank.png": "caption_missing", "latin.png": "caption_missing", "pipe.jpg": "not_a_file",
    "out.jpg": "outside_root", "inside.jpg": None, "dangling.jpg": "not_a_file",
    "ring.jpg": "not_a_file",
}  # fmt: skip


@pytest.fixture(scope="module")
def odd_files(
    tmp_path_factory: pytest.TempPathFactory, new_world: Callable[[Path], DataWorld]
) -> tuple[DataWorld, Artifact]:
    """A folder with a file of every kind, and its index."""
    world = new_world(tmp_path_factory.mktemp("odd"))
    whole = world.add("photo.jpg", noise(0))
    world.add("deep/er/photo.PNG", noise(1, 300, 290))
    world.add("small.png", noise(2, 63, 500))
    world.add("stage one only.png", noise(3, 100, 90))
    world.add("cut.jpg", whole.read_bytes()[:3000])
    world.add("png in truth.jpg", (world.folder / "pictures/deep/er/photo.PNG").read_bytes())
    world.add("no suffix", whole.read_bytes())
    world.add("notes.md", b"# not a picture")
    world.add("empty.webp", b"")
    world.add("bomb.png", bomb())
    world.add("uncaptioned.png", noise(4), caption=None)
    world.add("blank.png", noise(5), caption=" \n\n")
    world.add("latin.png", noise(6), caption=None).with_suffix(".txt").write_bytes(b"caf\xe9")
    world.add(".hidden.jpg", b"not looked at")
    world.add(".git/object.jpg", b"not looked at")
    world.add("data.json", b"{}", caption=None)
    os.mkfifo(world.folder / "pictures" / "pipe.jpg")
    (world.folder / "secret.jpg").write_bytes(whole.read_bytes())
    (world.folder / "pictures" / "out.jpg").symlink_to("../secret.jpg")
    (world.folder / "pictures" / "inside.jpg").symlink_to("photo.jpg")
    (world.folder / "pictures" / "inside.txt").write_text("linked")
    (world.folder / "pictures" / "dangling.jpg").symlink_to("nowhere.jpg")
    (world.folder / "pictures" / "ring.jpg").symlink_to("ring.jpg")
    return world, world.index(world.load(max_rejected_share=1.0))


def test_every_file_is_one_row_with_the_right_reason(odd_files: tuple[DataWorld, Artifact]) -> None:
    rows = ledger(odd_files[1])
    assert {source: row["reason"] for source, row in rows.items()} == REASONS
    assert all((row["status"] == "accepted") == (row["reason"] is None) for row in rows.values())
    assert {row["status"] for row in rows.values()} == {"accepted", "rejected"}
    assert "latin.txt is no UTF-8 text" in rows["latin.png"]["detail"]


def test_a_row_tells_what_the_file_is_and_which_stages_can_use_it(odd_files: tuple[DataWorld, Artifact]) -> None:
    world, index = odd_files
    rows = ledger(index)
    for source in ("photo.jpg", "deep/er/photo.PNG", "cut.jpg", "empty.webp"):
        path = world.folder / "pictures" / source
        assert (rows[source]["image_id"], rows[source]["bytes"]) == (sha256(path), path.stat().st_size)
    assert rows["png in truth.jpg"]["format"] == "PNG", "by content, not by name"
    assert (rows["deep/er/photo.PNG"]["width"], rows["deep/er/photo.PNG"]["height"]) == (300, 290)
    assert (rows["stage one only.png"]["stage1_reason"], rows["stage one only.png"]["stage2_reason"]) == (
        None,
        "too_small",
    )


def test_an_index_counts_its_rows(odd_files: tuple[DataWorld, Artifact]) -> None:
    summary = odd_files[1].manifest.summary
    assert summary["reasons"] == dict(Counter(reason for reason in REASONS.values() if reason))
    assert (summary["inputs"], summary["accepted"], summary["rejected"]) == (17, 6, 11)
    assert summary["other_files"] == {".md": 1}
    assert (summary["stage1"], summary["stage2"]) == (6, 5)


def test_what_lies_beside_the_pictures_of_a_phone_is_no_input(
    world: DataWorld, caplog: pytest.LogCaptureFixture
) -> None:
    """An export of 8 photographs: films of live photos, edits, thumbnails of a network drive and of a file manager."""
    for number in range(8):
        jpeg = world.add(f"IMG_{number:04d}.JPG", noise(number)).read_bytes()
        for name in (f"IMG_{number:04d}.AAE", f"IMG_{number:04d}.MOV"):
            world.add(name, b"\0\0\0\x14ftypqt  \0\0\0\0qt  ", caption=None)
        world.add(f"@eaDir/IMG_{number:04d}.JPG/SYNOPHOTO_THUMB_XL.jpg", jpeg, caption=None)
    for name in ("Thumbs.db", "desktop.ini", "latent.npz", "IMG_0001.xmp", "notes.md", "IMG_0002.DNG"):
        world.add(name, b"II*\0 looks like a TIFF", caption=None)
    run = world.load()
    with caplog.at_level("INFO"):
        index = world.index(run)
    assert (index.manifest.summary["accepted"], index.manifest.summary["rejected"]) == (8, 0)
    others = {".aae": 8, ".mov": 8, "@eaDir/": 1, ".db": 1, ".ini": 1, ".npz": 1, ".xmp": 1, ".md": 1, ".dng": 1}
    assert index.manifest.summary["other_files"] == others
    said = [line for line in caplog.messages if "are no pictures" in line]
    assert said == ["23 other files (.aae 8, .mov 8, .db 1, .dng 1, .ini 1, .md 1, 3 others) are no pictures"]
    world.add("one more.mov", b"a film", caption=None)
    assert world.index(run).fingerprint == index.fingerprint, "what is no picture changes nothing"


def test_pictures_without_captions_are_told_how_they_get_some(world: DataWorld) -> None:
    world.add("IMG_0.JPG", noise(0), caption=None)
    with pytest.raises(
        DataError, match=r"^The only picture was rejected \(1 caption_missing\)\. For example IMG_0.JPG: "
    ):
        world.index(world.load(max_rejected_share=1.0))
    for number in range(1, 3):
        world.add(f"IMG_{number}.JPG", noise(number), caption=None)
    said = r"\(3 caption_missing\).* IMG_0.JPG: there is no IMG_0.txt beside it; .* caption_strategy = instanceprompt"
    with pytest.raises(DataError, match=f"All 3 pictures were rejected {said}"):
        world.index(world.load(max_rejected_share=1.0))
    with pytest.raises(
        DataError, match=r"No picture .* can be used \(3 caption_missing\). For example IMG_\d.JPG: there"
    ):
        save_preview(world.load(), 4, world.folder / "preview.png")
    world.add("IMG_3.JPG", noise(3), caption=" \n")
    world.add("IMG_4.JPG", noise(4), caption="word")
    world.add("IMG_5.JPG", noise(5))
    rows = ledger(world.index(world.load({"caption_filter_list": ["w.*"]}, max_rejected_share=1.0)))
    details = [rows[f"IMG_{number}.JPG"]["detail"] for number in (3, 4, 5)]
    assert details == ["its caption is blank", "caption_filter_list leaves nothing of its caption", None]


def test_a_picture_whose_name_does_not_say_so_is_looked_at(world: DataWorld) -> None:
    jpeg, png = (world.add(name, noise(number)).read_bytes() for number, name in enumerate(["a.jpg", "b.png"]))
    names = {
        "IMG_001": jpeg, "x.jpg_large": jpeg, "y.jfif": jpeg, "z.jpg": png, "w.PNG": jpeg, "v.jpg!d": png,
        "My photo no. 5": jpeg,
    }  # fmt: skip
    for name, data in names.items():
        world.add(name, data, caption=None)
        (world.folder / "pictures" / f"{name}.txt").write_text("a caption")
    for name, data in {"LICENSE": b"text", "x.unheard": b"\0\1\2", "empty": b"", "a.jpg_original": jpeg}.items():
        world.add(name, data, caption=None)
    with world.add("disk.image", jpeg, caption=None).open("r+b") as handle:
        handle.truncate(2**40)  # a hole: reading it would fill the memory
    run = world.load(stages=(1,))
    first = world.index(run)
    rows = ledger(first)
    assert {name: row["reason"] for name, row in rows.items()} == dict.fromkeys([*names, "a.jpg", "b.png"])
    others = {"no extension": 2, ".unheard": 1, ".jpg_original": 1, ".image": 1}
    assert first.manifest.summary["other_files"] == others
    assert others_of(scan(run)) == others, "also from the notes of the first scan"


def test_only_other_files_is_said_as_such(world: DataWorld) -> None:
    world.add("raw.NEF", b"II*\0", caption=None)
    with pytest.raises(DataError, match=r"no picture in .*\(1 other file \(.nef 1\) is no picture\)"):
        world.index(world.load())


def test_a_file_name_that_is_not_utf8_is_a_row_and_not_a_crash(world: DataWorld) -> None:
    world.add("good.png", noise(0))
    folder = os.fsencode(world.folder / "pictures")
    with open(folder + b"/caf\xe9.png", "wb") as handle:  # noqa: PTH123 (pathlib has no byte names)
        handle.write((world.folder / "pictures" / "good.png").read_bytes())
    rows = ledger(world.index(world.load(max_rejected_share=0.5)))
    assert {source: row["reason"] for source, row in rows.items()} == {
        "good.png": None,
        "caf\\xe9.png": "name_not_utf8",
    }


def test_names_of_every_language_and_of_shell_signs_are_kept(world: DataWorld) -> None:
    names = ["naïve.png", "图片.png", "a b\n$(c).png", "🦊.png", "-rf.png", "100%.png"]
    for number, name in enumerate(names):
        world.add(name, noise(number))
    assert set(ledger(world.index(world.load()))) == set(names)


@pytest.mark.skipif(os.geteuid() == 0, reason="root can read everything")
def test_an_unreadable_file_is_a_row(world: DataWorld) -> None:
    world.add("good.png", noise(0))
    world.add("locked.png", noise(1)).chmod(0)
    assert ledger(world.index(world.load(max_rejected_share=0.5)))["locked.png"]["reason"] == "unreadable"


def test_a_linked_folder_is_a_row_and_is_not_followed(world: DataWorld) -> None:
    world.add("good.png", noise(0))
    (world.folder / "elsewhere").mkdir()
    shutil.copy(world.folder / "pictures" / "good.png", world.folder / "elsewhere" / "other.png")
    (world.folder / "pictures" / "link").symlink_to("../elsewhere")
    (world.folder / "pictures" / "loop").symlink_to(".")
    rows = ledger(world.index(world.load(max_rejected_share=0.9)))
    reasons = {source: row["reason"] for source, row in rows.items()}
    assert reasons == {"good.png": None, "link": "outside_root", "loop": "not_a_file"}


def in_hub_cache(folder: Path, names: dict[str, bytes], blobs: str = "blobs") -> Path:
    """A snapshot as huggingface_hub lays it out: links to files named by their hash."""
    snapshot = folder / "hub" / "datasets--me--pictures" / "snapshots" / "0a1b"
    for number, (name, data) in enumerate(names.items()):
        blob = snapshot.parents[1] / blobs / f"{number:040x}"
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(data)
        path = snapshot / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(Path("../../..", blobs, blob.name))
    return snapshot


def test_a_link_to_a_folder_is_told_what_to_do_and_one_with_a_junk_folder_s_name_is_junk(world: DataWorld) -> None:
    world.add("deep/a.png", noise(0))
    pictures = world.folder / "pictures"
    (pictures / "more").symlink_to(pictures / "deep")
    (pictures / "@eaDir").symlink_to("/etc")
    for keys, named in (({}, {"more"}), ({"follow_links": True}, set[str]())):
        index = world.index(world.load(keys, stages=(1,), max_rejected_share=0.5, num_eval_images=0))
        rows = ledger(index)
        assert set(rows) == {"deep/a.png"} | named and index.manifest.summary["other_files"] == {"@eaDir/": 1}
        for name in named:
            assert rows[name]["reason"] == "not_a_file" and "follow_links = true" in rows[name]["detail"]


def test_a_snapshot_of_the_hub_s_cache_is_used_and_other_links_by_a_key(world: DataWorld) -> None:
    data = world.add("a.png", noise(0)).read_bytes()
    (world.folder / "secret.txt").write_text("a secret")
    files = {"x.png": data, "x.txt": b"from a blob", "y.png": data}

    def rows(place: Path, **keys: Any) -> dict[str, dict[str, Any]]:
        (place / "train/y.txt").unlink(missing_ok=True)
        (place / "train/y.txt").symlink_to(world.folder / "secret.txt")
        run = world.load({"instance_data_dir": str(place), **keys}, stages=(1,), max_rejected_share=1.0)
        return ledger(world.index(run))

    found = rows(in_hub_cache(world.folder, files))
    assert (found["train/x.png"]["reason"], found["train/x.png"]["captions"]) == (None, ["from a blob"])
    assert found["train/y.png"]["reason"] == "caption_missing", "a text is not followed to anywhere"
    assert (
        "y.txt is a link to" in found["train/y.png"]["detail"]
        and "follow_links = true" in found["train/y.png"]["detail"]
    )

    place = in_hub_cache(world.folder / "other", files, "elsewhere")
    (place / "train/z.png").write_bytes(data)
    (place / "train/z.txt").write_text("inside")
    found = rows(place)
    assert {name: row["reason"] for name, row in found.items()} == {
        "train/x.png": "outside_root", "train/y.png": "outside_root", "train/z.png": None,
    }  # fmt: skip
    assert "follow_links = true" in found["train/x.png"]["detail"]
    found = rows(place, follow_links=True)
    assert {name: row["captions"] for name, row in found.items()} == {
        "train/x.png": ["from a blob"], "train/y.png": ["a secret"], "train/z.png": ["inside"],
    }  # fmt: skip
    assert rows(place)["train/x.png"]["reason"] == "outside_root"


def test_linked_folders_are_searched_once_where_links_are_followed(world: DataWorld) -> None:
    data = world.add("a.png", noise(0)).read_bytes()
    other = world.folder / "elsewhere" / "deep"
    other.mkdir(parents=True)
    (other / "b.png").write_bytes(data)
    for name, place in {"link": "../elsewhere", "again": "../elsewhere/deep", "loop": ".", "ring": "ring"}.items():
        (world.folder / "pictures" / name).symlink_to(place)
    (other / "back").symlink_to(world.folder / "pictures")
    run = world.load({"follow_links": True, "caption_strategy": "filename"}, stages=(1,), max_rejected_share=1.0)
    reasons = [(Path(name).name, row["reason"]) for name, row in ledger(world.index(run)).items()]
    assert sorted(reasons) == [("a.png", None), ("b.png", None), ("ring", "unreadable")]


def test_the_data_file_that_users_copy_trains_on_whole_subjects(world: DataWorld) -> None:
    """Its crops are the largest central squares, so a caption of the picture is one of the crop."""
    (entry, _) = json.loads(Path("datasets/my-pictures.json").read_bytes())
    for name, size in {"wide": (600, 400), "high": (300, 640), "square": (512, 512)}.items():
        world.add(f"{name}.jpg", noise(1, *size))
    run = world.load(entry | {"instance_data_dir": str(world.folder / "pictures")})
    index = world.index(run)
    for stage in (1, 2):
        rows = live_rows(world.pixels(run, index, stage))
        assert len(rows) == 3, "and no crop twice"
        for row in rows:
            width, height = row["original_width"], row["original_height"]
            edge = min(width, height)
            off = edge / row["width"]  # a pixel of the crop
            assert row["crop_width"] == pytest.approx(edge, abs=off) and row["crop_height"] == pytest.approx(
                edge, abs=off
            )
            assert row["crop_left"] == pytest.approx((width - edge) / 2, abs=off)
            assert row["crop_top"] == pytest.approx((height - edge) / 2, abs=off)


def test_the_same_file_in_two_folders_is_two_rows_of_one_picture(world: DataWorld) -> None:
    one = world.add("a/x.png", noise(0), "first")
    world.add("b/x.png", one.read_bytes(), "second")
    world.add("c.png", noise(1))
    run = world.load(stages=(1,))
    index = world.index(run)
    rows = ledger(index)
    assert rows["a/x.png"]["image_id"] == rows["b/x.png"]["image_id"] == sha256(one)
    captions = {row["source"]: row["caption"] for row in live_rows(world.pixels(run, index, 1))}
    assert captions == {"a/x.png": "first", "b/x.png": "second", "c.png": "a caption"}


def test_an_empty_directory_is_a_data_error_that_names_it(world: DataWorld) -> None:
    (world.folder / "pictures" / "lonely.txt").write_text("a caption without a picture")
    with pytest.raises(DataError, match=r"There is no picture in .*pictures"):
        world.index(world.load())


def test_nothing_but_rejects_is_a_data_error_that_counts_them(world: DataWorld) -> None:
    world.add("a.jpg", b"x")
    world.add("b.jpg", b"y")
    world.add("c.png", noise(0, 20, 20))
    with pytest.raises(DataError, match=r"All 3 pictures were rejected \(1 too_small, 2 unsupported\)"):
        world.index(world.load(max_rejected_share=1.0))


@pytest.mark.parametrize(
    ("bad", "limit", "passes"), [(1, 0.25, True), (1, 0.24, False), (0, 0.0, True), (1, 0.0, False)]
)
def test_the_share_limit_is_inclusive_and_names_the_reasons(
    world: DataWorld, bad: int, limit: float, passes: bool
) -> None:
    for number in range(4 - bad):
        world.add(f"{number}.png", noise(number))
    for number in range(bad):
        world.add(f"bad-{number}.png", b"x")
    run = world.load(max_rejected_share=limit)
    if passes:
        assert world.index(run).manifest.summary["rejected"] == bad
    else:
        with pytest.raises(
            DataError, match=r"1 of 4 pictures was rejected \(1 unsupported\): a share of 0.25"
        ) as caught:
            world.index(run)
        ledger_path = str(caught.value).split("The ledger is ")[1].split(";")[0]
        assert pq.read_table(ledger_path).num_rows == 4, "the ledger is there to be looked at"


def test_pictures_of_64_px_are_too_small_for_stage2_and_counted(world: DataWorld) -> None:
    """Stage I takes them; a run of Stage II alone does not."""
    for name, edge in {"a.png": 64, "b.png": 255, "c.png": 256}.items():
        world.add(name, noise(edge, edge, edge))
    upscaler = world.index(world.load(stages=(2,), max_rejected_share=1))
    assert {name: row["reason"] for name, row in ledger(upscaler).items()} == {
        "a.png": "too_small", "b.png": "too_small", "c.png": None,
    }  # fmt: skip
    assert upscaler.manifest.summary["reasons"] == {"too_small": 2} and upscaler.manifest.summary["accepted"] == 1
    assert world.index(world.load(stages=(1,))).manifest.summary["accepted"] == 3
    both = world.index(world.load(num_eval_images=1))
    assert both.manifest.summary["accepted"] == 3 and world.pixels(world.load(), both, 2).manifest.summary["rows"] == 1


def test_a_set_that_feeds_no_trained_stage_says_so_and_not_that_it_is_too_small(world: DataWorld) -> None:
    world.add("a.png", noise(0))
    other = world.folder / "large"
    other.mkdir()
    Image.fromarray(noise(1)).save(other / "b.png")
    (other / "b.txt").write_text("large")
    run = world.load(
        {}, {"id": "large", "resolution": 256, "instance_data_dir": str(other)}, stages=(1,), max_rejected_share=1
    )
    assert {row["dataset_id"]: row["reason"] for row in ledger(world.index(run)).values()} == {
        "set": None, "large": "not_for_this_stage",
    }  # fmt: skip


def test_the_sources_are_never_touched(world: DataWorld) -> None:
    for number in range(3):
        world.add(f"{number}.jpg", noise(number))
    world.add("bad.jpg", b"bad")

    def state() -> dict[str, tuple[str, int, int]]:
        return {path.name: (sha256(path), path.stat().st_mtime_ns, path.stat().st_mode)
                for path in (world.folder / "pictures").iterdir()}  # fmt: skip

    before = state()
    run = world.load(max_rejected_share=1.0)
    index = world.index(run)
    world.pixels(run, index, 1)
    world.eval_set(run, index)
    assert state() == before


# ---- captions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"caption_strategy": "textfile"}, ["red fox", "zwei Füchse"]),
        ({"caption_strategy": "filename"}, ["my red fox"]),
        ({"caption_strategy": "instanceprompt", "instance_prompt": " a fox "}, ["a fox"]),
        ({"caption_strategy": "textfile", "instance_prompt": "sks", "prepend_instance_prompt": True},
         ["sks red fox", "sks zwei Füchse"]),
        ({"caption_strategy": "filename", "instance_prompt": "sks", "prepend_instance_prompt": True}, ["sks my red fox"]),
        ({"caption_strategy": "textfile", "instance_prompt": "sks", "only_instance_prompt": True}, ["sks"]),
        ({"caption_strategy": "textfile", "instance_prompt": "unused"}, ["red fox", "zwei Füchse"]),
    ],
)  # fmt: skip
def test_captions_come_from_where_the_strategy_says(
    world: DataWorld, keys: dict[str, Any], expected: list[str]
) -> None:
    world.add("deep/my_red_fox.png", noise(0), "\ufeff red fox \r\n\n\tzwei Füchse\n")
    assert ledger(world.index(world.load(keys)))["deep/my_red_fox.png"]["captions"] == expected


def test_each_repeat_takes_the_next_caption(world: DataWorld) -> None:
    world.add("a.png", noise(0), "one\ntwo\nthree")
    world.add("b.png", noise(1), "only")
    run = world.load({"repeats": 3}, stages=(1,))
    pixels = world.pixels(run, world.index(run), 1)
    shown = Counter((row["source"], row["caption"]) for row in shown_rows(pixels))
    assert shown == {("a.png", "one"): 2, ("a.png", "two"): 1, ("a.png", "three"): 1, ("b.png", "only"): 4}
    assert len(live_rows(pixels)) == 4, "the fourth pass over a picture shows what the first one did"


def test_a_caption_is_never_read_through_a_link_out_of_the_root_nor_from_a_pipe(world: DataWorld) -> None:
    (world.folder / "secret").write_text("a secret of this machine")
    world.add("linked.png", noise(0), caption=None).with_suffix(".txt").symlink_to("../secret")
    os.mkfifo(world.add("piped.png", noise(1), caption=None).with_suffix(".txt"))
    world.add("good.png", noise(2))
    rows = ledger(world.index(world.load(max_rejected_share=1.0)))
    assert {source: row["reason"] for source, row in rows.items()} == {
        "linked.png": "caption_missing", "piped.png": "caption_missing", "good.png": None,
    }  # fmt: skip


# ---- the data's fingerprint -------------------------------------------------------------------------------------------


def fingerprint(world: DataWorld, *entries: dict[str, Any]) -> str:
    run = world.load(*entries)
    return index_request(run, scan(run)).fingerprint


def test_the_fingerprint_is_stable_under_times_inodes_and_places(world: DataWorld) -> None:
    for number in range(3):
        world.add(f"{number}.png", noise(number))
    before = fingerprint(world)
    pictures = world.folder / "pictures"
    for path in pictures.iterdir():
        os.utime(path, (1, 1))
    assert fingerprint(world) == before, "times"
    for path in sorted(pictures.iterdir(), reverse=True):
        data = path.read_bytes()
        path.unlink()
        path.write_bytes(data)
    assert fingerprint(world) == before, "inodes, order of creation"
    shutil.move(pictures, world.folder / "moved")
    pictures.mkdir()
    assert fingerprint(world, {"instance_data_dir": str(world.folder / "moved")}) == before, "place"


def test_the_fingerprint_changes_with_any_byte_caption_name_or_judging_setting(world: DataWorld) -> None:
    path = world.add("a.png", noise(0))
    world.add("b.png", noise(1))
    seen = [fingerprint(world)]
    good = path.read_bytes()
    for place in random.Random(0).sample(range(len(good)), 20):
        path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        seen.append(fingerprint(world))
    path.write_bytes(good)
    path.with_suffix(".txt").write_text("a captiom")
    seen.append(fingerprint(world))
    path.with_suffix(".txt").unlink()
    seen.append(fingerprint(world))
    path.with_suffix(".txt").write_text("a caption")
    assert fingerprint(world) == seen[0], "back again"
    seen += [fingerprint(world, entry) for entry in ({"resolution": 72}, {"minimum_image_size": 80}, {"id": "other"})]
    path.rename(path.with_name("c.png"))
    seen.append(fingerprint(world))
    assert len(set(seen)) == len(seen)


def test_an_unchanged_directory_reuses_its_index_and_a_new_file_makes_a_new_one(
    world: DataWorld, caplog: pytest.LogCaptureFixture
) -> None:
    world.add("a.png", noise(0))
    world.add("b.png", noise(1))
    caplog.set_level(logging.INFO, "deepfloyd_core")
    first = world.index(world.load())
    assert world.index(world.load()) == first
    assert any("reused" in line for line in caplog.messages)
    world.add("c.png", noise(2))
    second = world.index(world.load())
    assert second != first
    assert any("rebuilt: pictures or captions changed" in line for line in caplog.messages)
    assert first.manifest.summary["inputs"] == 2, "the old one is still there"


# ---- shards -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, new_world: Callable[[Path], DataWorld]) -> dict[str, Any]:
    """One data set prepared for both stages: turned, transparent, gray, large and odd pictures, two passes each."""
    world = new_world(tmp_path_factory.mktemp("made"))
    world.add("plain.png", noise(0, 301, 277))
    world.add("wide.png", noise(1, 700, 260))
    world.add("large.png", noise(2, 900, 1100))
    world.add("exact.png", noise(3, 256, 256))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noise(4, 420, 290)).save(world.add("turned.png", noise(4)), exif=exif)
    alpha = np.tile(np.linspace(0, 255, 272).astype(np.uint8), (260, 1))
    world.add("alpha.png", np.dstack([noise(5), alpha]))
    world.add("gray.png", Image.fromarray(noise(6)).convert("L"))
    entry = {"crop_style": "random", "repeats": 1, "maximum_image_size": 128, "target_downsample_size": 80}
    run = world.load(entry, shard_mib=0.1, seed=3)
    index = world.index(run)
    stages: dict[Any, Artifact] = {stage: world.pixels(run, index, stage) for stage in (1, 2)}
    return {"world": world, "run": run, "index": index, **{f"stage{stage}": stages[stage] for stage in stages}}


def literal_crop(path: Path, row: dict[str, Any], edge: int, maximum: int, target: int) -> np.ndarray:
    """The crop that a shard's row describes, computed with Pillow alone."""
    picture = ImageOps.exif_transpose(Image.open(path))
    ground = Image.new("RGBA", picture.size, "white")
    picture = Image.alpha_composite(ground, picture.convert("RGBA")).convert("RGB")
    size = picture.size
    assert (row["original_width"], row["original_height"]) == size
    if min(size) > maximum:
        goal = [round(length * target / min(size)) for length in size]
        while picture.width > 1.5 * goal[0] or picture.height > 1.5 * goal[1]:
            step = max(goal[0], round(picture.width * 0.75)), max(goal[1], round(picture.height * 0.75))
            picture = picture.resize(step, Image.Resampling.LANCZOS)
        picture = picture.resize((goal[0], goal[1]), Image.Resampling.LANCZOS)
    left = round(row["crop_left"] * picture.width / size[0])
    top = round(row["crop_top"] * picture.height / size[1])
    assert math.isclose(row["crop_width"], edge * size[0] / picture.width)
    assert math.isclose(row["crop_height"], edge * size[1] / picture.height)
    return np.asarray(picture.crop((left, top, left + edge, top + edge)))


@pytest.mark.parametrize("stage", [1, 2])
def test_every_row_has_every_column_and_the_pixels_of_an_independent_computation(
    made: dict[str, Any], stage: int
) -> None:
    edge, scale = 64 * (1, 4)[stage - 1], (1, 4)[stage - 1]
    pictures = made["world"].folder / "pictures"
    rows = live_rows(made[f"stage{stage}"])
    assert Counter(row["source"] for row in rows) == {
        path.name: 1 if (path.name, stage) == ("exact.png", 2) else 2 for path in pictures.glob("*.png")
    }, "of a picture of the very size there is but one crop"
    for row in rows:
        assert set(row) == set(SHARD_COLUMNS)
        assert row["image_id"] == sha256(pictures / row["source"])
        assert (row["dataset_id"], row["width"], row["height"]) == ("set", edge, edge)
        assert (row["caption"], row["caption_id"]) == ("a caption", hashlib.sha256(b"a caption").hexdigest()[:16])
        crop = np.frombuffer(row["pixels"], np.uint8).reshape(edge, edge, 3)
        expected = literal_crop(pictures / row["source"], row, edge, 128 * scale, 80 * scale)
        error = np.mean((crop.astype(float) - expected) ** 2)
        assert error <= 255**2 / 10**4, f"{row['source']}: below 40 dB"


def test_repeats_have_random_crops_of_their_own_that_only_the_seed_decides(
    made: dict[str, Any], world: DataWorld
) -> None:
    rows = {(row["source"], row["repeat"]): row for row in live_rows(made["stage1"])}
    places = {key: (row["crop_left"], row["crop_top"]) for key, row in rows.items()}
    large = ("plain.png", "wide.png", "large.png", "turned.png")
    assert all(places[name, 0] != places[name, 1] for name in large)
    for axis in (0, 1):  # by chance a place may come up twice
        assert sum(places[name, 0][axis] != places[name, 1][axis] for name in large) >= 3
    shutil.copytree(made["world"].folder / "pictures", world.folder / "pictures", dirs_exist_ok=True)
    entry = {"crop_style": "random", "repeats": 1, "maximum_image_size": 128, "target_downsample_size": 80}

    def elsewhere(**keys: Any) -> dict[tuple[str, int], tuple[float, float]]:
        run = world.load(entry, stages=(1,), **keys)
        rows = live_rows(world.pixels(run, world.index(run), 1))
        return {(row["source"], row["repeat"]): (row["crop_left"], row["crop_top"]) for row in rows}

    assert elsewhere(seed=3, workers=1, shard_mib=64.0) == places, "not the machine, the workers or the shards"
    assert all(elsewhere(seed=4)[name, 0] != places[name, 0] for name in large)


@pytest.mark.parametrize("stage", [1, 2])
def test_mapped_pixels_equal_pyarrows_own_reading(made: dict[str, Any], stage: int) -> None:
    files = sorted(made[f"stage{stage}"].path.glob("*.parquet"))
    assert len(files) > 1
    for file in files:
        table = pq.read_table(file)
        mapped = open_shard(file).all()
        assert mapped.reshape(len(mapped), -1).tobytes() == b"".join(table.column("pixels").to_pylist())
        assert mapped.shape[0] == table.num_rows


@pytest.mark.parametrize("edge", [8, 16, 24, 32, 40, 64, 136, 256])
@pytest.mark.parametrize("rows", [1, 7, 200])
def test_shards_of_every_size_can_be_mapped(tmp_path: Path, edge: int, rows: int) -> None:
    rows = min(rows, 4 * 2**20 // (edge * edge * 3))  # up to two row groups
    pixels = np.random.default_rng(edge).integers(0, 256, (rows, edge, edge, 3), dtype=np.uint8)
    described = [
        ShardRow(f"{n:064d}", f"{n}.png", "set", edge, edge, 9, 9, 0.5, 0.0, 1.0, 1.0, n, "é" * n, "x", "center")
        for n in range(rows)
    ]
    write_shard(tmp_path / "x.parquet", described, list(pixels))
    table = pq.read_table(tmp_path / "x.parquet")
    assert np.array_equal(open_shard(tmp_path / "x.parquet").all(), pixels)
    assert b"".join(table.column("pixels").to_pylist()) == pixels.tobytes()
    assert table.column("caption").to_pylist() == ["é" * n for n in range(rows)]
    assert not any(field.nullable for field in table.schema)


def test_shards_have_the_same_bytes_in_whatever_order_they_are_built(made: dict[str, Any], tmp_path: Path) -> None:
    shards = plan_shards(made["run"], made["index"], 1, WorkDir(tmp_path, 0)).made
    assert len(shards) > 1
    for shard in reversed(shards):
        result = build_shard(shard, tmp_path, None)
        pictures = {(row.dataset_id, row.source) for row in shard.plan.rows(shard.numbers)}
        assert (result.rows, result.decoded) == (len(shard.numbers), len(pictures))
    for shard in shards:
        assert (tmp_path / shard.name).read_bytes() == (made["stage1"].path / shard.name).read_bytes()


def test_a_deleted_shard_is_made_again_with_the_same_bytes_and_the_others_are_kept(
    made: dict[str, Any], tmp_path: Path
) -> None:
    shards = plan_shards(made["run"], made["index"], 1, WorkDir(tmp_path, 0)).made
    for shard in shards:
        build_shard(shard, tmp_path, None)
    (tmp_path / shards[0].name).unlink()
    (tmp_path / shards[1].name).write_bytes(b"half")
    kept = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.parquet")}
    for shard in shards:
        build_shard(shard, tmp_path, None)
        assert (tmp_path / shard.name).read_bytes() == (made["stage1"].path / shard.name).read_bytes()
    again = [shard.name for shard in shards if (tmp_path / shard.name).stat().st_mtime_ns != kept.get(shard.name)]
    assert again == [shard.name for shard in shards[:2]]


def test_a_build_that_was_killed_ends_with_the_same_artifact(made: dict[str, Any], world: DataWorld) -> None:
    run, index = made["run"], made["index"]

    def half(work: WorkDir) -> NoReturn:
        build_shard(plan_shards(run, index, 1, work).made[0], work.path, None)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        materialise(world.folder, pixels_request(run, index, 1), half)
    done = materialise(
        world.folder, pixels_request(run, index, 1), lambda work: build_shards(plan_shards(run, index, 1, work), work)
    )
    assert not done.reused
    assert verify_artifact(done) == []
    names = sorted(path.name for path in made["stage1"].path.iterdir() if path.name != "manifest.json")
    assert sorted(path.name for path in done.path.iterdir() if path.name != "manifest.json") == names
    assert all((done.path / name).read_bytes() == (made["stage1"].path / name).read_bytes() for name in names)
    assert done.manifest.summary == made["stage1"].manifest.summary


@pytest.mark.parametrize("harm", ["changed", "gone"])
def test_a_picture_that_changed_since_the_index_stops_the_build_with_a_clear_error(world: DataWorld, harm: str) -> None:
    path = world.add("a.png", noise(0))
    world.add("b.png", noise(1))
    run = world.load(stages=(1,))
    index = world.index(run)
    world.add("a.png", noise(9))
    if harm == "gone":
        path.unlink()
    with pytest.raises(DataError, match=r"a\.png .*Start the run again"):
        world.pixels(run, index, 1)


def test_a_stage_without_a_large_enough_picture_is_a_data_error(world: DataWorld) -> None:
    world.add("a.png", noise(0, 100, 100))
    world.add("b.png", noise(1, 100, 100))
    run = world.load()
    index = world.index(run)
    with pytest.raises(DataError, match="No picture is large enough for stage 2"):
        world.pixels(run, index, 2)
    evals = world.eval_set(run, index)
    assert len(live_rows(evals, 1)) + len(live_rows(evals, 2)) == 0, "no picture is fit for both stages"


def test_each_stage_says_its_counts_its_reasons_and_where_to_look(world: DataWorld) -> None:
    for number in range(9):
        world.add(f"{number}.png", noise(number, 500, 70))
    for number in range(3):
        world.add(f"small {number}.png", noise(20 + number, 20 + number, 30))
    world.add("latin.png", noise(30), caption=None).with_suffix(".txt").write_bytes(b"caf\xe9")
    run = world.load({"repeats": 9, "random_crops": 2, "crop_style": "random"}, stages=(1,), max_rejected_share=0.5)
    index = world.index(run)
    assert ending(index, index.summary(IndexSummary)) == [
        "image index: 13 inputs: 9 accepted, 4 rejected (1 caption missing, 3 too small); see "
        f"{index.path}/rejected.png, {index.path}/index.parquet",
        "caption_missing: latin.png: latin.txt is no UTF-8 text (unexpected end of data at byte 3); save it as UTF-8",
        "too_small: small 0.png: 20x30 px, below minimum_image_size or the training size",
    ]
    pixels, evals = world.pixels(run, index, 1), world.eval_set(run, index)
    assert ending(pixels, pixels.summary(CropsSummary)) == [
        f"Stage I pixels: 18 crops of 9 pictures, shown 90 times an epoch, 64x64; see {pixels.path}/sheet.jpg"
    ]
    assert ending(evals, evals.summary(CropsSummary)) == [
        f"eval set: 1 picture held out of training; see {evals.path}/sheet.jpg"
    ]
    shutil.rmtree(world.folder / "pictures")
    world.add("one.png", noise(0))
    index = world.index(world.load(stages=(1,)))
    assert ending(index, index.summary(IndexSummary)) == [
        f"image index: 1 input: 1 accepted, none rejected; see {index.path}/index.parquet"
    ]


def test_the_task_of_the_index_says_what_a_person_would_check_next(
    world: DataWorld, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tasks.artifact_page, "create_markdown_artifact", lambda *_, **__: None)
    caplog.set_level("INFO")
    first = world.add("0.png", noise(0, 80, 70), "one\ntwo")
    world.add("a copy.png", first.read_bytes())
    for number in (1, 2):
        world.add(f"{number}.png", noise(number, 80, 70))
    world.add("small.png", noise(3, 20, 20))
    index = tasks.image_index.image_index.fn(world.load(stages=(1,), num_eval_images=2, max_rejected_share=0.5))
    for said in (
        f"image index: 5 inputs: 4 accepted, 1 rejected (1 too small); see {index.path}/rejected.png, ",
        f"image_index {index.fingerprint}: 1 picture is a duplicate of 1 other: ",
        "set: 1 picture has up to 2 captions, and with repeats = 0 the first alone is trained. ",
        "set: 2 of its 3 pictures are held out (num_eval_images), and 1 is trained on. ",
    ):
        assert sum(line.startswith(said) for line in caplog.messages) == 1, caplog.messages


# ---- the eval set -----------------------------------------------------------------------------------------------------


def held_out(world: DataWorld, **keys: Any) -> set[str]:
    run = world.load(**{"stages": (1,), "num_eval_images": 3, "seed": 5, **keys})
    return {row["image_id"] for row in live_rows(world.eval_set(run, world.index(run)))}


def rank(seed: int, image_id: str) -> int:
    """Order of a picture in the draw for the eval set, in whole numbers of Python."""

    def mixed(x: int) -> int:
        x = (x + 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    purpose = int.from_bytes(hashlib.sha256("\x1f".join(["eval", str(seed)]).encode()).digest()[:8], "big") >> 1
    return mixed(int(image_id[:16], 16) ^ mixed(purpose))


def test_a_picture_that_is_held_out_stays_so_when_others_come(world: DataWorld) -> None:
    """The first choice is by hash alone. Later ones keep it, also where a new picture has a smaller hash."""
    for number in range(6):
        world.add(f"{number}.png", noise(number, 80, 70))
    ids = {sha256(path) for path in (world.folder / "pictures").glob("*.png")}
    first = held_out(world)
    assert first == set(sorted(ids, key=lambda image_id: rank(5, image_id))[:3])
    seeds = [held_out(world, seed=seed) for seed in (6, 7)]
    assert any(other != first for other in seeds)
    for number in range(6, 16):
        ids.add(sha256(world.add(f"{number}.png", noise(number, 80, 70))))
        assert held_out(world) == first
    by_hash = sorted(ids, key=lambda image_id: rank(5, image_id))
    assert set(by_hash[:3]) != first, "or the pictures above test nothing"
    assert held_out(world, workspace=str(world.folder / "another")) == set(by_hash[:3]), "elsewhere by hash alone"
    more = held_out(world, num_eval_images=5)
    others = [image_id for image_id in by_hash if image_id not in first]
    assert more == first | set(others[:2])
    gone = next(path for path in (world.folder / "pictures").glob("*.png") if sha256(path) in first)
    left = more - {sha256(gone)}
    gone.unlink()
    assert held_out(world, num_eval_images=4) == left, "one that was withdrawn has no part in it"


def test_by_default_a_set_holds_out_what_it_can_spare(world: DataWorld) -> None:
    before: set[str] = set()
    spared = {1: 0, 3: 0, 7: 0, 8: 1, 10: 1, 19: 1, 20: 2, 30: 3, 40: 4, 50: 4}
    for number in range(max(spared)):
        world.add(f"{number}.png", noise(number, 80, 70))
        if number + 1 in spared:
            now = held_out(world, num_eval_images=None)
            assert len(now) == spared[number + 1]
            assert before <= now, "only grows"
            before = now


def test_a_set_that_measures_nothing_or_hardly_trains_says_so_with_the_index(world: DataWorld) -> None:
    def notes(**keys: Any) -> list[str]:
        run = world.load(**{"stages": (1,), **keys})
        return choice_notes(run, choose_held_out(run, world.index(run)))

    for number in range(3):
        world.add(f"{number}.png", noise(number, 80, 70))
    (line,) = notes(num_eval_images=None)
    said = (
        "No picture is held out of training (usable pictures: 3 of set; one is held out from 8 on), so {} measured on "
    )
    assert line.startswith(said.format("the loss is not")) and line.endswith("; judge by the samples")
    (line,) = notes(num_eval_images=None, stages=(1, 2))
    assert ", so neither the loss nor the output of Stage II is measured on pictures that" in line
    (line,) = notes(num_eval_images=0)
    assert "num_eval_images is 0" in line
    (line,) = notes(num_eval_images=2)
    assert line.startswith("set: 2 of its 3 pictures are held out (num_eval_images), and 1 is trained on.")
    assert notes(num_eval_images=1) == []
    with pytest.raises(DataError, match="3 usable pictures, and num_eval_images = 8 would hold all of them out"):
        notes(num_eval_images=8)


def test_a_set_for_measuring_alone_is_held_out_whole_however_small(world: DataWorld) -> None:
    for number in range(3):
        world.add(f"{number}.png", noise(number, 80, 70))
    own = world.folder / "own"
    own.mkdir()
    Image.fromarray(noise(20, 80, 70)).save(own / "x.png")
    entry = {"id": "own", "instance_data_dir": str(own), "caption_strategy": "filename"}
    run = world.load({}, entry, stages=(1,), num_eval_images=None, eval_dataset_id="own")
    assert eval_ids(world.eval_set(run, world.index(run))) == {sha256(own / "x.png")}


def test_the_eval_set_is_cropped_at_the_centre_and_never_trained_on(world: DataWorld) -> None:
    for number in range(6):
        world.add(f"{number}.png", noise(number, 400, 300))
    world.add("copy of 0.png", (world.folder / "pictures" / "0.png").read_bytes())
    run = world.load({"crop_style": "random", "repeats": 1}, num_eval_images=3)
    index = world.index(run)
    evals = world.eval_set(run, index)
    rows = live_rows(evals)
    assert {row["repeat"] for row in rows} == {0}
    middles = [row["crop_left"] + row["crop_width"] / 2 for row in live_rows(evals, 2)]
    assert all(abs(middle - 200) <= 1 for middle in middles)
    ids = eval_ids(evals)
    assert {row["image_id"] for row in rows} == ids
    for stage in (1, 2):
        pixels = world.pixels(run, index, stage)
        trained = TrainingRows(pixels, ids)
        everything = live_rows(pixels)
        expected = [row for row in everything if row["image_id"] not in ids]
        ((size, count),) = trained.counts.items()
        assert (size, count) == ((64, 64) if stage == 1 else (256, 256), len(expected))
        batch = trained.take(size, np.arange(count))
        assert not set(trained.image_ids(batch)) & ids
        assert trained.image_ids(batch) == [row["image_id"] for row in expected]
        assert batch.caption_ids == [row["caption_id"] for row in expected]
        assert [picture.numpy().tobytes() for picture in batch.pixels] == [row["pixels"] for row in expected]


def test_at_least_one_picture_is_left_to_train_on(world: DataWorld) -> None:
    for number in range(3):
        world.add(f"{number}.png", noise(number, 80, 70))
    with pytest.raises(DataError, match="set has 3 usable pictures, and num_eval_images = 3"):
        held_out(world)
    assert len(held_out(world, num_eval_images=2)) == 2


def test_each_data_set_is_represented_at_the_stages_that_it_feeds(world: DataWorld) -> None:
    for number in range(3):
        world.add(f"{number}.png", noise(number, 300, 280))
        world.add(f"small-{number}.png", noise(10 + number, 80, 70))
    large = world.folder / "large"
    large.mkdir()
    for number in range(3):
        Image.fromarray(noise(20 + number)).save(large / f"{number}.png")
    entry = {"id": "large", "resolution": 256, "instance_data_dir": str(large), "caption_strategy": "filename"}
    run = world.load({}, entry)
    evals = world.eval_set(run, world.index(run))
    assert [row["dataset_id"] for row in live_rows(evals, 1)] == ["set"]
    assert sorted(row["dataset_id"] for row in live_rows(evals, 2)) == ["large", "set"]
    pairs = [{row["image_id"] for row in live_rows(evals, stage) if row["dataset_id"] == "set"} for stage in (1, 2)]
    assert pairs[0] == pairs[1], "a picture of a set that feeds both stages is held out of both"


def test_pictures_of_one_s_own_are_measured_on_and_not_trained_on(world: DataWorld) -> None:
    for number in range(3):
        world.add(f"{number}.png", noise(number, 80, 70))
    world.add("copy.png", noise(20, 80, 70))
    own = world.folder / "own"
    own.mkdir()
    for number in range(2):
        Image.fromarray(noise(20 + number, 80, 70)).save(
            own / f"{number}.png", compress_level=1
        )  # the bytes of the copy
    entry = {"id": "own", "instance_data_dir": str(own), "caption_strategy": "filename"}
    run = world.load({}, entry, stages=(1,), num_eval_images=5, eval_dataset_id="own")
    index = world.index(run)
    ids = eval_ids(world.eval_set(run, index))
    assert ids == {sha256(path) for path in own.iterdir()}
    trained = TrainingRows(world.pixels(run, index, 1), ids)
    assert trained.counts == {(64, 64): 3}, "neither the set of one's own nor a copy of it elsewhere"
    with pytest.raises(ConfigError, match=r"eval_dataset_id is 'mine'; .*data.json has set, own. Use one of these"):
        world.load({}, entry, eval_dataset_id="mine")
    large = {**entry, "id": "large", "resolution": 256}
    with pytest.raises(ConfigError, match="eval_dataset_id is 'large', which does not feed stage 1"):
        world.load({}, large, eval_dataset_id="large")
    late = world.load({"start_step": 5}, entry, stages=(1,), num_eval_images=2, eval_dataset_id="own")
    with pytest.raises(DataError, match="own has 2 usable pictures, and num_eval_images = 2"):
        world.eval_set(late, index)
    with pytest.raises(DataError, match="own has 2 usable pictures, and num_eval_images = 2"):
        alone = world.load(entry, stages=(1,), num_eval_images=2, eval_dataset_id="own")
        world.eval_set(alone, world.index(alone))


def test_a_run_says_when_the_held_out_pictures_are_not_those_of_the_one_before(
    world: DataWorld, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tasks.eval_set, "show_crops", lambda *_: None)

    def held_out() -> tuple[frozenset[str], str]:
        run = world.load(stages=(1,), num_eval_images=3, seed=5)
        caplog.clear()
        ids = eval_ids(tasks.eval_set.eval_set.fn(run, world.index(run)))
        said = caplog.text
        caplog.clear()
        tasks.eval_set.eval_set.fn(run, world.index(run))
        assert "are not comparable" not in caplog.text, "reused"
        return ids, said

    for number in range(8):
        world.add(f"{number}.png", noise(number, 80, 70))
    before, said = held_out()
    assert "are not comparable" not in said
    next(path for path in (world.folder / "pictures").glob("*.png") if sha256(path) in before).unlink()
    after, said = held_out()
    assert len(before & after) == 2 and "1 held-out picture added and 1 removed since" in said


# ---- batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 8, 100])
def test_an_epoch_visits_every_row_exactly_once(batch_size: int) -> None:
    counts = (((64, 64), 23), ((96, 64), 5))
    order = BatchOrder(counts, batch_size, 7)
    assert order.batches_per_epoch == math.ceil(23 / batch_size) + math.ceil(5 / batch_size)
    epochs = []
    for epoch in range(3):
        numbers = range(epoch * order.batches_per_epoch, (epoch + 1) * order.batches_per_epoch)
        seen = [(size, int(row)) for number in numbers for size, rows in [order.batch(number)] for row in rows]
        assert sorted(seen) == sorted((size, row) for size, count in counts for row in range(count))
        assert all(len(order.batch(number)[1]) <= batch_size for number in numbers)
        epochs.append(seen)
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_batch_is_a_function_of_seed_and_number_alone() -> None:
    counts = (((64, 64), 50),)

    def batch(order: BatchOrder, number: int) -> list[int]:
        return [int(row) for row in order.batch(number)[1]]

    forward = [batch(BatchOrder(counts, 4, 1), number) for number in range(60)]
    order = BatchOrder(counts, 4, 1)
    for number in random.Random(0).sample(range(60), 60):  # whatever was asked before
        assert batch(order, number) == forward[number]
    assert [batch(BatchOrder(counts, 4, 2), number) for number in range(60)] != forward
    assert json.loads(json.dumps(forward)) == forward
