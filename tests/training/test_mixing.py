"""Several data sets in one run: exact shares, windows of steps, no sample repeated before all of its set were seen."""

import random
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pytest
from artifact_rows import SOME_EVAL_SET, sealed_manifest
from data_world import DataWorld
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from deepfloyd_core.config.flavours import FLAVOURS
from deepfloyd_core.crops.rows import read_row_list
from deepfloyd_core.errors import DataError
from deepfloyd_core.files import write_sealed
from deepfloyd_core.pictures.geometry import Size
from deepfloyd_core.store.artifacts import Artifact
from deepfloyd_core.store.manifest import MANIFEST
from deepfloyd_core.training.batches import BatchOrder, Group, MixedOrder, OrderSettings, TrainingRows
from deepfloyd_core.training.identity import lora_request
from deepfloyd_core.training.jobs import TrainingInputs
from deepfloyd_core.training.mixing import Mix, Share, first_gap, shares

ours = settings(deadline=None, database=None, derandomize=True, max_examples=60)

WINDOWS = st.tuples(st.integers(0, 40), st.none() | st.integers(1, 40)).map(
    lambda window: (window[0], None if window[1] is None else window[0] + window[1])
)
SHARES = st.builds(lambda weight, window: Share(weight, *window), st.floats(0.01, 100), WINDOWS)


@ours
@given(st.lists(SHARES, max_size=4), st.integers(0, 4), st.integers(1, 3))
def test_each_pick_is_of_an_active_set_and_knows_how_many_came_before(
    parts: list[Share], place: int, passes: int
) -> None:
    parts.insert(place, Share(1.0))  # one without a window, so that no step is empty
    mix, given_so_far = Mix(tuple(parts), passes), Counter[int]()
    for number in range(120):
        place, before = mix.pick(number)
        assert parts[place].active(number // passes)
        assert before == given_so_far[place]
        given_so_far[place] += 1


@ours
@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=6))
def test_shares_are_kept_at_every_moment_not_only_on_average(weights: list[float]) -> None:
    mix, counts = Mix(tuple(Share(weight) for weight in weights)), Counter[int]()
    for number in range(300):
        counts[mix.pick(number)[0]] += 1
        for place, weight in enumerate(weights):
            assert abs(counts[place] - (number + 1) * weight / sum(weights)) < 2


def test_the_first_step_without_a_data_set_is_found() -> None:
    assert first_gap((Share(1),), 10) is None
    assert first_gap((Share(1, 1),), 10) == 0
    assert first_gap((Share(1, 0, 5), Share(1, 7)), 10) == 5
    assert first_gap((Share(1, 0, 5), Share(1, 7)), 5) is None, "the run is over by then"
    assert first_gap((Share(1, 0, 5), Share(1, 5)), 10) is None
    with pytest.raises(ValueError, match="no data set is active"):
        Mix((Share(1, 0, 5),)).pick(5)


# ---- the batch order --------------------------------------------------------------------------------------------------

SIZES = {"a": {(64, 64): 11, (96, 64): 5}, "b": {(64, 64): 3}, "c": {(64, 96): 7}}


def rows(*names: str) -> TrainingRows:
    """Stands for TrainingRows: of each size the rows of all data sets, one after the other."""
    places: dict[Group, dict[tuple[int, int], np.ndarray]] = {}
    used: Counter[tuple[int, int]] = Counter()
    for name in names:
        for size, count in SIZES[name].items():
            places.setdefault(Group(name), {})[size] = np.arange(used[size], used[size] + count)
            used[size] += count
    return cast(TrainingRows, SimpleNamespace(places=places))


def order(names: str, parts: dict[str, Share] | None = None, **keys: Any) -> MixedOrder:
    settings = {"batch_size": 2, "passes_per_step": 1, "steps": 100, "seed": 7, "by_size": True, **keys}
    return MixedOrder(rows(*names), parts or {}, OrderSettings(**settings))


def owner(names: str, size: tuple[int, int], number: int) -> str:
    return next(group.dataset for group, own in rows(*names).places.items() if number in own.get(size, ()))


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_a_data_set_that_is_alone_keeps_the_order_it_always_had(batch_size: int) -> None:
    plain, mixed = BatchOrder(tuple(SIZES["a"].items()), batch_size, 7), order("a", batch_size=batch_size)
    for number in range(60):
        (size, expected), (found_size, found) = plain.batch(number), mixed.batch(number)
        assert size == found_size
        assert np.array_equal(expected, found)


@pytest.mark.parametrize(
    "parts", [{}, {"a": Share(0.2), "c": Share(3.0)}, {"b": Share(5.0, 3, 40), "c": Share(1.0, 10)}]
)
@pytest.mark.parametrize("by_size", [True, False])
def test_no_sample_is_lost_or_repeated_before_all_of_its_data_set_were_seen(
    parts: dict[str, Share], by_size: bool
) -> None:
    mixed, seen = order("abc", parts, by_size=by_size), defaultdict[str, list[tuple[Size, int]]](list)
    for number in range(100):
        size, chosen = mixed.batch(number)
        names = {owner("abc", size, int(row)) for row in chosen}
        assert len(names) == 1, "a batch is of one data set, and so of one size"
        seen[names.pop()] += [(size, int(row)) for row in chosen]
    for name, found in seen.items():
        everything = Counter((size, int(row)) for size, own in rows(*"abc").places[Group(name)].items() for row in own)
        passes, rest = divmod(len(found), everything.total())
        for epoch in range(passes):
            assert Counter(found[epoch * everything.total() : (epoch + 1) * everything.total()]) == everything
        assert not rest or max(Counter(found[-rest:]).values()) == 1


def batches_of(mixed: MixedOrder, total: int = 100) -> Counter[str]:
    return Counter(owner("abc", size, int(chosen[0])) for size, chosen in map(mixed.batch, range(total)))


def test_probability_and_size_decide_how_often_a_set_is_drawn_from() -> None:
    assert batches_of(order("abc", batch_size=1), 104) == {"a": 64, "b": 12, "c": 28}, "16, 3 and 7 pictures"
    assert batches_of(order("abc", batch_size=1, by_size=False), 99) == {"a": 33, "b": 33, "c": 33}
    tripled = order("abc", {"b": Share(3.0)}, batch_size=1)
    assert batches_of(tripled, 128) == {"a": 64, "b": 36, "c": 28}


def test_a_window_begins_and_ends_at_its_optimizer_steps() -> None:
    mixed = order("abc", {"a": Share(1.0, 0, 30), "b": Share(1.0, 30), "c": Share(1.0, 50, 60)}, passes_per_step=2)
    steps = defaultdict[str, set[int]](set)
    for number in range(200):
        size, chosen = mixed.batch(number)
        steps[owner("abc", size, int(chosen[0]))].add(number // 2)
    assert steps["a"] == set(range(30))
    assert min(steps["b"]) == 30 and max(steps["b"]) == 99
    assert steps["c"] and steps["c"] <= set(range(50, 60))
    with pytest.raises(DataError, match="is active in step 31"):
        order("ac", {"a": Share(1.0, 0, 30), "c": Share(1.0, 50)})


def test_a_batch_is_a_function_of_seed_and_number_alone() -> None:
    parts = {"a": Share(0.3, 0, 80), "b": Share(1.0, 5)}
    forward = [order("abc", parts).batch(number) for number in range(100)]
    mixed = order("abc", parts)
    for number in random.Random(0).sample(range(100), 100):
        assert mixed.batch(number)[0] == forward[number][0]
        assert np.array_equal(mixed.batch(number)[1], forward[number][1])
    other = order("abc", parts, seed=8)
    assert any(not np.array_equal(other.batch(number)[1], forward[number][1]) for number in range(100))


# ---- known and new pictures -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.1, 0.5, 0.75])
def test_new_pictures_get_their_share_of_the_batches_and_the_others_are_all_repeated(share: float) -> None:
    """Whatever the number of either: here 2 new ones of 11 in one data set, none in another, 7 of 7 in a third."""
    sizes = {Group("a"): 9, Group("a", True): 2, Group("b"): 3, Group("c", True): 7}
    starts = dict(zip(sizes, np.cumsum([0, *sizes.values()]), strict=False))
    places = {group: {(64, 64): np.arange(starts[group], starts[group] + count)} for group, count in sizes.items()}
    known = cast(TrainingRows, SimpleNamespace(places=places))
    mixed = MixedOrder(known, {"c": Share(2.0)}, OrderSettings(1, 1, 400, 7, True, share))
    of_rows = {int(row): group for group, own in places.items() for row in own[64, 64]}
    seen = [int(mixed.batch(number)[1][0]) for number in range(400)]
    for total in (40, 100, 400):
        assert abs(sum(of_rows[row].is_new for row in seen[:total]) - share * total) <= 1
    assert set(seen) == set(of_rows), "all of both"
    counts = Counter(of_rows[row] for row in seen)
    assert counts[Group("a")] / counts[Group("b")] == pytest.approx(3, rel=0.1)
    assert counts[Group("c", True)] / counts[Group("a", True)] == pytest.approx(7, rel=0.1), "2 to 2 x 7"
    fewer = cast(TrainingRows, SimpleNamespace(places={group: places[group] for group in (Group("a"), Group("b"))}))
    plain, same = (MixedOrder(fewer, {}, OrderSettings(2, 1, 400, 7, True, new)) for new in (None, share))
    for number in range(50):
        assert np.array_equal(plain.batch(number)[1], same.batch(number)[1]), "without new ones there is no share"


# ---- from the data file to the trainer --------------------------------------------------------------------------------


def test_the_data_file_s_sets_reach_the_trainer_apart(world: DataWorld) -> None:
    rng = np.random.default_rng(0)
    entries = []
    for name, count, keys in (("one", 5, {"probability": 2.0}), ("two", 4, {"start_step": 3, "end_step": 9})):
        folder = world.folder / name
        folder.mkdir()
        for number in range(count):
            picture = rng.integers(0, 256, (70, 70 + 40 * (number % 2), 3), dtype=np.uint8)
            Image.fromarray(picture).save(folder / f"{number}.png")
        common = {"instance_data_dir": str(folder), "caption_strategy": "filename", "crop_aspect": "preserve"}
        entries.append({"id": name, **common, **keys})
    run = world.load(*entries, stages=(1,), stage1={"model_flavour": "tiny-i", "max_train_steps": 20})
    pixels = world.pixels(run, world.index(run), 1)
    trained = TrainingRows(pixels, frozenset())
    found = {group.label: {size: len(own) for size, own in sizes.items()} for group, sizes in trained.places.items()}
    assert found == {
        "one": {(64, 64): 3, (104, 64): 2}, "two": {(64, 64): 2, (104, 64): 2},
    }  # fmt: skip
    ids = pa.array(sorted(set(read_row_list(pixels.path)["image_id"].to_pylist())), pa.string())
    known = TrainingRows(pixels, frozenset(), known=ids[2:]).places
    assert sum(len(own) for group, sizes in known.items() for own in sizes.values() if group.is_new) == 2
    assert {group.dataset for group in known} == {"one", "two"} and sum(map(len, trained.places.values())) == 4
    parts = shares(run, 1)
    assert parts == {"one": Share(2.0, 0, None), "two": Share(1.0, 3, 9)}
    mixed = MixedOrder(trained, parts, OrderSettings(2, 1, 20, 1, True))
    owners = read_row_list(pixels.path)["dataset_id"].to_pylist()
    for number in range(20):
        size, chosen = mixed.batch(number)
        batch = trained.take(size, chosen)
        assert batch.pixels.shape[1:] == (size[1], size[0], 3)
        names = {owners[row] for row in batch.rows}
        assert len(names) == 1
        assert 3 <= number < 9 or names == {"one"}

    write_sealed(run.workspace / MANIFEST, sealed_manifest())
    inputs = TrainingInputs(pixels=pixels, text=Artifact("text_embeds", "any", run.workspace), eval_set=SOME_EVAL_SET)

    def fingerprint(**keys: Any) -> str:
        changed = world.load(*[{**entry, **keys, "start_step": 0} for entry in entries], stages=(1,))
        return lora_request(changed, 1, Path(FLAVOURS["tiny-i"].repo), inputs).fingerprint

    assert fingerprint(probability=1.0) != fingerprint(probability=1.5), "what changes the order changes the LoRA"
