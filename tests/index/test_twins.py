"""Copies of a picture: found whatever was done to them, kept on one side of the split, trained on once if asked.

The other computations: what a test itself made of which picture; a comparison of every look with every other one.
"""

import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import imagehash
import numpy as np
import pytest
from artifact_rows import ledger, live_rows
from copies import COPIES, LANCZOS, encoded, scene, trained
from data_world import DataWorld
from photographs import photographs, upright_rgb
from PIL import Image, ImageDraw, ImageFont

from deepfloyd_core.crops.rows import eval_ids, held_out_ids
from deepfloyd_core.files import sha256_file
from deepfloyd_core.index import judge, looks, twins
from deepfloyd_core.index.judge import Entry
from deepfloyd_core.index.ledger import LOOK_BYTES
from deepfloyd_core.index.looks import MAX_BITS, hashes_of, same_thumbnail, sight_of
from deepfloyd_core.index.twins import Member, group_alike
from deepfloyd_core.measures import drawn_world as drawn
from deepfloyd_core.pictures import decode
from deepfloyd_core.pictures.decode import Glance, check_decodes


@cache
def photos() -> dict[str, Image.Image]:
    """The photographs of the test extra, at most 700 px; of the chessboards, which are equal, none."""
    found = {}
    for name, path in photographs().items():
        if path.suffix in (".png", ".jpg") and "chessboard" not in name:
            picture = Image.fromarray(np.asarray(upright_rgb(path)))
            picture.thumbnail((700, 700), LANCZOS)
            if min(picture.size) >= 100:
                found[name] = picture
    return found


@cache
def photo_looks() -> np.ndarray:
    return looks_of(list(photos().values()))


def look_of(glance: Glance) -> bytes:
    return looks.looks_of([sight_of(glance)])[0]


def looks_of(pictures: list[Image.Image]) -> np.ndarray:
    return np.stack([np.frombuffer(look_of(check_decodes(encoded(one, "BMP"))), np.uint8) for one in pictures])


def pairs_alike(looks: np.ndarray) -> list[tuple[int, int]]:
    """Every look compared with every other one."""
    found, hashes = [], hashes_of(looks)
    for one in range(len(looks) - 1):
        rest = slice(one + 1, None)
        near = (np.bitwise_count(hashes[one] ^ hashes[rest]) <= MAX_BITS) & (hashes[one] != 0)
        agree = near & same_thumbnail(np.broadcast_to(looks[one], looks[rest].shape), looks[rest])
        equal = (looks[rest] == looks[one]).all(1)
        found += [(one, one + 1 + int(place)) for place in np.flatnonzero(agree | equal)]
    return found


# ---- looks ------------------------------------------------------------------------------------------------------------


def look_by_libraries(glance: Glance) -> bytes:
    """The look by ImageHash's pHash and Pillow's means."""
    light, *colours = glance.small.convert("YCbCr").split()
    thumbnail = light.reduce(2)
    if np.asarray(thumbnail).std() < looks.MIN_CONTRAST:
        return (bytes(8) + glance.digest()).ljust(LOOK_BYTES, b"\0")
    bits = np.packbits(imagehash.phash(light).hash)
    return b"".join([bits.tobytes(), thumbnail.tobytes(), *(colour.reduce(4).tobytes() for colour in colours)])


def test_looks_are_those_of_imagehash_and_pillow_bit_for_bit() -> None:
    rng = np.random.default_rng(3)
    pictures = [one.crop((0, 0, int(rng.integers(60, one.width)), int(rng.integers(60, one.height))))
                for one in photos().values() for _ in range(8)]  # fmt: skip
    for one in list(photos().values())[:10]:  # symmetric: half of the frequencies are zero
        both = Image.new("RGB", (2 * one.width, one.height))
        both.paste(one)
        both.paste(one.transpose(Image.Transpose.FLIP_LEFT_RIGHT), (one.width, 0))
        pictures += [both, Image.blend(both, Image.new("RGB", both.size, "gray"), rng.uniform(0.85, 0.99))]
    pictures += [series(rng) for series in (stars, shapes, dots, colours, numbers) for _ in range(30)]
    glances = [check_decodes(encoded(one, "BMP")) for one in pictures]
    expected = [look_by_libraries(glance) for glance in glances]
    assert 40 < sum(not any(look[:8]) for look in expected) < 100, "some have no contrast"
    assert looks.looks_of([sight_of(glance) for glance in glances]) == expected
    assert [look_of(glance) for glance in glances[::20]] == expected[::20], "one by one as well"


@pytest.mark.parametrize("copy", COPIES)
def test_a_copy_of_a_photograph_has_its_look(copy: str) -> None:
    missed = []
    for (name, picture), look in zip(photos().items(), photo_looks(), strict=True):
        other = np.frombuffer(look_of(check_decodes(COPIES[copy](picture))), np.uint8)
        if not pairs_alike(np.stack([look, other])):
            missed.append(name)
    assert missed == []


def test_no_two_photographs_are_alike() -> None:
    assert len(photo_looks()) >= 20 and pairs_alike(photo_looks()) == []


def stars(rng: np.random.Generator) -> Image.Image:
    return Image.fromarray(drawn.draw(rng, "a purple star", 128, 128, drawn.random_layout(rng, 0.8)))


def shapes(rng: np.random.Generator) -> Image.Image:
    return Image.fromarray(drawn.draw(rng, drawn.BASE_CAPTIONS[rng.integers(12)], 128))


def dots(rng: np.random.Generator) -> Image.Image:
    """A dot of some colour somewhere on a white ground: next to no contrast."""
    picture = Image.new("RGB", (256, 256), "white")
    x, y = (int(v) for v in rng.integers(20, 230, 2))
    ImageDraw.Draw(picture).ellipse((x - 4, y - 4, x + 4, y + 4), fill=tuple(int(v) for v in rng.integers(0, 200, 3)))
    return picture


def colours(rng: np.random.Generator) -> Image.Image:
    """One colour; no two of these are equal."""
    return Image.new("RGB", (96, 96), tuple(int(v) for v in rng.integers(0, 256, 3)))


def numbers(rng: np.random.Generator) -> Image.Image:
    picture = Image.new("RGB", (128, 128), "white")
    text = f"{rng.integers(10**6):06d}"
    ImageDraw.Draw(picture).text((14, 44), text, fill="black", font=ImageFont.load_default(32))
    return picture


@pytest.mark.parametrize(
    ("series", "count"), [(stars, 400), (shapes, 600), (dots, 150), (colours, 200), (numbers, 200)]
)
def test_drawings_of_a_series_are_not_alike(series: Callable[[np.random.Generator], Image.Image], count: int) -> None:
    rng = np.random.default_rng(11)
    pictures = list({picture.tobytes(): picture for picture in (series(rng) for _ in range(count))}.values())
    assert pairs_alike(looks_of(pictures)) == []


def test_the_same_shape_in_another_colour_or_place_is_another_picture() -> None:
    def draw(caption: str, across: float) -> Image.Image:
        layout = drawn.Layout(0.3, across, 0.5, 0.0)
        return Image.fromarray(drawn.draw(np.random.default_rng(0), caption, 128, 128, layout))

    pictures = [draw(caption, across) for caption in ("a red circle", "a blue circle") for across in (0.3, 0.4, 0.5)]
    looks = looks_of(pictures)
    assert int(np.bitwise_count(hashes_of(looks)[0] ^ hashes_of(looks)[3])) <= MAX_BITS, (
        "gray hashes do not tell them apart"
    )
    assert pairs_alike(looks) == []


def test_of_pictures_without_contrast_equal_pixels_are_alike_in_any_file() -> None:
    plain = Image.new("RGB", (80, 60), (250, 250, 250))
    files = [encoded(plain, kind) for kind in ("PNG", "BMP", "TIFF", "GIF")]
    files.append(encoded(plain, "WEBP", lossless=True))
    files.append(encoded(Image.new("RGB", (60, 80), (250, 250, 250)), "PNG"))
    seen = np.stack([np.frombuffer(look_of(check_decodes(data)), np.uint8) for data in files])
    assert len(np.unique(seen, axis=0)) == 2
    first = group_alike(np.arange(len(files), dtype=np.uint64), seen, np.arange(len(files)))
    assert first.tolist() == [0, 0, 0, 0, 0, 5], "the last is higher than wide"


def test_a_look_is_of_the_one_decode_that_judges_the_picture(world: DataWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    """So it costs a few hundredths of the index; another decode would double that."""
    decodes = []

    def counted(*arguments: Any) -> Image.Image:
        decodes.append(1)
        return load(*arguments)

    load = decode.load_pixels
    monkeypatch.setattr(decode, "load_pixels", counted)
    run = world.load(stages=(1,))
    for kind in ("JPEG", "PNG", "WEBP"):
        path = world.add(f"a.{kind.lower()}", encoded(scene(1), kind))
        entry = Entry("set", path.name, path.stat().st_size, sha256_file(path), ("a caption",), None)
        assert judge.look(run, run.datasets[0], entry).look is not None
    assert len(decodes) == 3


# ---- groups -----------------------------------------------------------------------------------------------------------


def random_looks(rng: np.random.Generator, count: int) -> np.ndarray:
    looks = rng.integers(0, 256, (count, LOOK_BYTES), dtype=np.uint8)
    looks[:, 8:] = looks[:, 8:] // 2 + rng.integers(0, 100, (count, 1), dtype=np.uint8)
    return looks


def altered(rng: np.random.Generator, looks: np.ndarray, bits: int) -> np.ndarray:
    """Looks whose hashes differ in so many bits, and the rest by up to 2 levels."""
    made = np.clip(looks.astype(np.int16) + rng.integers(-2, 3, looks.shape), 0, 255).astype(np.uint8)
    flips = np.stack([rng.permutation(64) < bits for _ in looks])
    made[:, :8] = looks[:, :8] ^ np.packbits(flips, axis=1)
    return np.asarray(made)


@pytest.mark.parametrize("bits", [0, 2, 4])
def test_groups_are_those_of_a_comparison_of_each_with_each(bits: int) -> None:
    rng = np.random.default_rng(bits)
    looks = random_looks(rng, 300)
    looks = np.concatenate([looks, altered(rng, looks[:100], bits), altered(rng, looks[:30], bits)])
    shuffled = rng.permutation(len(looks))
    first = group_alike(np.arange(len(looks), dtype=np.uint64), looks[shuffled], np.arange(len(looks)))
    for one, other in pairs_alike(looks[shuffled]):
        assert first[one] == first[other]
    assert len(np.unique(first)) == 300, "and nothing else is put together"
    for places in (np.arange(430)[::2], np.arange(430)[100:]):
        part = group_alike(places.astype(np.uint64), looks[shuffled], places)
        same = {tuple(np.flatnonzero(part == one)) for one in np.unique(part)}
        whole = first[places]
        assert same == {tuple(np.flatnonzero(whole == one)) for one in np.unique(whole)} or len(same) > len(
            np.unique(whole)
        )


def test_a_family_of_thousands_that_are_all_alike_is_one_group_of_few_comparisons(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = np.random.default_rng(0)
    looks = altered(rng, np.repeat(random_looks(rng, 1), 6000, axis=0), 0)
    compared, near = [0], twins.near_pairs

    def counted(*args: Any) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for one, other in near(*args):
            compared[0] += len(one)
            yield one, other

    monkeypatch.setattr(twins, "near_pairs", counted)
    first = group_alike(np.arange(len(looks), dtype=np.uint64), looks, np.arange(len(looks)))
    assert not first.any()
    assert 6000 <= compared[0] <= 15 * 64 * 6000, "each with 64 others, in each of 15 orders"


# ---- the split --------------------------------------------------------------------------------------------------------


def test_no_copy_of_a_held_out_picture_is_trained_on(world: DataWorld) -> None:
    for number in range(30):
        world.add(f"{number:02d}.jpg", encoded(scene(number), "JPEG", quality=92))
    run = world.load(stages=(1,), num_eval_images=7)
    before = world.eval_set(run, world.index(run))
    held = {row["source"] for row in live_rows(before)}
    assert len(held) == 7
    copies = {}
    for source, (name, copy) in zip(sorted(held), list(COPIES.items())[:7], strict=True):
        picture = Image.open(world.folder / "pictures" / source).convert("RGB")
        copies[f"{source[:2]} {name}"] = source
        world.add(f"{source[:2]} {name}", copy(picture))
    index = world.index(run)
    evals = world.eval_set(run, index)
    assert {row["source"] for row in live_rows(evals)} == held, "those that were held out stay"
    seen = trained(world, run, index, evals)
    assert seen == {f"{number:02d}.jpg" for number in range(30)} - held, "7 copies of 7 pictures would be trained on"
    rows = ledger(index)
    for name, source in copies.items():
        assert rows[name]["group"] == rows[source]["group"] == rows[source]["image_id"], name
    assert (index.manifest.summary["twin_groups"], index.manifest.summary["twins"]) == (7, 7)
    assert (index.path / "twins.png").exists()


def test_copies_of_what_is_trained_on_change_no_held_out_picture(world: DataWorld) -> None:
    for number in range(12):
        world.add(f"{number:02d}.png", scene(number))
    run = world.load(stages=(1,), num_eval_images=4)
    held = eval_ids(world.eval_set(run, world.index(run)))
    for number in range(12):
        for name in ("q60.jpg", "half.jpg", "twice.jpg"):
            world.add(f"copies/{number:02d} {name}", COPIES[name](scene(number)))
    index = world.index(run)
    evals = world.eval_set(run, index)
    assert eval_ids(evals) == held
    assert len(trained(world, run, index, evals)) == (12 - 4) * 4
    assert (index.manifest.summary["twin_groups"], index.manifest.summary["twins"]) == (12, 36)


def test_a_copy_in_another_data_set_is_held_out_too(world: DataWorld) -> None:
    entries = []
    for name, kind in (("one", "PNG"), ("two", "JPEG")):
        (world.folder / name).mkdir()
        for number in range(6):
            (world.folder / name / f"{number}.{kind.lower()}").write_bytes(encoded(scene(number), kind))
        entries.append({"id": name, "instance_data_dir": str(world.folder / name), "caption_strategy": "filename"})
    run = world.load(*entries, stages=(1,), eval_dataset_id="one", num_eval_images=2)
    index = world.index(run)
    evals = world.eval_set(run, index)
    held = {row["source"].split(".")[0] for row in live_rows(evals)}
    assert {name.split(".")[0] for name in trained(world, run, index, evals)} == {*"012345"} - held
    assert len(held_out_ids(evals)) == 4


def test_the_ledger_of_a_grown_folder_is_that_of_a_first_run(
    world: DataWorld, new_world: Callable[[Path], DataWorld]
) -> None:
    for number in range(5):
        world.add(f"{number}.png", scene(number))
    run = world.load(stages=(1,))
    world.index(run)
    for number in range(3):
        world.add(f"{number} again.jpg", COPIES["half.jpg"](scene(number)))
    grown = world.index(run)
    assert grown.manifest.summary["judged_now"] == 3, "the looks of the others are known"
    fresh = world.index(world.load(stages=(1,), workspace=str(world.folder / "fresh")))
    for name in ("index.parquet", "looks.npy", "twins.png"):
        assert (grown.path / name).read_bytes() == (fresh.path / name).read_bytes()


# ---- duplicates = first -----------------------------------------------------------------------------------------------


def test_first_trains_on_one_of_each_group_and_counts_the_others(world: DataWorld) -> None:
    for number in range(6):
        world.add(f"{number}.png", scene(number))
    for number in (0, 1):
        world.add(f"{number} small.jpg", COPIES["half.jpg"](scene(number)))
        shutil.copy(world.folder / "pictures" / f"{number}.png", world.folder / "pictures" / f"a copy of {number}.png")
        (world.folder / "pictures" / f"a copy of {number}.txt").write_text("another caption")
    keep = world.index(world.load(stages=(1,)))
    assert keep.manifest.summary["accepted"] == 10
    index = world.index(world.load({"duplicates": "first"}, stages=(1,), max_rejected_share=0.0))
    assert index.manifest.summary["judged_now"] == 0, "other settings of captions and counts judge nothing again"
    rows = ledger(index)
    out = {source for source, row in rows.items() if row["reason"] == "duplicate"}
    assert out == {"0 small.jpg", "1 small.jpg", "a copy of 0.png", "a copy of 1.png"}
    assert rows["1 small.jpg"]["detail"] == "shows the same as 1.png"
    assert index.manifest.summary["reasons"] == {"duplicate": 4} and index.manifest.summary["accepted"] == 6
    assert not (index.path / "rejected.png").exists()


def test_first_keeps_the_picture_that_feeds_more_stages(world: DataWorld) -> None:
    world.add("a.png", scene(1, 120))
    world.add("b.png", scene(1, 400))
    world.add("c.png", scene(2, 400))
    rows = ledger(world.index(world.load({"duplicates": "first"})))
    assert {source: row["reason"] for source, row in rows.items()} == {
        "a.png": "duplicate",
        "b.png": None,
        "c.png": None,
    }


def test_of_numbered_pictures_the_lower_number_is_the_first(world: DataWorld) -> None:
    """Rows of a saved data set have numbers alone for names."""
    for number in (9, 10, 100):
        world.add(f"{number}.png", scene(1))
    world.add("11.png", scene(2))
    rows = ledger(world.index(world.load({"duplicates": "first"}, stages=(1,), max_rejected_share=0.9)))
    assert [name for name, row in sorted(rows.items()) if row["reason"] is None] == ["11.png", "9.png"]
    assert {row["group"] for name, row in rows.items() if name != "11.png"} == {rows["9.png"]["image_id"]}


def test_any_name_has_a_place_among_copies() -> None:
    names = ["", ".", "/", "2", "02", "10", "9" * 5000, "a.jpg", "a (1).jpg", "a2.jpg", "a10.jpg", "b/a.jpg"]
    members = [Member(row, 0, 1, "set", name, "") for row, name in enumerate(reversed(names))]
    order = [member.source for member in sorted(members, key=lambda member: member.order)]
    assert sorted(order) == sorted(names)
    assert [name for name in order if name.endswith(".jpg")] == names[-5:]
    assert [name for name in order if name.isdecimal()] == ["02", "2", "10", "9" * 5000]


def test_max_num_samples_counts_pictures_that_are_left(world: DataWorld) -> None:
    for number in range(4):
        world.add(f"{number}.png", scene(number))
        world.add(f"{number} again.png", COPIES["q60.jpg"](scene(number)))
    index = world.index(world.load({"duplicates": "first", "max_num_samples": 3}, stages=(1,)))
    assert index.manifest.summary["reasons"] == {"beyond_max_num_samples": 1, "duplicate": 4}
