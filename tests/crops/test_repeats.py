"""Repeats: how often an epoch shows a picture, and what of it is stored.

The other computation: a list of every pass over every picture, with the caption and the crop that it is to have.
"""

import json
import shutil
from collections import Counter
from typing import Any

import numpy as np
import pytest
from artifact_rows import live_rows, shown_rows, times
from data_world import DataWorld
from PIL import Image

from deepfloyd_core.crops.identity import pixels_request
from deepfloyd_core.crops.pixels import build_shards, plan_shards
from deepfloyd_core.errors import StorageError
from deepfloyd_core.store.artifacts import Artifact, WorkDir
from deepfloyd_core.training.batches import BatchOrder, MixedOrder, OrderSettings, TrainingRows
from deepfloyd_core.training.epochs import batches_per_epoch

ROOMY = (70, 400)  # height, width: 64 px crops have some 300 places


def noise(seed: int, height: int = 70, width: int = 90) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def epoch(pixels: Artifact, batch_size: int = 7) -> Counter[tuple[str, str]]:
    """How often the batches of one epoch show each picture with each caption."""
    rows = TrainingRows(pixels, frozenset())
    order = BatchOrder(tuple(rows.counts.items()), batch_size, 3)
    shown: Counter[tuple[str, str]] = Counter()
    for number in range(order.batches_per_epoch):
        batch = rows.take(*order.batch(number))
        shown.update(zip(rows.image_ids(batch), batch.caption_ids, strict=True))
    return shown


def made(world: DataWorld, entry: dict[str, Any], **keys: Any) -> Artifact:
    run = world.load(entry, stages=(1,), **keys)
    return world.pixels(run, world.index(run), 1)


@pytest.mark.parametrize(
    ("style", "repeats"),
    [("center", 1000), ("corner", 6), ("random", 6), ("random", 200), ("face", 5)],
)
def test_an_epoch_shows_each_picture_and_each_caption_as_often_as_every_pass_would(
    world: DataWorld, style: str, repeats: int
) -> None:
    captions = {"a": ["one"], "b": ["one", "two", "three"], "c": [f"caption {number}" for number in range(5)]}
    for number, (name, texts) in enumerate(captions.items()):
        world.add(f"{name}.png", noise(number, *ROOMY), "\n".join(texts))
    pixels = made(world, {"crop_style": style, "repeats": repeats, "random_crops": 4})
    passes = Counter((name, texts[one % len(texts)]) for name, texts in captions.items() for one in range(repeats + 1))
    if style == "random" and repeats == 200:  # stored crops take turns, so a caption may come one time more or less
        shown = Counter((row["source"][0], row["caption"]) for row in shown_rows(pixels))
        assert all(abs(shown[key] - count) <= 1 for key, count in passes.items()) and sum(shown.values()) == 603
    else:
        assert Counter((row["source"][0], row["caption"]) for row in shown_rows(pixels)) == passes
    by_batches, by_rows = epoch(pixels), Counter((row["image_id"], row["caption_id"]) for row in shown_rows(pixels))
    assert by_batches == by_rows
    assert pixels.manifest.summary["shown_per_epoch"] == 3 * (repeats + 1)
    stored = Counter(row["source"][0] for row in live_rows(pixels))
    if style == "random":
        assert all(stored[name] <= max(4 + len(texts), 0) for name, texts in captions.items())
    else:
        assert stored == {name: min(len(texts), repeats + 1) for name, texts in captions.items()}


def test_a_thousand_repeats_of_a_central_crop_cost_one_row_and_train_as_a_thousand_rows_would(world: DataWorld) -> None:
    """The batches are those of a list in which each row stands as often as it is shown."""
    for number in range(8):
        world.add(f"{number}.png", noise(number))
    once, often = (made(world, {"repeats": repeats}) for repeats in (0, 1000))
    assert often.manifest.summary["rows"] == 8 and often.manifest.summary["decoded"] == 0, (
        "the shards are those of no repeats"
    )
    assert sum(path.stat().st_size for path in often.path.iterdir()) < 1.5e6
    rows = TrainingRows(often, frozenset())
    order = BatchOrder(tuple(rows.counts.items()), 4, 5)
    plain = [row["pixels"] for row in live_rows(once) for _ in range(1001)]
    assert order.batches_per_epoch == 2002 == batches_per_epoch(often, frozenset(), 4)
    for number in (0, 1, 700, 2001, 2002):
        size, numbers = order.batch(number)
        assert [one.numpy().tobytes() for one in rows.take(size, numbers).pixels] == [plain[place] for place in numbers]


def test_a_repeat_stores_a_row_only_where_its_crop_differs(world: DataWorld) -> None:
    world.add("exact.png", noise(0, 64, 64))
    world.add("narrow.png", noise(1, 64, 66))
    world.add("roomy.png", noise(2, *ROOMY))
    pixels = made(world, {"crop_style": "random", "repeats": 30})
    stored = Counter(row["source"] for row in live_rows(pixels))
    assert stored["exact.png"] == 1 and 2 <= stored["narrow.png"] <= 3 and stored["roomy.png"] >= 28
    places = [(row["source"], row["crop_left"], row["crop_top"]) for row in live_rows(pixels)]
    assert len(set(places)) == len(places)
    assert Counter(row["source"] for row in shown_rows(pixels)) == dict.fromkeys(
        ("exact.png", "narrow.png", "roomy.png"), 31
    )


def test_few_repeats_have_the_crops_that_every_pass_alone_draws(world: DataWorld) -> None:
    world.add("a.png", noise(0, *ROOMY))
    world.add("b.png", noise(1, *ROOMY))
    of = {
        count: made(world, {"crop_style": "random", "repeats": count - 1, "random_crops": 8}) for count in (1, 5, 8, 30)
    }
    rows = {
        count: {(row["source"], row["repeat"]): row["pixels"] for row in live_rows(one)} for count, one in of.items()
    }
    assert rows[1].items() <= rows[5].items() <= rows[8].items() == rows[30].items()
    assert sorted(times(of[30])) == [3] * 4 + [4] * 12
    assert of[30].manifest.summary["decoded"] == 0, "another number of passes decodes nothing"


def test_the_bound_is_said_and_a_run_below_it_says_nothing(world: DataWorld) -> None:
    world.add("a.png", noise(0))
    said = world.load({"crop_style": "random", "repeats": 1000}).notes
    assert any("shows each picture 1,001 times, in 32 random crops" in note for note in said)
    assert not any("random crops" in note for note in world.load({"crop_style": "random", "repeats": 31}).notes)
    assert not any("random crops" in note for note in world.load({"crop_style": "center", "repeats": 1000}).notes)


def test_shares_of_data_sets_follow_what_is_shown(world: DataWorld) -> None:
    entries = []
    for name, repeats in (("rare", 0), ("often", 9)):
        (world.folder / name).mkdir()
        for number in range(4):
            Image.fromarray(noise(number + len(name))).save(world.folder / name / f"{number}.png")
        entries.append({"id": name, "instance_data_dir": str(world.folder / name), "caption_strategy": "filename",
                        "repeats": repeats})  # fmt: skip
    run = world.load(*entries, stages=(1,))
    pixels = world.pixels(run, world.index(run), 1)
    rows = TrainingRows(pixels, frozenset())
    order = MixedOrder(rows, {}, OrderSettings(2, 1, 22, 7, True))
    owners = [row["dataset_id"] for row in live_rows(pixels)]
    shown = Counter(owners[row] for number in range(22) for row in rows.take(*order.batch(number)).rows)
    assert shown == {"rare": 4, "often": 40}


def test_a_disk_without_room_is_an_error_before_any_shard_is_written(
    world: DataWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(4):
        world.add(f"{number}.png", noise(number, *ROOMY))
    run = world.load({"crop_style": "random", "repeats": 999, "random_crops": 1000}, stages=(1,))
    index = world.index(run)
    folder = run.workspace / "elsewhere" / "x"
    folder.mkdir(parents=True)

    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2_000_000))
    with pytest.raises(
        StorageError, match=r"[0-9,]+ crops take \d.* MB, and .* has less room \(.*, 2\.00 MB free\)\. Make room"
    ) as caught:
        build_shards(plan_shards(run, index, 1, WorkDir(folder, 0)), WorkDir(folder, 0))
    assert str(run.workspace) in str(caught.value)
    assert not list(folder.glob("*.parquet"))
    monkeypatch.undo()
    assert json.dumps(pixels_request(run, index, 1).spec)


@pytest.mark.parametrize("style", ["center", "random"])
def test_a_folder_that_grew_has_the_rows_and_the_counts_of_a_first_run(world: DataWorld, style: str) -> None:
    entry = {"crop_style": style, "repeats": 40, "random_crops": 3}
    for number in range(4):
        world.add(f"{number}.png", noise(number, *ROOMY), "one\ntwo")
    made(world, entry)
    world.add("4.png", noise(4, *ROOMY), "three")
    (world.folder / "pictures" / "1.txt").write_text("one\ntwo\nthree")
    grown = made(world, entry)
    fresh = made(world, entry, workspace=str(world.folder / "fresh"))
    assert shown_rows(grown) == shown_rows(fresh) and times(grown) == times(fresh)
    assert grown.fingerprint == fresh.fingerprint
