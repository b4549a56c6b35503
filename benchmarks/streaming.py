"""How fast shuffled batches of a pixel artifact reach torch, side by side with other ways to keep the same crops.

The artifact is made by the product's own stages from photographs inside scikit-image: 20,000 crops of 64 px and 2,000 of
256 px. Ours is what the trainer asks for, pixels and captions' ids; the others give pixels alone. All files are in the page
cache. Contenders take turns in one process; CPU time of all its threads, so a contender is not charged for waiting. Each
round is an epoch in another order (of the PNG files, which are slow, a part of it).
"""

import argparse
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import skimage
import torch
from PIL import Image
from worlds import one_set, prepare

from deepfloyd_core.config.stages import Stage
from deepfloyd_core.store.artifacts import Artifact
from deepfloyd_core.training.batches import MixedOrder, OrderSettings, TrainingRows

Batches = Callable[[int], Iterator[torch.Tensor]]  # number of an epoch -> its batches, uint8 (B, H, W, C)

PHOTOGRAPHS = ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg", "retina.jpg")
CROPS_OF_A_PICTURE = 100
MARGIN = 1.15  # how much larger than a crop a picture is, so that the crops differ
BATCH = {64: 64, 256: 16}
STAGES: dict[int, Stage] = {64: 1, 256: 2}
GOALS = {"PNG files": 30.0, "LitData": 2.0, "LitData, blocks": 2.0, "numpy memmap": 0.55}


def pixels_of(folder: Path, edge: int, crops: int) -> Artifact:
    """A pixel artifact, as `deepfloyd prepare` makes it."""
    stage, size = STAGES[edge], round(edge * MARGIN)
    pictures = folder / "pictures"
    pictures.mkdir()
    for number in range(crops // CROPS_OF_A_PICTURE):
        rng = np.random.default_rng(number)
        whole = np.asarray(Image.open(Path(skimage.__file__).parent / "data" / PHOTOGRAPHS[number % len(PHOTOGRAPHS)]))
        top, left = (rng.integers(0, length - size + 1) for length in whole.shape[:2])
        Image.fromarray(whole[top : top + size, left : left + size]).save(pictures / f"picture {number}.png")
    entry = {"caption_strategy": "filename", "crop_style": "random", "repeats": CROPS_OF_A_PICTURE - 1}
    return prepare(one_set(folder, stage, entry), stage)[1]


def ours(rows: TrainingRows, batch_size: int) -> Batches:
    """The trainer's own path."""
    order = MixedOrder(rows, {}, OrderSettings(batch_size, 1, 1, 1, False))
    per_epoch = sum(-(-count // batch_size) for count in rows.counts.values())

    def epoch(number: int) -> Iterator[torch.Tensor]:
        for turn in range(number * per_epoch, (number + 1) * per_epoch):
            yield rows.take(*order.batch(turn)).pixels

    return epoch


def read_first(rows: TrainingRows, batch_size: int) -> Batches:
    """`ours` where a process reads each crop for the first time, and so checks it."""
    later = ours(rows, batch_size)

    def epoch(number: int) -> Iterator[torch.Tensor]:
        for batch in later(number):
            yield batch
            rows._pixels._is_checked[:] = False

    return epoch


def memmap(crops: np.ndarray, path: Path, batch_size: int) -> Batches:
    """One file of all crops, a fancy index for each batch: the least that can be done for a shuffled batch."""
    crops.tofile(path)
    mapped = np.memmap(path, np.uint8, "r", shape=crops.shape)

    def epoch(number: int) -> Iterator[torch.Tensor]:
        order = np.random.default_rng(number).permutation(len(mapped))
        for start in range(0, len(order), batch_size):
            yield torch.from_numpy(mapped[order[start : start + batch_size]])

    return epoch


def png_files(crops: np.ndarray, folder: Path, batch_size: int) -> Batches:
    """A PNG file for each crop, decoded by Pillow."""
    folder.mkdir()
    for number, crop in enumerate(crops):
        Image.fromarray(crop).save(folder / f"{number}.png")

    def epoch(number: int) -> Iterator[torch.Tensor]:
        order = np.random.default_rng(number).permutation(len(crops)).tolist()
        for start in range(0, len(order), batch_size):
            names = order[start : start + batch_size]
            yield torch.from_numpy(np.stack([np.asarray(Image.open(folder / f"{name}.png")) for name in names]))

    return epoch


def litdata(crops: np.ndarray, folder: Path, batch_size: int, blocks: bool) -> Batches | None:
    """LitData chunks of 64 MB, as large as our shards; None where it is not installed.

    Samples are bytes, the fastest kind of those with a header, or blocks of a stream that has none.
    """
    try:
        from litdata import StreamingDataset
        from litdata.streaming.cache import Cache
        from litdata.streaming.item_loader import TokensLoader
    except ImportError:
        return None
    loader = {"item_loader": TokensLoader(block_size=crops[0].size)} if blocks else {}
    folder.mkdir()
    cache = Cache(str(folder), chunk_bytes="64MB", **loader)
    for number, crop in enumerate(crops):
        cache[number] = torch.from_numpy(crop.reshape(-1)) if blocks else crop.tobytes()
    cache.done()
    cache.merge()
    dataset = StreamingDataset(str(folder), shuffle=True, seed=1, **loader)

    def tensor(sample: Any) -> torch.Tensor:
        return sample if blocks else torch.frombuffer(bytearray(sample), dtype=torch.uint8)

    def epoch(number: int) -> Iterator[torch.Tensor]:
        dataset.set_epoch(number)
        samples = map(tensor, dataset)
        while batch := list(islice(samples, batch_size)):
            yield torch.stack(batch).reshape(-1, *crops.shape[1:])

    return epoch


def contenders(folder: Path, edge: int, crops: int) -> dict[str, Batches]:
    """All that are there, each with files of its own."""
    pixels, batch = pixels_of(folder, edge, crops), BATCH[edge]
    rows = TrainingRows(pixels, frozenset())
    everything = rows.take((edge, edge), np.arange(crops)).pixels.numpy()
    found = {
        "ours": ours(rows, batch),
        "ours, read first": read_first(TrainingRows(pixels, frozenset()), batch),
        "numpy memmap": memmap(everything, folder / "crops.bin", batch),
        "LitData": litdata(everything, folder / "litdata", batch, blocks=False),
        "LitData, blocks": litdata(everything, folder / "blocks", batch, blocks=True),
        "PNG files": png_files(everything, folder / "png", batch),
    }
    return {name: batches for name, batches in found.items() if batches}


def rates(all_batches: dict[str, Batches], rounds: int, part: int) -> np.ndarray:
    """Samples in a CPU second, (round, contender). `part`: batches of the PNG files in a round."""
    totals = {name: sum(int(batch.sum()) for batch in batches(0)) for name, batches in all_batches.items()}
    assert len(set(totals.values())) == 1, f"not the same pixels: {totals}"
    found = np.zeros((rounds, len(all_batches)))
    for turn in range(rounds):
        for which, (name, batches) in enumerate(all_batches.items()):
            start, samples = time.process_time(), 0
            for batch in islice(batches(turn + 1), part if name == "PNG files" else None):
                samples += len(batch)
            found[turn, which] = samples / (time.process_time() - start)
    return found


def main() -> None:
    """Print a table for each size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--crops", type=int, nargs=2, default=[20_000, 2_000], help="of 64 px and of 256 px")
    parser.add_argument("--rounds", type=int, default=15)
    wanted = parser.parse_args()
    torch.set_num_threads(1)
    versions = f"Python {platform.python_version()}, NumPy {np.__version__}, torch {torch.__version__}"
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; {versions}")
    for edge, crops in zip(BATCH, wanted.crops, strict=True):
        with tempfile.TemporaryDirectory() as name:
            all_batches = contenders(Path(name), edge, crops)
            found = rates(all_batches, wanted.rounds, max(1, 1024 // edge))
        if "LitData" not in all_batches:
            print("litdata is not installed and not compared: pip install -e '.[bench]'")
        print(f"\n### {edge} px, {crops} crops, batches of {BATCH[edge]}, {wanted.rounds} rounds\n")
        print("| kept as | samples/s, median | lowest | highest | ours is, times | goal |\n|---|---|---|---|---|---|")
        for which, contender in enumerate(all_batches):
            own, ratio = found[:, which], np.median(found[:, 0] / found[:, which])
            goal = f">= {GOALS[contender]}" if contender in GOALS else ""
            print(
                f"| {contender} | {np.median(own):,.0f} | {own.min():,.0f} | {own.max():,.0f} | {ratio:.2f} | {goal} |"
            )


if __name__ == "__main__":
    main()
