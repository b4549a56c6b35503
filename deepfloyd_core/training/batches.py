"""Batch order and random draws of a training run, as pure functions of (seed, step).

An epoch visits every crop of a data set once: the rows of each size are shuffled and cut into batches (the last one may
be short), then the batches are shuffled. Several data sets take turns, one batch each; every data set has epochs of its
own. In a warm training so do the known and the new pictures of a data set. No state is kept between steps. So a run can
resume at any step from the number alone. Any number of workers may each fetch some batches, and ranks share them
(`turns`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from threading import Lock
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from deepfloyd_core.config.stages import UPSCALE
from deepfloyd_core.crops.plan import by_size
from deepfloyd_core.crops.reader import Size, crops_of
from deepfloyd_core.crops.rows import check_pairs_of, check_remakes_of, read_row_list
from deepfloyd_core.crops.summary import CropsSummary
from deepfloyd_core.diffusion.degradations import Degradation
from deepfloyd_core.errors import DataError
from deepfloyd_core.hashing import hash_seed
from deepfloyd_core.store.artifacts import Artifact
from deepfloyd_core.training.jobs import Bucket
from deepfloyd_core.training.mixing import Mix, Share, first_gap, with_new_share

_EPOCH_LOCK = Lock()


@dataclass(frozen=True)
class Batch:
    """Crops of one size, with their captions, rows, pairs and remakes."""

    pixels: torch.Tensor  # uint8 (B, H, W, C)
    caption_ids: list[str]
    rows: np.ndarray  # int64 (B,): their places in the artifact's list of rows
    pairs: torch.Tensor | None = None  # uint8 (B, H, W, C): their pairs, for a paired ControlNet
    remakes: torch.Tensor | None = None  # uint8 (B, H/4, W/4, C): Stage I's remakes of their low-res pictures


class Group(NamedTuple):
    """Rows that take turns with others: those of a data set, or its pictures that are new in a warm training."""

    dataset: str
    is_new: bool = False

    @property
    def label(self) -> str:
        """Its name, which also decides its draws."""
        return f"{self.dataset}, new" if self.is_new else self.dataset


class TrainingRows:
    """The crops of a pixel artifact that may be trained on, grouped by size.

    Pixels and the pictures' names stay on disk, mapped; the place and caption of each crop take 24 bytes a row. Raises
    ValueError or IndexError when a shard does not match the list of rows, or the pairs or remakes do not belong to
    these rows.
    """

    def __init__(
        self, pixels: Artifact, held_out: frozenset[str], pairs: Artifact | None = None,
        remakes: Artifact | None = None, known: pa.Array | None = None,
    ) -> None:  # fmt: skip
        """pairs: the conditioning of each row; remakes: its low-res picture as Stage I made it; known: the pictures that the
        weights to start from were trained on, None: there is no difference.
        """
        if pairs is not None:
            check_pairs_of(pixels, pairs)
        if remakes is not None:
            check_remakes_of(pixels, remakes)
        rows = read_row_list(pixels.path)
        out = pc.is_in(rows["image_id"], pa.array(sorted(held_out), pa.string())).to_numpy()
        places = {size: np.flatnonzero(own & ~out) for size, own in by_size(rows)}
        # Places in the list of rows, each as often as an epoch shows it.
        times = rows["times"].to_numpy()
        self._own = {size: np.repeat(own, times[own]) for size, own in places.items() if len(own)}
        if not self._own:
            raise DataError("Every picture of the run is held out for evaluation; lower num_eval_images.")
        held = set(rows["image_id"].filter(pa.array(out)).to_pylist())
        self.pictures = pixels.summary(CropsSummary).pictures - len(held)  # training pictures, each once
        self._ids, self._datasets = rows["image_id"], rows["dataset_id"]
        self._new = np.zeros(len(rows), bool) if known is None else ~pc.is_in(rows["image_id"], known).to_numpy()
        # Looking a text up in an Arrow column takes 0.9 us, as long as copying 12 KiB of pixels; here 0.1 us.
        captions = rows["caption_id"].dictionary_encode().combine_chunks()
        self._captions, self._caption = captions.dictionary.to_pylist(), captions.indices.to_numpy()
        self._pixels = crops_of(pixels)
        self._pairs, self._remakes = (None if more is None else crops_of(more) for more in (pairs, remakes))

    @property
    def counts(self) -> dict[Size, int]:
        """How many rows of each size an epoch shows."""
        return {size: len(own) for size, own in self._own.items()}

    @property
    def places(self) -> dict[Group, dict[Size, np.ndarray]]:
        """For each group the numbers of its rows among the rows of each size."""
        found: dict[Group, dict[Size, np.ndarray]] = {}
        for name in sorted(pc.unique(self._datasets).to_pylist()):
            of_set = pc.equal(self._datasets, name).to_numpy()
            for is_new in (False, True):
                of_group = of_set & (self._new == is_new)
                own = {size: np.flatnonzero(of_group[rows]) for size, rows in self._own.items()}
                found[Group(name, is_new)] = {size: numbers for size, numbers in own.items() if len(numbers)}
        return {group: sizes for group, sizes in found.items() if sizes}

    def take(self, size: Size, numbers: np.ndarray) -> Batch:
        """The crops of the given numbers among those of a size."""
        rows, captions = self._own[size][numbers], self._captions
        names = [captions[number] for number in self._caption[rows].tolist()]
        pairs = None if self._pairs is None else self._pairs.take(size, rows)
        small = (size[0] // UPSCALE, size[1] // UPSCALE)
        remakes = None if self._remakes is None else self._remakes.take(small, rows)
        return Batch(self._pixels.take(size, rows), names, rows, pairs, remakes)

    def image_ids(self, batch: Batch) -> list[str]:
        """The pictures that a batch shows; 1 us each."""
        return [self._ids[row].as_py() for row in batch.rows.tolist()]


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
    """The settings of a batch order, apart from its data sets."""

    batch_size: int
    passes_per_step: int
    steps: int
    seed: int
    by_size: bool  # a data set's share grows with its number of pictures
    new_share: float | None = None  # of the batches with new pictures, in a warm training


class MixedOrder:
    """Which rows make batch number n when the groups take turns.

    The first group shuffles with the run's seed itself, so the order of a single data set does not depend on its
    name.
    """

    def __init__(self, rows: TrainingRows, shares: Mapping[str, Share], orders: OrderSettings) -> None:
        self._places = list(rows.places.items())
        self.orders: list[BatchOrder] = []  # of each group alone, as `buckets` tells of them
        weighted = []
        for number, (group, sizes) in enumerate(self._places):
            counts = tuple((size, len(own)) for size, own in sizes.items())
            seed = hash_seed(orders.seed, group.label) if number else orders.seed
            order = BatchOrder(counts, orders.batch_size, seed)
            share = shares.get(group.dataset, Share(1.0))
            size = order.batches_per_epoch if orders.by_size else 1
            weighted.append(replace(share, weight=share.weight * size))
            self.orders.append(order)
        if orders.new_share is not None:
            weighted = with_new_share(weighted, [group.is_new for group, _ in self._places], orders.new_share)
        self._mix = Mix(tuple(weighted), orders.passes_per_step)
        gap = first_gap(self._mix.shares, orders.steps)
        if gap is not None:
            raise DataError(f"No data set with pictures for this stage is active in step {gap + 1}; see start_step.")

    def buckets(self) -> list[Bucket]:
        """The batches of each group in one of its epochs."""
        found = []
        for (group, _), order in zip(self._places, self.orders, strict=True):
            for (width, height), crops in order.counts:
                batches = -(-crops // order.batch_size)
                last = crops - (batches - 1) * order.batch_size
                size = f"{width}x{height}"
                found.append(
                    Bucket(dataset=group.label, size=size, crops=crops, batches=batches, crops_of_last_batch=last)
                )
        return found

    def batch(self, number: int) -> tuple[Size, np.ndarray]:
        """Size and row numbers of batch `number` (0, 1, ...) of the run."""
        place, before = self._mix.pick(number)
        size, chosen = self.orders[place].batch(before)
        return size, self._places[place][1][size][chosen]


def _epoch(order: BatchOrder, epoch: int) -> tuple[list[np.ndarray], np.ndarray]:
    with _EPOCH_LOCK:  # lru_cache would let each thread that asks at once make its own
        return _shuffled(order, epoch)


@lru_cache(maxsize=8)  # an epoch of each group that takes turns; 8 bytes a row and a batch
def _shuffled(order: BatchOrder, epoch: int) -> tuple[list[np.ndarray], np.ndarray]:
    """The shuffled rows of each size, and the order of the batches cut from them; batches are numbered size after size."""
    rng = np.random.default_rng(hash_seed("batches", order.seed, epoch))
    rows = [rng.permutation(count) for _, count in order.counts]
    return rows, rng.permutation(order.batches_per_epoch)


@dataclass(frozen=True)
class Rollout:
    """Scheduled sampling: the noisier timestep from which the model's own estimate is taken, see `forward.roll_out`."""

    t: torch.Tensor  # int64 (B,), at least that of the draws, at most 999
    noise: torch.Tensor  # float32 (B, C, H, W), standard normal: the noise of x_t there
    taken: torch.Tensor  # bool (B,): where False, x_t is made from the picture as usual


@dataclass(frozen=True)
class Draws:
    """The random numbers of one forward pass. Noise levels are also drawn for Stage I, which does not use them."""

    noise: torch.Tensor  # (B, C, H, W) float32, standard normal
    low_res_noise: torch.Tensor  # the same shape, independent of it
    t: torch.Tensor  # int64 (B,), 0 to 999
    level: torch.Tensor  # int64 (B,), 0 to 999
    keep_caption: torch.Tensor  # bool (B,)
    mirror: torch.Tensor  # bool (B,), half of them true; used only with random_flip
    fed_noise: torch.Tensor | None = None  # the noise in x_t, if it differs from `noise`, the target
    remade: torch.Tensor | None = None  # bool (B,): whether the low-res picture is Stage I's remake; None: none is
    degradation: Degradation | None = None  # of Stage II's low-res pictures
    rollout: Rollout | None = None
    windows: tuple[tuple[slice, slice], ...] = ()  # rows and columns of each sample that are trained on; (): all

    @property
    def fed(self) -> torch.Tensor:
        """The noise in x_t."""
        return self.noise if self.fed_noise is None else self.fed_noise

    def cut(self, pictures: torch.Tensor) -> torch.Tensor:
        """The trained windows of pictures (B, C, H, W), as (B, C, h, w); without windows the pictures themselves."""
        if not self.windows:
            return pictures
        pairs = zip(pictures, self.windows, strict=True)
        return torch.stack([picture[:, rows, columns] for picture, (rows, columns) in pairs])

    def put(self, parts: torch.Tensor, pictures: torch.Tensor) -> torch.Tensor:
        """Copies of pictures with parts, as `cut` gives them, in their windows; without windows the parts."""
        if not self.windows:
            return parts
        whole = pictures.clone()
        for picture, part, (rows, columns) in zip(whole, parts, self.windows, strict=True):
            picture[:, rows, columns] = part
        return whole


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
