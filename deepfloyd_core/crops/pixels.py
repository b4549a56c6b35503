"""Stage I and Stage II pixels and the eval set: crops of the accepted pictures in Parquet shards, a list of live rows.

A shard's name contains a hash of its rows, and a shard is never rewritten. The next version of a data set links the
shards of this version, and writes new shards for the added rows only. A removed row stays in its shard, but
`rows.arrow` no longer lists it: that file lists the live rows in the plan's order. So training sees the same rows in
the same order, however they are cut into files, in whatever order and by however many workers the files are written,
and also after a kill.
"""

import math
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from deepfloyd_core.config.data_sets import ImageDataset
from deepfloyd_core.config.run import Run
from deepfloyd_core.config.stages import Stage
from deepfloyd_core.crops.eval_choice import choose_held_out, chosen_pictures, held_out_pictures
from deepfloyd_core.crops.older_shards import OlderRows, copy_rows, left_over
from deepfloyd_core.crops.plan import Planned, SizePlan, by_dataset, plan_pictures, write_plan, write_sizes
from deepfloyd_core.crops.rows import (
    HELD_OUT,
    HELD_OUT_FILE,
    ROWS_FILE,
    eval_ids,
    read_row_list,
    shard_files,
    write_row_list,
)  # fmt: skip
from deepfloyd_core.crops.shards import ShardRow, open_shard, write_shard
from deepfloyd_core.crops.summary import CropsSummary
from deepfloyd_core.errors import DataError
from deepfloyd_core.files import atomic_path, sha256_bytes
from deepfloyd_core.hashing import caption_id
from deepfloyd_core.index.ledger import PICTURE
from deepfloyd_core.pictures.faults import Unreadable
from deepfloyd_core.pictures.resize import take_crops
from deepfloyd_core.pictures.sheets import contact_sheet, save_picture
from deepfloyd_core.sources.source import read_again
from deepfloyd_core.store.artifacts import Artifact, WorkDir, newest, workspace_of
from deepfloyd_core.store.counts import many
from deepfloyd_core.store.file_faults import need_room
from deepfloyd_core.store.locks import locked
from deepfloyd_core.store.parts import finish_part, part_is_whole, take_part

FORMAT = 6
PARTS = "stage*.parquet"
_REMEDY = "Lower decode_memory_mib, so that such pictures are rows of the ledger, or workers, and start the run again."
SHEET, SHEET_CROPS, SHEET_CELL_PX = "sheet.jpg", 32, 64


@dataclass(frozen=True)
class ShardPlan:
    """One Parquet file to make: which rows of a plan, and which of them can be copied from an older artifact."""

    name: str
    plan: SizePlan
    numbers: np.ndarray  # int64, ascending
    copies: np.ndarray  # int64: a row of the older artifact's list that has the same pixels; -1: decode the picture
    datasets: dict[str, ImageDataset]  # where the pictures of each data set are read


@dataclass(frozen=True)
class Layout:
    """How planned rows become files: the reused shards, the shards to make, and the place of each row in them."""

    plans: tuple[SizePlan, ...]
    kept: dict[str, str]  # names of the older artifact's reused shards, and their sha256
    made: tuple[ShardPlan, ...]
    places: tuple[tuple[np.ndarray, np.ndarray], ...]  # for each plan int32 (rows,): number of the file, row in it
    older: Artifact | None

    @property
    def files(self) -> list[str]:
        """The names of all shards, in the order of their numbers."""
        return sorted([*self.kept, *(shard.name for shard in self.made)])


@dataclass(frozen=True)
class ShardResult:
    """The outcome of one shard: its rows, and the pictures decoded for it (also by an interrupted run)."""

    rows: int
    decoded: int


def eval_change(before: Artifact, now: Artifact) -> tuple[int, int]:
    """How many held-out pictures were added, and how many removed, between two eval sets; none when the first is damaged."""
    new = eval_ids(now)
    try:
        old = eval_ids(before)
    except (OSError, pa.ArrowInvalid):
        return 0, 0  # its contents are unknown, and no longer needed
    return len(new - old), len(old - new)


def plan_shards(run: Run, index: Artifact, stage: Stage, work: WorkDir) -> Layout:
    """The shards of a stage: every size's rows in the plan's order, cut every `shard_mib`.

    Raises DataError when no accepted picture is large enough for the stage.
    """
    plans = write_plan(run, index, stage, work.path)
    if not plans:
        raise DataError(f"No picture is large enough for stage {stage}. The ledger is {index.path}/index.parquet.")
    older = left_over(work) or newest(work.workspace, f"stage{stage}_pixels", FORMAT)
    return with_room(lay_out(plans, _by_id(run), int(run.config.shard_mib * 2**20), older), work)


def with_room(layout: Layout, work: WorkDir) -> Layout:
    """The same layout. Raises StorageError if the disk has not enough room for the shards that are still to be made."""
    missing = [shard for shard in layout.made if not (work.path / shard.name).exists()]
    needed = sum(len(shard.numbers) * math.prod(shard.plan.size) * 3 for shard in missing)
    crops = sum(len(shard.numbers) for shard in missing)
    advice = "Make room, use another workspace, or lower repeats or random_crops in the data file"
    need_room(work.path, needed, many(crops, "crop takes", "crops take"), advice)
    return layout


def plan_eval(run: Run, index: Artifact, work: WorkDir) -> Layout:
    """One file for each stage and size with the pictures of `choose_held_out`, cropped at the centre; none may be left."""
    plans = write_eval_plan(run, index, run.config.stages, work.path)
    held_out = held_out_pictures(index, choose_held_out(run, index))
    with atomic_path(work.path / HELD_OUT_FILE) as tmp, pa.ipc.new_file(tmp, HELD_OUT) as writer:
        writer.write_table(pa.table([held_out], schema=HELD_OUT))
    return lay_out(plans, _by_id(run), 1 << 30, left_over(work))


def write_eval_plan(
    run: Run, index: Artifact, stages: tuple[Stage, ...], folder: Path, columns: tuple[str, ...] = PICTURE
) -> list[SizePlan]:
    """Plan the held-out pictures (columns PICTURE) of some stages, or their pairs (columns PAIR)."""
    chosen = chosen_pictures(run, index, columns)
    plans: list[SizePlan] = []
    for stage in stages:
        fed = [dataset.id for dataset in run.datasets if dataset.factor(stage) is not None]
        fit = chosen.filter(pc.is_in(chosen["dataset_id"], pa.array(fed, pa.string())))
        tables = (plan_pictures(run, dataset, stage, part, 1, "center") for dataset, part in by_dataset(run, fit))
        plans += write_sizes(tables, folder, f"stage{stage}")
    return plans


def in_groups(shards: tuple[ShardPlan, ...], most: int) -> list[tuple[ShardPlan, ...]]:
    """The shards in their order, in at most so many groups of (but for the last) one size."""
    size = max(1, -(-len(shards) // most))
    return [shards[start : start + size] for start in range(0, len(shards), size)]


def build_shard(shard: ShardPlan, out: Path, older: Artifact | None) -> ShardResult:
    """Make one shard, or keep it if an interrupted build finished it.

    Raises DataError when a picture has changed since the index, or does not fit into memory: the run must then be
    started again.
    """
    path, planned = out / shard.name, shard.plan.rows(shard.numbers)
    alone = partial(locked, workspace_of(out), "large_picture", quiet=True)
    by_picture: dict[tuple[str, str], list[int]] = defaultdict(list)
    for number, (row, copy) in enumerate(zip(planned, shard.copies, strict=True)):
        if copy < 0:
            by_picture[row.dataset_id, row.source].append(number)
    if not part_is_whole(path):
        pixels: list[np.ndarray] = [np.empty(0)] * len(planned)
        methods = [""] * len(planned)
        for (dataset_id, source), numbers in by_picture.items():
            data = read_again(shard.datasets[dataset_id], source, planned[numbers[0]].image_id)
            if data is None:
                name = shard.datasets[dataset_id].id
                raise DataError(f"{name}: {source} changed or went away during the run. Start the run again.")
            crops = [planned[number].crop for number in numbers]
            try:
                made = take_crops(data, [(crop.scaled, crop.box) for crop in crops], alone)
            except Unreadable as error:
                name = shard.datasets[dataset_id].id
                raise DataError(f"{name}: {source} cannot be cropped: {error.reason}, {error}. {_REMEDY}") from None
            for number, (crop, method) in zip(numbers, made, strict=True):
                pixels[number], methods[number] = crop, method
        if older is not None:
            copy_rows(older, shard.copies, pixels, methods)
        write_shard(path, [_shard_row(row, method) for row, method in zip(planned, methods, strict=True)], pixels)
        finish_part(path)
    return ShardResult(len(planned), len(by_picture))


def build_shards(layout: Layout, work: WorkDir, beside: Artifact | None = None) -> CropsSummary:
    """Make every shard of a layout in this thread and finish the artifact as `finish_pixels` does."""
    return finish_pixels(layout, [build_shard(shard, work.path, layout.older) for shard in layout.made], work, beside)


def finish_pixels(
    layout: Layout, results: list[ShardResult], work: WorkDir, beside: Artifact | None = None
) -> CropsSummary:
    """Link the reused shards, list the live rows, draw the contact sheet. Returns counts for the manifest.

    beside: an artifact with as many rows, shown on the sheet to the left of these rows.
    """
    for stray in set(work.path.glob(PARTS)) - {work.path / name for name in layout.files}:
        stray.unlink()  # an interrupted build laid the rows out otherwise
    for name, digest in layout.kept.items():
        assert layout.older is not None  # it has the file
        take_part(layout.older.path / name, digest, work.path / name)
    files = [work.path / name for name in layout.files]
    pictures = write_row_list(layout.plans, layout.places, files, work.path / ROWS_FILE)
    _save_sheet(files, work.path, beside)
    rows = sum(len(files) for files, _ in layout.places)
    return CropsSummary(
        shards=len(layout.files),
        rows=rows,
        shown_per_epoch=pc.sum(read_row_list(work.path)["times"]).as_py() or 0,
        pictures=pictures,
        sizes=tuple(dict.fromkeys(f"{plan.size[0]}x{plan.size[1]}" for plan in layout.plans)),
        decoded=sum(result.decoded for result in results),
        shards_taken_over=len(layout.kept),
    )


def _by_id(run: Run) -> dict[str, ImageDataset]:
    return {dataset.id: dataset for dataset in run.datasets}


def lay_out(
    plans: list[SizePlan], datasets: dict[str, ImageDataset], shard_bytes: int, older: Artifact | None
) -> Layout:
    """Decide which shards of an older artifact are reused, and which new ones are made from the other rows."""
    old = OlderRows.read(older)
    names = list(old.names)  # of files; new ones follow
    new_shards, places, used = [], [], set()
    for plan in plans:
        capacity = max(1, shard_bytes // (plan.size[0] * plan.size[1] * 3))
        keys = plan.table()["key"].to_numpy()
        copies = old.find(keys)
        kept = old.worth_keeping(copies, capacity)
        stays = (copies >= 0) & kept[old.file[copies]]
        file = np.where(stays, old.file[copies], -1).astype(np.int32)
        place = np.where(stays, old.place[copies], 0).astype(np.int32)
        used |= {names[number] for number in np.unique(file[stays])}
        rest = np.flatnonzero(~stays)
        for start in range(0, len(rest), capacity):
            numbers = rest[start : start + capacity]
            name = f"{plan.name}-{sha256_bytes(keys[numbers].tobytes())[:12]}.parquet"
            file[numbers], place[numbers] = len(names), np.arange(len(numbers))
            names.append(name)
            new_shards.append(ShardPlan(name, plan, numbers, copies[numbers], datasets))
        places.append((file, place))
    order = {name: number for number, name in enumerate(sorted(used | {shard.name for shard in new_shards}))}
    final = np.array([order.get(name, -1) for name in names] or [-1], np.int32)
    kept_files = {name: old.digests[name] for name in sorted(used)}
    return Layout(
        tuple(plans), kept_files, tuple(new_shards), tuple((final[file], place) for file, place in places), older
    )


def _shard_row(row: Planned, method: str) -> ShardRow:
    left, top, width, height = row.crop.source_box
    return ShardRow(
        image_id=row.image_id, source=row.source, dataset_id=row.dataset_id, width=row.width, height=row.height,
        original_width=row.original_width, original_height=row.original_height, crop_left=left, crop_top=top,
        crop_width=width, crop_height=height, repeat=row.repeat, caption=row.caption,
        caption_id=caption_id(row.caption), crop_style=row.crop_style, method=method,
    )  # fmt: skip


def _save_sheet(files: list[Path], out: Path, beside: Artifact | None) -> None:
    """A contact sheet of the first crops, for people: 32 of 64 px, 16 of 256 px; half as many if shown with others
    beside them.

    No file if there are no rows.
    """
    (out / SHEET).unlink(missing_ok=True)
    first = next(iter(read_row_list(out).slice(0, 1).to_pylist()), None)
    if first is None:
        return
    large = min(first["width"], first["height"]) > SHEET_CELL_PX
    count, cell = (SHEET_CROPS // 2, 2 * SHEET_CELL_PX) if large else (SHEET_CROPS, SHEET_CELL_PX)
    crops = _first_crops(files, out, count if beside is None else count // 2)
    if beside is not None:
        pairs = zip(_first_crops(shard_files(beside), beside.path, len(crops)), crops, strict=True)
        crops = [picture for pair in pairs for picture in pair]
    save_picture(contact_sheet(crops, 8, cell), out / SHEET)


def _first_crops(files: list[Path], folder: Path, count: int) -> list[np.ndarray]:
    """The first live rows of a directory."""
    rows = read_row_list(folder).slice(0, count).to_pylist()
    return [open_shard(files[row["file"]])[row["place"]] for row in rows]
