"""The last step of the index: finds duplicates, and leaves out accepted pictures as the data file asks.

Both need all pictures at once, so they run after every picture was judged: from the ledger's parts to the ledger.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from deepfloyd_core.config.run import Run
from deepfloyd_core.config.stages import STAGES
from deepfloyd_core.files import atomic_path
from deepfloyd_core.index.ledger import (
    BEYOND,
    DUPLICATE,
    INDEX_FILE,
    LOOK_BYTES,
    LOOKS_FILE,
    SCHEMA,
    count_captions,
    schema,
)
from deepfloyd_core.index.summary import CaptionCounts
from deepfloyd_core.index.twins import Member, group_alike
from deepfloyd_core.pictures.draws import hash_units, image_keys

_WHY = (DUPLICATE, BEYOND)


def finish_ledger(run: Run, parts: list[Path], rows: int, out: Path) -> tuple[list[list[Member]], CaptionCounts]:
    """Write the looks and the ledger. Returns the groups of twins, each in its order, and counts of captions.

    parts: the judged rows (PART), in order; rows: in all of them.
    """
    looks = _write_looks(parts, rows, out / LOOKS_FILE)
    groups = _groups(parts, looks)
    names = pa.array([members[0].image_id for members in groups], pa.string())
    details: list[str] = []
    # Places in `names`, _WHY and `details`, -1 where there is nothing: 9 bytes a row.
    group, of, why = np.full(rows, -1, np.int32), np.full(rows, -1, np.int32), np.full(rows, -1, np.int8)
    firsts = {dataset.id for dataset in run.datasets if dataset.duplicates == "first"}
    for number, members in enumerate(groups):
        kept: dict[str, str] = {}  # of each data set the first
        for member in members:
            group[member.row] = number
            if kept.setdefault(member.dataset_id, member.source) != member.source and member.dataset_id in firsts:
                why[member.row], of[member.row] = 0, len(details)
                details.append(f"shows the same as {kept[member.dataset_id]}")
    for dataset in run.datasets:
        if dataset.max_num_samples is not None:
            why[_beyond(parts, dataset.id, dataset.max_num_samples, run.config.seed, why >= 0)] = 1
    columns = ((names, group), (pa.array(_WHY), why), (pa.array(details, pa.string()), of))
    captions: CaptionCounts = {}
    start = 0
    with atomic_path(out / INDEX_FILE) as tmp, pq.ParquetWriter(tmp, schema(run.config.paired)) as writer:
        for part in parts:
            judged = pq.read_table(part).drop_columns("look")
            own = slice(start, start + len(judged))
            finished = _finished(judged, *(texts.take(_places(place[own])) for texts, place in columns))
            count_captions(finished, captions)
            writer.write_table(finished.select(schema(run.config.paired).names))
            start += len(judged)
    return groups, captions


def sample_order(keys: np.ndarray, seed: int) -> np.ndarray:
    """The places of pictures, in the order in which a few of them are sampled: by a hash of their `image_keys`, so that
    the order stays the same when pictures are added.
    """
    return np.argsort(hash_units("sample", seed, keys, np.zeros(len(keys), np.int64)), kind="stable")


def read_looks(path: Path) -> np.ndarray:
    """uint8 (rows, LOOK_BYTES), mapped."""
    return np.asarray(np.lib.format.open_memmap(path, "r"))


def _write_looks(parts: list[Path], rows: int, path: Path) -> np.ndarray:
    """The look of each row, zeros where there is none: uint8 (rows, LOOK_BYTES), mapped."""
    header = {"descr": "|u1", "fortran_order": False, "shape": (rows, LOOK_BYTES)}
    with atomic_path(path) as tmp, tmp.open("wb") as file:  # a mapping that is written on a full disk kills the process
        np.lib.format.write_array_header_1_0(file, header)
        for part in parts:
            column = pq.read_table(part, columns=["look"])["look"]
            looks = np.zeros((len(column), LOOK_BYTES), np.uint8)
            own = np.flatnonzero(pc.is_valid(column).to_numpy())
            looks[own] = np.frombuffer(b"".join(column.drop_null().to_pylist()), np.uint8).reshape(-1, LOOK_BYTES)
            file.write(looks.data)
    return read_looks(path)


def _groups(parts: list[Path], looks: np.ndarray) -> list[list[Member]]:
    """The groups of two and more accepted pictures, each in its order, by the name of their first picture."""
    keys, places, start = [], [], 0
    for part in parts:
        rows = pq.read_table(part, columns=["status", "image_id"])
        own = np.flatnonzero(pc.equal(rows["status"], "accepted").to_numpy())
        keys.append(image_keys(rows["image_id"].take(own)))
        places.append(start + own)
        start += len(rows)
    accepted = np.concatenate(places)
    first = group_alike(np.concatenate(keys), looks, accepted)
    size = np.bincount(first, minlength=len(first))
    twins = np.flatnonzero(size[first] > 1)
    groups: dict[int, list[Member]] = {}
    for member in _members(parts, accepted[twins], first[twins]):
        groups.setdefault(member.group, []).append(member)
    ordered = [sorted(members, key=lambda member: member.order) for members in groups.values()]
    return sorted(ordered, key=lambda members: members[0].order[1:])


def _members(parts: list[Path], rows: np.ndarray, groups: np.ndarray) -> Iterable[Member]:
    reasons = [f"stage{stage}_reason" for stage in STAGES]  # also of one that is not in the run: it may come
    columns = ["dataset_id", "source", "image_id", *reasons]
    start = done = 0
    for part in parts:
        end = start + pq.read_metadata(part).num_rows
        stop = int(np.searchsorted(rows, end))
        if stop > done:
            own = pq.read_table(part, columns=columns).take(rows[done:stop] - start).to_pylist()
            for row, group, found in zip(rows[done:stop].tolist(), groups[done:stop].tolist(), own, strict=True):
                fed = sum(found[reason] is None for reason in reasons)
                yield Member(row, group, fed, found["dataset_id"], found["source"], found["image_id"])
        start, done = end, stop


def _beyond(parts: list[Path], dataset_id: str, limit: int, seed: int, out: np.ndarray) -> np.ndarray:
    """The rows of accepted pictures of a data set beyond its limit, not counting those that are `out` already."""
    keys, places, start = [], [], 0
    for part in parts:
        rows = pq.read_table(part, columns=["dataset_id", "status", "image_id"])
        own = pc.and_(pc.equal(rows["dataset_id"], dataset_id), pc.equal(rows["status"], "accepted")).to_numpy()
        chosen = np.flatnonzero(own & ~out[start : start + len(rows)])
        keys.append(image_keys(rows["image_id"].take(chosen)))
        places.append(start + chosen)
        start += len(rows)
    return np.asarray(np.concatenate(places)[sample_order(np.concatenate(keys), seed)[limit:]])


def _places(numbers: np.ndarray) -> pa.Array:
    """Numbers, null where they are negative."""
    return pa.array(numbers, mask=numbers < 0)


def _finished(rows: pa.Table, group: pa.Array, reasons: pa.Array, details: pa.Array) -> pa.Table:
    """Rows of the ledger, from their groups and the reasons why some are left out."""
    out = pc.is_valid(reasons)
    for name, value in (("status", "rejected"), ("reason", reasons), ("detail", details)):
        place = rows.schema.get_field_index(name)
        rows = rows.set_column(place, SCHEMA.field(name), pc.if_else(out, value, rows[name]))
    return rows.append_column(SCHEMA.field("group"), group)
