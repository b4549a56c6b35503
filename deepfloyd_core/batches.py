"""Batch order and random draws of a training run, as pure functions of (seed, step).

An epoch visits every crop of a data set once: each size's rows are shuffled and cut into batches (the last one may be
short), then the batches are shuffled. Several data sets take turns, a batch each; every one goes through epochs of its
own. Nothing is remembered between steps, so a run resumes at any step by its number alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from deepfloyd_core.artifacts import Artifact
from deepfloyd_core.errors import DataError
from deepfloyd_core.mixing import Mix, Share, first_gap
from deepfloyd_core.pixels import read_row_list, shard_files
from deepfloyd_core.shards import ShardPixels, open_shard
from deepfloyd_core.types import hash_seed

Size = tuple[int, int]


@dataclass(frozen=True)
class TrainingRow:
    """What training must know of a crop beside its pixels."""

    image_id: str
    dataset_id: str
    caption_id: str


class TrainingRows:
    """The crops of a pixel artifact that may be trained on, grouped by size; pixels and names stay on disk, mapped."""

    def __init__(self, pixels: Artifact, held_out: frozenset[str]) -> None:
        rows = read_row_list(pixels.path)
        out = pc.is_in(rows["image_id"], pa.array(sorted(held_out), pa.string())).to_numpy()
        codes = rows["width"].to_numpy().astype(np.int64) << 32 | rows["height"].to_numpy()
        self._own: dict[Size, np.ndarray] = {}  # places in the list of rows, of each size
        for code in np.unique(codes[~out]):
            self._own[int(code >> 32), int(code & 0xFFFFFFFF)] = np.flatnonzero((codes == code) & ~out)
        if not self._own:
            raise DataError("Every picture of the run is held out for evaluation; lower num_eval_images.")
        self._ids, self._datasets = rows.select(["image_id", "dataset_id", "caption_id"]), rows["dataset_id"]
        self._file, self._place = rows["file"].to_numpy(), rows["place"].to_numpy()
        self._paths = shard_files(pixels)
        self._shards: dict[int, ShardPixels] = {}

    @property
    def counts(self) -> dict[Size, int]:
        """Rows of each size."""
        return {size: len(own) for size, own in self._own.items()}

    @property
    def places(self) -> dict[str, dict[Size, np.ndarray]]:
        """Of each data set, the numbers of its rows among those of each size."""
        found: dict[str, dict[Size, np.ndarray]] = {}
        for name in sorted(pc.unique(self._datasets).to_pylist()):
            of_set = pc.equal(self._datasets, name).to_numpy()
            own = {size: np.flatnonzero(of_set[rows]) for size, rows in self._own.items()}
            found[name] = {size: numbers for size, numbers in own.items() if len(numbers)}
        return {name: sizes for name, sizes in found.items() if sizes}

    def take(self, size: Size, numbers: np.ndarray) -> tuple[torch.Tensor, list[TrainingRow]]:
        """Pixels uint8 (B, H, W, C) and rows of the given numbers."""
        rows = self._own[size][numbers]
        pixels = np.stack([self._shard(self._file[row])[self._place[row]] for row in rows])
        ids = [TrainingRow(*(column[int(row)].as_py() for column in self._ids.columns)) for row in rows]
        return torch.from_numpy(pixels), ids

    def _shard(self, number: int) -> ShardPixels:
        if number not in self._shards:
            self._shards[number] = open_shard(self._paths[number])
        return self._shards[number]


@dataclass(frozen=True)
class BatchOrder:
    """Which rows make batch number n."""

    counts: tuple[tuple[Size, int], ...]
    batch_size: int
    seed: int

    @property
    def batches_per_epoch(self) -> int:
        """Batches that visit every row once."""
        return sum(-(-count // self.batch_size) for _, count in self.counts)

    def batch(self, number: int) -> tuple[Size, np.ndarray]:
        """Size and row numbers of batch `number` (0, 1, ...) of the run."""
        epoch, turn = divmod(number, self.batches_per_epoch)
        rows, order = _epoch(self, epoch)
        place = int(order[turn])
        for (size, _), own in zip(self.counts, rows, strict=True):
            batches = -(-len(own) // self.batch_size)
            if place < batches:
                return size, own[place * self.batch_size : (place + 1) * self.batch_size]
            place -= batches
        raise AssertionError("an epoch's order holds numbers of its batches only")


@dataclass(frozen=True)
class OrderSettings:
    """What a batch order depends on beside its data sets."""

    batch_size: int
    passes_per_step: int
    steps: int
    seed: int
    by_size: bool  # a data set's share grows with its number of pictures


class MixedOrder:
    """Which rows make batch number n when the data sets take turns.

    The first data set shuffles with the run's seed itself, so a data set that is alone does so whatever its name.
    """

    def __init__(self, rows: TrainingRows, shares: Mapping[str, Share], orders: OrderSettings) -> None:
        self._places = list(rows.places.items())
        self._orders = []
        weighted = []
        for number, (name, sizes) in enumerate(self._places):
            counts = tuple((size, len(own)) for size, own in sizes.items())
            seed = hash_seed(orders.seed, name) if number else orders.seed
            order = BatchOrder(counts, orders.batch_size, seed)
            share = shares.get(name, Share(1.0))
            size = order.batches_per_epoch if orders.by_size else 1
            weighted.append(replace(share, weight=share.weight * size))
            self._orders.append(order)
        self._mix = Mix(tuple(weighted), orders.passes_per_step)
        gap = first_gap(self._mix.shares, orders.steps)
        if gap is not None:
            raise DataError(
                f"No data set that has pictures for this stage is drawn from in step {gap + 1}; see start_step."
            )

    def batch(self, number: int) -> tuple[Size, np.ndarray]:
        """Size and row numbers of batch `number` (0, 1, ...) of the run."""
        place, before = self._mix.pick(number)
        size, chosen = self._orders[place].batch(before)
        return size, self._places[place][1][size][chosen]


@lru_cache(maxsize=8)  # an epoch of each data set that takes turns; 8 bytes a row and a batch
def _epoch(order: BatchOrder, epoch: int) -> tuple[list[np.ndarray], np.ndarray]:
    """The rows of each size, shuffled, and the order of the batches that they are cut into, counted size after size."""
    rng = np.random.default_rng(hash_seed("batches", order.seed, epoch))
    rows = [rng.permutation(count) for _, count in order.counts]
    return rows, rng.permutation(order.batches_per_epoch)


@dataclass(frozen=True)
class Draws:
    """The random numbers of one forward pass. Levels are drawn for Stage I too and not used there."""

    noise: torch.Tensor  # (B, C, H, W) float32, standard normal
    low_res_noise: torch.Tensor  # the same shape, independent of it
    t: torch.Tensor  # int64 (B,), 0 to 999
    level: torch.Tensor  # int64 (B,), 0 to 999
    keep_caption: torch.Tensor  # bool (B,)
    mirror: torch.Tensor  # bool (B,), half of them true; used only with random_flip


def draw(shape: torch.Size, seed: int, number: int, caption_dropout: float) -> Draws:
    """Draw for forward pass `number`, on the CPU so that every device gets the same."""
    generator = torch.Generator().manual_seed(hash_seed("draws", seed, number))
    noise = torch.randn(shape, generator=generator)
    low_res_noise = torch.randn(shape, generator=generator)
    t = torch.randint(0, 1000, shape[:1], generator=generator)
    level = torch.randint(0, 1000, shape[:1], generator=generator)
    keep = torch.rand(shape[:1], generator=generator) >= caption_dropout
    mirror = torch.rand(shape[:1], generator=generator) < 0.5
    return Draws(noise, low_res_noise, t, level, keep, mirror)
