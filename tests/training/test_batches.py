"""Streaming: the order of samples follows from (seed, epoch) alone, for any number of workers and ranks, from any sample on.

The other computation is a plain list: of the rows a run sees one after the other, or of what pyarrow itself reads.
"""

import resource
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count, islice
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import psutil
import pytest
from artifact_rows import shown_rows
from data_world import DataWorld
from hypothesis import given, settings
from hypothesis import strategies as st

from deepfloyd_core.crops.reader import Size
from deepfloyd_core.crops.shards import ShardRow, open_shard, write_shard
from deepfloyd_core.training.batches import BatchOrder, Group, MixedOrder, OrderSettings, TrainingRows
from deepfloyd_core.training.mixing import Share
from tasks import ui_pages

ours = settings(deadline=None, database=None, derandomize=True, max_examples=60)

SIZES = [(64, 64), (96, 64), (64, 96)]
COUNTS = st.lists(st.integers(1, 40), min_size=1, max_size=3).map(
    lambda counts: tuple(zip(SIZES, counts, strict=False))
)
ORDERS = st.builds(BatchOrder, COUNTS, st.integers(1, 9), st.integers(0, 2**63 - 1))


def mixed(counts: list[int], batch_size: int, seed: int) -> MixedOrder:
    """Several data sets of one size, the second of them only from step 3 to 20."""
    starts = np.cumsum([0, *counts])
    places = {Group(f"set{n}"): {SIZES[0]: starts[n] + np.arange(count)} for n, count in enumerate(counts)}
    shares = {"set1": Share(2.0, 3, 20)}
    rows = cast(TrainingRows, SimpleNamespace(places=places))
    return MixedOrder(rows, shares, OrderSettings(batch_size, 2, 30, seed, True))


MIXED = st.builds(mixed, st.lists(st.integers(1, 30), min_size=1, max_size=3), st.integers(1, 9), st.integers(0, 99))
BATCHES = 50


def flat(batches: Iterator[tuple[Size, np.ndarray]]) -> list[tuple[Size, int]]:
    return [(size, int(row)) for size, rows in batches for row in rows]


# ---- the order --------------------------------------------------------------------------------------------------------


@ours
@given(ORDERS)
def test_no_sample_comes_twice_before_all_were_seen_and_epochs_differ(order: BatchOrder) -> None:
    everything = {(size, row) for size, rows in order.counts for row in range(rows)}
    batches = map(order.batch, count())
    epochs = [flat(islice(batches, order.batches_per_epoch)) for _ in range(3)]
    for epoch in epochs:
        assert len(epoch) == len(everything) and set(epoch) == everything
    assert len(everything) < 8 or epochs[0] != epochs[1] != epochs[2] != epochs[0]


@ours
@given(st.lists(st.integers(1, 30), min_size=1, max_size=3), st.integers(1, 9))
def test_buckets_are_what_an_epoch_of_a_data_set_is_made_of(counts: list[int], batch_size: int) -> None:
    order = mixed(counts, batch_size, 1)
    for bucket, rows, of_set in zip(order.buckets(), counts, order.orders, strict=True):
        sizes = sorted(len(of_set.batch(number)[1]) for number in range(of_set.batches_per_epoch))
        assert (bucket.size, bucket.crops) == ("64x64", rows)
        assert (bucket.batches, bucket.crops_of_last_batch) == (len(sizes), sizes[0])


@pytest.mark.parametrize(("batch_size", "small"), [(4, 0), (5, 1), (41, 2)])
def test_sizes_that_cannot_fill_a_batch_are_named(
    batch_size: int, small: int, caplog: pytest.LogCaptureFixture
) -> None:
    buckets = mixed([4, 40], batch_size, 1).buckets()
    ui_pages.warn_of_small_sizes("stage1_lora", buckets, batch_size)
    named = [f"64x64 of set{number} has {count}" for number, count in ((0, 4), (1, 40))]
    assert [text in caplog.text for text in named] == [number < small for number in range(2)]
    assert (
        f"of 2 sizes {small} {'has' if small == 1 else 'have'} fewer crops than train_batch_size ({batch_size})"
        in caplog.text
    ) == (small > 0)


@pytest.mark.parametrize(
    ("counts", "batch_size", "advice"),
    [([1], 2, "Add pictures, or set train_batch_size = 1: the steps"), ([3, 2], 9, "set train_batch_size = 3: the steps"),
     ([3, 20], 9, "Fewer crop_aspect_buckets")],
)  # fmt: skip
def test_too_few_crops_are_told_another_remedy_than_too_many_sizes(
    counts: list[int], batch_size: int, advice: str, caplog: pytest.LogCaptureFixture
) -> None:
    buckets = mixed(counts, batch_size, 1).buckets()
    ui_pages.warn_of_small_sizes("stage1_lora", buckets, batch_size)
    assert advice in caplog.text


@ours
@given(ORDERS)
def test_another_seed_is_another_order(order: BatchOrder) -> None:
    other = BatchOrder(order.counts, order.batch_size, order.seed + 1)
    samples = sum(count for _, count in order.counts)
    again, first, second = (flat(map(one.batch, range(BATCHES))) for one in (order, order, other))
    assert again == first
    assert samples < 8 or first != second


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_any_number_of_workers_gets_the_crops_that_pyarrow_reads(world: DataWorld, workers: int) -> None:
    for number in range(6):
        world.add(f"{number}.png", np.random.default_rng(number).integers(0, 256, (70, 300, 3), np.uint8), f"c{number}")
    run = world.load({"crop_style": "random", "repeats": 9}, stages=(1,), shard_mib=0.1)
    pixels = world.pixels(run, world.index(run), 1)
    assert len(list(pixels.path.glob("*.parquet"))) > 4
    expected = shown_rows(pixels)
    rows = TrainingRows(pixels, frozenset())
    order = BatchOrder(tuple(rows.counts.items()), 7, 3)
    with ThreadPoolExecutor(workers) as pool:
        batches = list(pool.map(lambda number: rows.take(*order.batch(number)), range(20)))
    for number, batch in enumerate(batches):
        wanted = [expected[row] for row in order.batch(number)[1]]
        assert [picture.numpy().tobytes() for picture in batch.pixels] == [row["pixels"] for row in wanted]
        assert batch.caption_ids == [row["caption_id"] for row in wanted]
        assert rows.image_ids(batch) == [row["image_id"] for row in wanted]
        batch.pixels.add_(1)  # a batch is the trainer's own: nothing in the shards changes
    assert [len(batch.rows) for batch in batches[:9]].count(7) >= 8
    assert rows.take(*order.batch(0)).pixels.sub(batches[0].pixels).eq(255).all()


# ---- many shards ------------------------------------------------------------------------------------------------------


@contextmanager
def few_descriptors(limit: int) -> Iterator[None]:
    """At most so many open files in this process, as under `ulimit -n`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_more_shards_are_mapped_than_files_may_be_open(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
    described = [ShardRow("", "", "", 8, 8, 9, 9, 0, 0, 8, 8, n, "", "", "center") for n in range(3)]
    write_shard(tmp_path / "0.parquet", described, list(pixels))
    for number in range(1, 600):
        (tmp_path / f"{number}.parquet").hardlink_to(tmp_path / "0.parquet")
    before = psutil.Process().num_fds()
    with few_descriptors(before + 20):
        shards = [open_shard(tmp_path / f"{number}.parquet") for number in range(600)]
        assert all(np.array_equal(shard[number % 3], pixels[number % 3]) for number, shard in enumerate(shards))
        assert psutil.Process().num_fds() <= before + 2
    (tmp_path / "0.parquet").unlink()
    assert np.array_equal(shards[0].all(), pixels), "a mapped shard outlives its name"


def test_a_row_that_a_shard_does_not_have_is_refused(tmp_path: Path) -> None:
    described = [ShardRow("", "", "", 8, 8, 9, 9, 0, 0, 8, 8, n, "", "", "center") for n in range(2)]
    write_shard(tmp_path / "x.parquet", described, [np.zeros((8, 8, 3), np.uint8)] * 2)
    shard = open_shard(tmp_path / "x.parquet")
    assert len(list(shard)) == len(shard) == 2
    for place in (-1, 2):
        with pytest.raises(IndexError, match=f"rows {place} to {place} of a shard of 2"):
            shard[place]
    with pytest.raises(ValueError, match="read-only"):
        shard[0][0] = 1
