"""The list of live rows of a pixel artifact: which rows of its shards are used, in the plan's order, and where each lies.

A shard may also hold rows of removed pictures. Code that reads pixels follows this list, never the files alone.
"""

from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pyarrow as pa

from deepfloyd_core.arrow import mapped_table
from deepfloyd_core.config.stages import Stage
from deepfloyd_core.crops.plan import SizePlan
from deepfloyd_core.crops.shards import PIXELS_SUM, open_shard, read_pixel_sums
from deepfloyd_core.files import atomic_path
from deepfloyd_core.hashing import caption_id
from deepfloyd_core.pictures.draws import image_keys
from deepfloyd_core.store.artifacts import Artifact

ROWS_FILE = "rows.arrow"
ROWS = pa.schema([("file", pa.int32()), ("place", pa.int32()), ("width", pa.int32()), ("height", pa.int32()),
                  ("key", pa.uint64()), ("image_id", pa.string()), ("dataset_id", pa.string()),
                  ("caption_id", pa.string()), ("times", pa.int32()), ("start", pa.int64()),
                  (PIXELS_SUM, pa.uint64())])  # fmt: skip
HELD_OUT_FILE, HELD_OUT = "held_out.arrow", pa.schema([("image_id", pa.string())])
_LIKE_ITS_PAIR = ["width", "height", "dataset_id", "caption_id", "times"]


def write_row_list(
    plans: Sequence[SizePlan], places: Sequence[tuple[np.ndarray, np.ndarray]], files: Sequence[Path], path: Path
) -> int:
    """Write the rows of every plan, each with the number of its file and its row there. Returns the number of pictures.

    times: how many passes of an epoch show the row; files: all shards. `start` is where a row's pixels lie in its shard.
    """
    seen, (starts, sums, first) = [], pixels_of(files)
    with atomic_path(path) as tmp, pa.ipc.new_file(tmp, ROWS) as writer:
        for plan, (file, place) in zip(plans, places, strict=True):
            start = 0
            for batch in plan.table().to_batches():
                part = slice(start, start + len(batch))
                captions = batch["caption"].dictionary_encode()
                ids = pa.array([caption_id(text) for text in captions.dictionary.to_pylist()]).take(captions.indices)
                same = [batch[name] for name in ("width", "height", "key", "image_id", "dataset_id")]
                own = first[file[part]] + place[part]
                where = [pa.array(file[part]), pa.array(place[part])]
                pixels = [pa.array(starts[own]), pa.array(sums[own])]
                columns = [*where, *same, ids, batch["times"], *pixels]
                writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=ROWS))
                seen.append(np.unique(image_keys(batch["image_id"])))
                start += len(batch)
    return len(np.unique(np.concatenate(seen))) if seen else 0


def pixels_of(files: Sequence[Path]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where the pixels of all rows of shards start in their files, int64, and their checksums, uint64, file after file; and
    the number of each file's first row there.
    """
    shards = [open_shard(file) for file in files]
    starts = [shard.starts(np.arange(len(shard))) for shard in shards]
    sums = [read_pixel_sums(file) for file in files]
    nothing = np.empty(0, np.int64)
    first = np.cumsum([0, *map(len, shards)])
    return np.concatenate([*starts, nothing]), np.concatenate([*sums, nothing.astype(np.uint64)]), first


def read_row_list(pixels: Path) -> pa.Table:
    """The live rows of a pixel artifact's directory, ROWS, memory-mapped."""
    return mapped_table(pixels / ROWS_FILE)


def shard_files(pixels: Artifact, stage: Stage | None = None) -> list[Path]:
    """The Parquet files of a pixel artifact (of one stage, for the eval set), in the order of their numbers."""
    names = sorted(entry.path for entry in pixels.manifest.files)
    return [pixels.path / name for name in names if fnmatch(name, f"stage{stage or '*'}-*.parquet")]


def check_pairs_of(pictures: Artifact, pairs: Artifact) -> None:
    """Raises ValueError unless the rows of `pairs` can be those of Stage I in `pictures`, which come first: one for each."""
    rows, own = (read_row_list(artifact.path) for artifact in (pictures, pairs))
    first = set(shard_files(pictures, 1))
    numbers = [number for number, file in enumerate(shard_files(pictures)) if file in first]
    rows = rows.slice(0, int(np.isin(rows["file"].to_numpy(), numbers).sum()))
    if not own.select(_LIKE_ITS_PAIR).equals(rows.select(_LIKE_ITS_PAIR)):
        raise ValueError(f"the rows of {pairs.path} are not those of {pictures.path}")


def write_moved_row_list(rows: pa.Table, changed: dict[str, np.ndarray], path: Path) -> None:
    """Write a list of rows that lie elsewhere, in the same order. changed: the columns that differ."""
    columns = [pa.array(changed[name], ROWS.field(name).type) if name in changed else rows[name] for name in ROWS.names]
    with atomic_path(path) as tmp, pa.ipc.new_file(tmp, ROWS) as writer:
        writer.write_table(pa.table(columns, schema=ROWS))


def check_remakes_of(pixels: Artifact, remakes: Artifact) -> None:
    """Raises ValueError unless the rows of `remakes` are those of `pixels`, one for each."""
    rows, own = (read_row_list(artifact.path) for artifact in (pixels, remakes))
    if not own["key"].equals(rows["key"]):
        raise ValueError(f"the rows of {remakes.path} are not those of {pixels.path}")


def held_out_ids(eval_set: Artifact) -> frozenset[str]:
    """The pictures that are not trained on: those of an eval set, and their duplicates."""
    return frozenset(mapped_table(eval_set.path / HELD_OUT_FILE)["image_id"].to_pylist())


def eval_ids(eval_set: Artifact) -> frozenset[str]:
    """The pictures of an eval set."""
    return frozenset(read_row_list(eval_set.path)["image_id"].to_pylist())
