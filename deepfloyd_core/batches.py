"""Batch order and random draws of a training run, as pure functions of (seed, step).

An epoch visits every crop of a data set once: each size's rows are shuffled and cut into batches (the last one may be
short), then the batches are shuffled. Several data sets take turns, a batch each; every one goes through epochs of its
own. Nothing is remembered between steps, so a run resumes at any step by its number alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch

from deepfloyd_core.artifacts import Artifact
from deepfloyd_core.errors import DataError
from deepfloyd_core.mixing import Mix, Share, first_gap
from deepfloyd_core.pixels import shard_files
from deepfloyd_core.shards import ShardRow, map_pixels, read_rows
from deepfloyd_core.types import hash_seed

Size = tuple[int, int]


class TrainingRows:
    """The crops of a pixel artifact that may be trained on, grouped by size; pixels stay on disk."""

    def __init__(self, pixels: Artifact, held_out: frozenset[str]) -> None:
        self._rows: dict[Size, list[tuple[np.ndarray, int, ShardRow]]] = {}
        for file in shard_files(pixels):
            places = [(group, place) for group in map_pixels(file) for place in range(len(group))]
            for (group, place), row in zip(places, read_rows(file), strict=True):
                if row.image_id not in held_out:
                    self._rows.setdefault((row.width, row.height), []).append((group, place, row))
        if not self._rows:
            raise DataError("Every picture of the run is held out for evaluation; lower num_eval_images.")

    @property
    def counts(self) -> dict[Size, int]:
        """Rows of each size."""
        return {size: len(rows) for size, rows in sorted(self._rows.items())}

    @property
    def places(self) -> dict[str, dict[Size, np.ndarray]]:
        """Of each data set, the numbers of its rows among those of each size."""
        found: dict[str, dict[Size, list[int]]] = {}
        for size, rows in sorted(self._rows.items()):
            for number, (_, _, row) in enumerate(rows):
                found.setdefault(row.dataset_id, {}).setdefault(size, []).append(number)
        return {name: {size: np.array(own) for size, own in sizes.items()} for name, sizes in sorted(found.items())}

    def take(self, size: Size, numbers: np.ndarray) -> tuple[torch.Tensor, list[ShardRow]]:
        """Pixels uint8 (B, H, W, C) and rows of the given numbers."""
        chosen = [self._rows[size][number] for number in numbers]
        pixels = np.stack([group[place] for group, place, _ in chosen])
        return torch.from_numpy(pixels), [row for _, _, row in chosen]


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
        epoch, place = divmod(number, self.batches_per_epoch)
        return _epoch(self, epoch)[place]


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


@lru_cache(maxsize=8)  # an epoch of each data set that takes turns; 8 bytes a row
def _epoch(order: BatchOrder, epoch: int) -> list[tuple[Size, np.ndarray]]:
    rng = np.random.default_rng(hash_seed("batches", order.seed, epoch))
    batches = []
    for size, count in order.counts:
        rows = rng.permutation(count)
        batches += [(size, rows[start : start + order.batch_size]) for start in range(0, count, order.batch_size)]
    return [batches[place] for place in rng.permutation(len(batches))]


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
