"""The held-out pictures of a stage, read for measuring, each with its conditioning picture if it has a pair."""

from dataclasses import dataclass

import numpy as np

from deepfloyd_core.config.stages import Stage
from deepfloyd_core.crops.rows import check_pairs_of, read_row_list, shard_files
from deepfloyd_core.crops.shards import ShardRow, open_shard, read_rows
from deepfloyd_core.store.artifacts import Artifact


@dataclass(frozen=True)
class EvalPicture:
    """A held-out picture."""

    row: ShardRow
    pixels: np.ndarray  # uint8 (H, W, 3)
    pair: np.ndarray | None  # the same: its pair, for a paired ControlNet


def eval_pictures(eval_set: Artifact, stage: Stage, pairs: Artifact | None = None) -> list[EvalPicture]:
    """All held-out pictures of a stage, in the order of their files. pairs: those of Stage I. Raises ValueError when
    the pairs belong to other pictures.
    """
    follow = {} if pairs is None else _pairs(eval_set, pairs)
    found = []
    for file in shard_files(eval_set, stage):
        for place, (pixels, row) in enumerate(zip(open_shard(file), read_rows(file), strict=True)):
            found.append(EvalPicture(row, pixels.copy(), None if pairs is None else follow[file.name, place]))
    return found


def _pairs(eval_set: Artifact, pairs: Artifact) -> dict[tuple[str, int], np.ndarray]:
    """The pair of the row at each place of each file of the eval set."""
    check_pairs_of(eval_set, pairs)
    files, shards = shard_files(eval_set), [open_shard(file) for file in shard_files(pairs)]
    rows, own = (read_row_list(artifact.path).select(["file", "place"]).to_pylist() for artifact in (eval_set, pairs))
    return {
        (files[row["file"]].name, row["place"]): shards[pair["file"]][pair["place"]].copy()
        for row, pair in zip(rows, own, strict=False)  # those of Stage II come after those of Stage I
    }
