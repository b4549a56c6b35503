"""Time and memory of a synthetic index on its way to batches: `python benchmarks/plan_rows.py 1e7`, one core.

Planning and bucketing (`plan.write_plan`), cutting into shards, the list of rows, and the order of an epoch, each in a
process of its own, so that each has a peak of its own. Anonymous memory is what the process needs; mapped file pages are the
kernel's to drop and are not counted.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from worlds import one_set, peak_bytes

from deepfloyd_core.config.run import Run
from deepfloyd_core.crops.pixels import plan_shards
from deepfloyd_core.index.index import BLOCK
from deepfloyd_core.index.ledger import SCHEMA
from deepfloyd_core.store.artifacts import Artifact, WorkDir
from deepfloyd_core.training.batches import BatchOrder

CAPTIONS = 50_000  # different ones


def write_index(path: Path, rows: int) -> None:
    """A ledger of pictures of 70 to 3,600 px in the index's own layout."""
    rng = np.random.default_rng(0)
    captions = np.array([f"caption number {number} of a picture that shows something" for number in range(CAPTIONS)])
    path.mkdir(parents=True)
    with pq.ParquetWriter(path / "index.parquet", SCHEMA) as writer:
        for start in range(0, rows, BLOCK):
            count = min(BLOCK, rows - start)
            names = [f"folder_{start // 100_000:04d}/picture_{start + n:09d}.jpg" for n in range(count)]
            ids = rng.bytes(32 * count).hex()
            texts = pa.array(captions[rng.integers(0, CAPTIONS, count)])
            width = rng.integers(130, 2000, count, dtype=np.int32)
            columns = {
                "source": names,
                "dataset_id": ["pictures"] * count,
                "status": ["accepted"] * count,
                "image_id": [ids[64 * n : 64 * n + 64] for n in range(count)],
                "bytes": rng.integers(10_000, 5_000_000, count),
                "format": ["JPEG"] * count,
                "width": width,
                "height": (width * rng.uniform(0.55, 1.8, count)).astype(np.int32),
                "captions": pa.ListArray.from_arrays(pa.array(range(count + 1), pa.int32()), texts),
            }
            arrays = [columns.get(field.name, pa.nulls(count, field.type)) for field in SCHEMA]
            writer.write_table(pa.table(arrays, schema=SCHEMA))


def a_run(folder: Path) -> Run:
    """Settings with some twenty training sizes."""
    entry = {"id": "pictures", "instance_data_dir": str(folder), "caption_strategy": "filename", "crop_style": "random",
             "crop_aspect": "preserve", "minimum_aspect_ratio": 0.5, "maximum_aspect_ratio": 2.0,
             "maximum_image_size": 256, "target_downsample_size": 128}  # fmt: skip
    return one_set(folder, 1, entry, shard_mib=64)


def plan(folder: Path) -> str:
    """Plan, bucket and cut; leaves the counts for the epoch."""
    work = folder / "workspace" / "stage1_pixels" / "x"
    work.mkdir(parents=True)
    layout = plan_shards(a_run(folder), Artifact("image_index", "x", folder / "index"), 1, WorkDir(work, 0))
    counts = [[*one.size, len(file)] for one, (file, _) in zip(layout.plans, layout.places, strict=True)]
    (folder / "counts.json").write_text(json.dumps(counts))
    return f"{sum(count for _, _, count in counts)} rows, {len(counts)} sizes, {len(layout.made)} shards"


def epoch(folder: Path) -> str:
    """The order of two epochs: the first batch of each and one in the middle."""
    counts = tuple(((w, h), count) for w, h, count in json.loads((folder / "counts.json").read_text()))
    order = BatchOrder(counts, 8, 1)
    for number in (0, order.batches_per_epoch // 2, order.batches_per_epoch):
        size, rows = order.batch(number)
        assert len(rows) and size in dict(counts)
    return f"{order.batches_per_epoch} batches an epoch"


def measured(stage: Callable[[Path], str], folder: Path) -> tuple[str, float, int]:
    """What a stage says, its seconds, and its peak of anonymous memory in MiB."""
    with peak_bytes() as peak:
        started = time.perf_counter()
        said = stage(folder)
        seconds = time.perf_counter() - started
    return said, seconds, peak[0] >> 20


def main() -> None:
    """Print a line for each stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", type=float, nargs="?", default=1e6)
    rows = int(parser.parse_args().rows)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_index(folder / "index", rows)
        for stage in (plan, epoch):
            with ProcessPoolExecutor(1, get_context("spawn")) as alone:
                said, seconds, peak = alone.submit(measured, stage, folder).result()
            print(
                f"{stage.__name__:<6} {rows} pictures  {seconds:6.1f} s  peak {peak} MiB anonymous  {said}", flush=True
            )


if __name__ == "__main__":
    main()
