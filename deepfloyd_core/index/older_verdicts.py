"""Reuses verdicts of the newest index with the same settings on the same bytes, so a grown data set decodes only new
files.
"""

import logging
from dataclasses import dataclass, fields
from functools import reduce
from importlib import metadata
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from deepfloyd_core.config.data_sets import ImageDataset
from deepfloyd_core.config.keys import keys_of
from deepfloyd_core.config.run import Run
from deepfloyd_core.index.identity import FORMAT, MORE_TIME, index_spec
from deepfloyd_core.index.judge import SIZE_REASONS, Verdict
from deepfloyd_core.index.ledger import (
    AS_ASKED,
    INDEX_FILE,
    LOOK_BYTES,
    LOOKS_FILE,
    schema,
)
from deepfloyd_core.index.left_out import read_looks
from deepfloyd_core.sources.picture_bytes import HAS_HEIF
from deepfloyd_core.store.artifacts import Artifact, newest
from deepfloyd_core.store.reuse import is_as_recorded
from deepfloyd_core.types import Json

log = logging.getLogger(__name__)

# Reasons that follow from a picture's bytes and the settings alone. Other reasons are judged again: they may be gone.
_LASTING = (
    "too_small", "aspect_out_of_range", "not_for_this_stage", "unsupported", "corrupt", "truncated", "decompression_bomb",
    "conditioning_aspect",
)  # fmt: skip
# Reasons that do not depend on the picture's bytes.
_BESIDE = ("caption_missing", "conditioning_missing", "conditioning_ambiguous", *AS_ASKED)
_PICTURE = ("dataset_id", "image_id", "conditioning_id")  # what a verdict is of


@dataclass(frozen=True)
class Older:
    """The verdicts of an older index, and for each scanned file its place there, or null."""

    verdicts: pa.Table  # the columns of Verdict but the look, and `row`, the row of the older ledger
    place: pa.Array
    looks: np.ndarray | None

    def take(self, block: slice) -> list[Verdict | None]:
        """The verdicts on some of the scanned files; None for a file without one."""
        place = self.place[block]
        known: list[Verdict | None] = []
        for found, valid in zip(self.verdicts.take(place).to_pylist(), place.is_valid().to_pylist(), strict=True):
            row = found.pop("row")
            look = self.looks[row].tobytes() if valid and self.looks is not None else b""
            known.append(Verdict(**found, look=look if any(look) else None) if valid else None)
        return known


def older_verdicts(run: Run, found: pa.Table, workspace: Path) -> Older:
    """Verdicts of the newest index with the same judging settings, whatever its stages.

    No verdict is reused for a picture that no stage could use there, so that it was not decoded, and that a stage can
    use here.
    """
    older = newest(workspace, "image_index", FORMAT)
    names = [field.name for field in fields(Verdict) if field.name != "look"]
    columns = [name for name in schema(run.config.paired).names if name in (*names, *_PICTURE)]
    table, looks = schema(run.config.paired).empty_table().select(columns), None
    if older and _judging(older.spec) == _judging(index_spec(run, found)) and _same_decoder(older):
        table, looks = _read_older(older, columns) or (table, looks)
    table = table.append_column("row", pa.array(np.arange(len(table))))
    of_bytes = pc.or_(pc.is_null(table["reason"]), pc.is_in(table["reason"], pa.array([*_LASTING, *_BESIDE])))
    unseen = pc.is_in(table["reason"], pa.array(SIZE_REASONS))
    useful = [pc.is_null(table[f"stage{stage}_reason"]) for stage in run.config.stages]
    table = table.filter(pc.and_(of_bytes, pc.invert(pc.and_(unseen, reduce(pc.or_, useful)))))
    beside = pc.is_in(table["reason"], pa.array([*_BESIDE, *SIZE_REASONS]))
    verdicts = table.select([*names, "row"])
    for name in ("reason", "detail"):
        verdicts = verdicts.set_column(names.index(name), name, pc.if_else(beside, None, table[name]))
    place = pc.index_in(_bytes(found, "sha256"), _bytes(table, "image_id").combine_chunks())
    return Older(verdicts, place.combine_chunks(), looks)


def _read_older(older: Artifact, columns: list[str]) -> tuple[pa.Table, np.ndarray] | None:
    """The ledger and the looks of an index; None if they are damaged: then every picture is judged again."""
    hashes = older.hashes
    for name in (INDEX_FILE, LOOKS_FILE):
        if not is_as_recorded(older.path / name, hashes):
            log.warning("%s has other bytes than its manifest says: every picture is judged again", older.path / name)
            return None
    try:
        table, looks = pq.read_table(older.path / INDEX_FILE, columns=columns), read_looks(older.path / LOOKS_FILE)
    except (OSError, ValueError):  # pyarrow's errors are both
        return None
    return (table, looks) if looks.shape == (len(table), LOOK_BYTES) and looks.dtype == np.uint8 else None


def _bytes(table: pa.Table, image: str) -> pa.ChunkedArray:
    """The cache key of each row's verdict, apart from the settings: the sha256 of its bytes (null if unknown), and of
    its pair's.
    """
    parts = [table["dataset_id"], table[image]]
    if "conditioning_id" in table.column_names:
        parts.append(pc.fill_null(table["conditioning_id"], ""))
    return pc.binary_join_element_wise(*parts, "/")


def _same_decoder(index: Artifact) -> bool:
    packages = index.manifest.provenance.packages
    heif = ["pillow-heif"] if HAS_HEIF else []
    return all(packages.get(name) == metadata.version(name) for name in ("pillow", *heif))


def _judging(spec: Json) -> Json:
    """The part of an index's spec that decides verdicts: all but captions, limits on how many are used, and stages."""
    beside = {"seed"} | keys_of(ImageDataset, "index") - keys_of(ImageDataset, "verdict")
    datasets = {
        name: {key: value for key, value in dataset.items() if key not in beside}
        for name, dataset in spec["datasets"].items()
    }
    return {key: value for key, value in spec.items() if key not in (MORE_TIME, "stages")} | {"datasets": datasets}
