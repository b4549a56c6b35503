"""Stage I and Stage II pixels and the eval set: crops of the accepted pictures in Parquet shards, and the list of live rows.

Shards are named by what is in them and never rewritten: the next version of a data set links the shards of this one, and
makes new ones of the rows that came. A row that went stays in its shard, and out of `rows.arrow`, which lists the rows
that count in the plan's order. So training sees the same rows in the same order however they were cut into files, in
any order, by any number of workers, and again after a kill.
"""

import shutil
from collections import defaultdict
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from deepfloyd_core.artifacts import Artifact, Request, WorkDir, finish_part, newest, part_is_whole
from deepfloyd_core.config import Run
from deepfloyd_core.datafile import ImageDataset
from deepfloyd_core.draws import hash_units, image_keys
from deepfloyd_core.errors import DataError
from deepfloyd_core.files import atomic_path, sha256_bytes, sha256_file
from deepfloyd_core.flavours import Stage
from deepfloyd_core.image_index import SCHEMA, ledger_batches
from deepfloyd_core.plan import PICTURE, Planned, SizePlan, by_dataset, plan_pictures, write_plan, write_sizes
from deepfloyd_core.shards import ShardRow, open_shard, read_rows, write_shard
from deepfloyd_core.sheets import contact_sheet, save_picture
from deepfloyd_core.shrink import take_crops
from deepfloyd_core.sources import read_again
from deepfloyd_core.types import caption_id

FORMAT = 4  # 4: shards named by content, `rows.arrow`
ROWS_FILE = "rows.arrow"
SHEET, SHEET_CROPS, SHEET_CELL_PX = "sheet.jpg", 32, 64
MAX_SMALL = 8  # shards of one size that are less than half full; more of them are put together
MIN_LIVE = 0.5  # share of a shard's rows below which the rest of them move to a new one
ROWS = pa.schema([("file", pa.int32()), ("place", pa.int32()), ("width", pa.int32()), ("height", pa.int32()),
                  ("key", pa.uint64()), ("image_id", pa.string()), ("dataset_id", pa.string()),
                  ("caption_id", pa.string())])  # fmt: skip


@dataclass(frozen=True)
class ShardPlan:
    """One Parquet file to make: which rows of a plan, and which of them can be copied from an older artifact."""

    name: str
    plan: SizePlan
    numbers: np.ndarray  # int64, ascending
    copies: np.ndarray  # int64: a row of the older artifact's list that has the same pixels; -1: decode the picture
    datasets: dict[str, ImageDataset]  # that its pictures are from


@dataclass(frozen=True)
class Layout:
    """How planned rows become files: the shards taken over, the shards to make, and where each row is then."""

    plans: tuple[SizePlan, ...]
    kept: dict[str, str]  # names of the older artifact's shards that are taken over, and their sha256
    made: tuple[ShardPlan, ...]
    places: tuple[tuple[np.ndarray, np.ndarray], ...]  # for each plan int32 (rows,): number of the file, row in it
    older: Artifact | None

    @property
    def files(self) -> list[str]:
        """The names of all shards, in the order of their numbers."""
        return sorted([*self.kept, *(shard.name for shard in self.made)])


@dataclass(frozen=True)
class ShardResult:
    """What became of one shard: rows in it, pictures that were decoded for it (also by an interrupted run)."""

    rows: int
    decoded: int


def pixels_request(run: Run, index: Artifact, stage: Stage) -> Request:
    """Identity of a stage's pixels: the index, the random crops' seed, and how rows are cut into files."""
    keys = ("crop_style", "repeats")
    datasets = {dataset.id: {key: getattr(dataset, key) for key in keys} for dataset in run.datasets}
    spec = {"stage": stage, "seed": run.config.seed, "shard_mib": run.config.shard_mib, "datasets": datasets}
    return Request(f"stage{stage}_pixels", FORMAT, spec, {"image_index": index.fingerprint})


def eval_request(run: Run, index: Artifact) -> Request:
    """Identity of the eval set."""
    spec = {"num_eval_images": run.config.num_eval_images, "seed": run.config.seed, "stages": list(run.config.stages)}
    return Request("eval_set", FORMAT, spec, {"image_index": index.fingerprint})


def plan_shards(run: Run, index: Artifact, stage: Stage, work: WorkDir) -> Layout:
    """The shards of a stage: every size's rows in the plan's order, cut every `shard_mib`.

    Raises DataError when no accepted picture is large enough for the stage.
    """
    plans = write_plan(run, index, stage, work.path)
    if not plans:
        raise DataError(f"No picture is large enough for stage {stage}. The ledger is {index.path}/index.parquet.")
    older = newest(work.path.parents[1], f"stage{stage}_pixels", FORMAT)
    return _lay_out(run, plans, int(run.config.shard_mib * 2**20), older)


def plan_eval(run: Run, index: Artifact, work: WorkDir) -> Layout:
    """One file for each stage and size with the held-out pictures, cropped at the centre.

    Of each data set the pictures, fit for every stage that it feeds, with the smallest hashes of (seed, picture): the
    same in every run and on every machine. Raises DataError when nothing is left to train on, or to hold out.
    """
    chosen = pa.concat_tables(_held_out(run, index, dataset) for dataset in run.datasets)
    plans: list[SizePlan] = []
    for stage in run.config.stages:
        fed = [dataset.id for dataset in run.datasets if dataset.factor(stage) is not None]
        fit = chosen.filter(pc.is_in(chosen["dataset_id"], pa.array(fed, pa.string())))
        if not len(fit):
            raise DataError(
                f"No picture can be held out to measure stage {stage}: no data set that feeds it has a picture that is "
                f"large enough for each of its stages. The ledger is {index.path}/index.parquet."
            )
        tables = (plan_pictures(run, dataset, stage, part, 1, "center") for dataset, part in by_dataset(run, fit))
        plans += write_sizes(tables, work.path, f"stage{stage}")
    return _lay_out(run, plans, 1 << 30, None)


def in_groups(shards: tuple[ShardPlan, ...], most: int) -> list[tuple[ShardPlan, ...]]:
    """The shards in their order, in at most so many groups of (but for the last) one size."""
    size = max(1, -(-len(shards) // most))
    return [shards[start : start + size] for start in range(0, len(shards), size)]


def build_shard(shard: ShardPlan, out: Path, older: Artifact | None) -> ShardResult:
    """Make one shard, or keep it when an interrupted build finished it.

    Raises DataError when a picture is no longer what the index saw: the run must then be started again.
    """
    path, planned = out / shard.name, shard.plan.rows(shard.numbers)
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
                raise DataError(f"{dataset_id}: {source} changed or went away during the run. Start the run again.")
            crops = [planned[number].crop for number in numbers]
            made = take_crops(data, [(crop.scaled, crop.box) for crop in crops])
            for number, (crop, method) in zip(numbers, made, strict=True):
                pixels[number], methods[number] = crop, method
        if older is not None:
            _copy_rows(older, shard.copies, pixels, methods)
        write_shard(path, [_shard_row(row, method) for row, method in zip(planned, methods, strict=True)], pixels)
        finish_part(path)
    return ShardResult(len(planned), len(by_picture))


def build_shards(layout: Layout, work: WorkDir) -> dict[str, Any]:
    """Make every shard of a layout in this thread and finish the artifact. Returns counts for the manifest."""
    return finish_pixels(layout, [build_shard(shard, work.path, layout.older) for shard in layout.made], work)


def finish_pixels(layout: Layout, results: list[ShardResult], work: WorkDir) -> dict[str, Any]:
    """Link what is taken over, list the live rows, draw the contact sheet. Returns counts for the manifest."""
    for stray in set(work.path.glob("stage*.parquet")) - {work.path / name for name in layout.files}:
        stray.unlink()  # an interrupted build laid the rows out otherwise
    for name, digest in layout.kept.items():
        _link(layout.older, name, digest, work.path / name)
    pictures = _write_rows(layout, work.path / ROWS_FILE)
    _save_sheet(layout, work.path)
    rows = sum(len(files) for files, _ in layout.places)
    return {
        "shards": len(layout.files),
        "rows": rows,
        "pictures": pictures,
        "sizes": list(dict.fromkeys(f"{plan.size[0]}x{plan.size[1]}" for plan in layout.plans)),
        "decoded": sum(result.decoded for result in results),
        "shards_taken_over": len(layout.kept),
    }


def read_row_list(pixels: Path) -> pa.Table:
    """The live rows of a pixel artifact's directory, ROWS, memory-mapped."""
    return pa.ipc.open_file(pa.memory_map(str(pixels / ROWS_FILE))).read_all()


def shard_files(pixels: Artifact, stage: Stage | None = None) -> list[Path]:
    """The Parquet files of a pixel artifact (of one stage, for the eval set), in the order of their numbers."""
    names = sorted(entry["path"] for entry in pixels.manifest["files"])
    return [pixels.path / name for name in names if fnmatch(name, f"stage{stage or '*'}-*.parquet")]


def eval_ids(eval_set: Artifact) -> frozenset[str]:
    """The held-out pictures."""
    return frozenset(read_row_list(eval_set.path)["image_id"].to_pylist())


def _held_out(run: Run, index: Artifact, dataset: ImageDataset) -> pa.Table:
    """The pictures (columns PICTURE) of a data set that are held out; none when it feeds no stage or has none."""
    fed = [stage for stage in run.config.stages if dataset.factor(stage) is not None]
    reasons, count = [f"stage{stage}_reason" for stage in fed], run.config.num_eval_images
    best = SCHEMA.empty_table().select(PICTURE)
    for batch in ledger_batches(index, [*PICTURE, *reasons]) if fed else ():
        fit = pc.equal(batch["dataset_id"], dataset.id)
        for reason in reasons:
            fit = pc.and_(fit, pc.is_null(batch[reason]))
        best = pa.concat_tables([best, batch.filter(fit).select(PICTURE)])
        units = hash_units("eval", run.config.seed, image_keys(best["image_id"]), np.zeros(len(best), np.int64))
        best = best.take(
            np.unique(units, return_index=True)[1][: count + 1]
        )  # a picture that is there twice counts once
    if 0 < len(best) <= count:
        raise DataError(
            f"{dataset.id} has {len(best)} usable pictures, and num_eval_images = {count} "
            "would hold all of them out. Add pictures or lower num_eval_images."
        )
    return best.slice(0, count)


def _lay_out(run: Run, plans: list[SizePlan], shard_bytes: int, older: Artifact | None) -> Layout:
    datasets = {dataset.id: dataset for dataset in run.datasets}
    old = _OlderRows.read(older)
    names = list(old.names)  # of files; those to be made follow
    made, places, used = [], [], set()
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
            made.append(ShardPlan(name, plan, numbers, copies[numbers], datasets))
        places.append((file, place))
    order = {name: number for number, name in enumerate(sorted(used | {shard.name for shard in made}))}
    final = np.array([order.get(name, -1) for name in names] or [-1], np.int32)
    kept_files = {name: old.digests[name] for name in sorted(used)}
    return Layout(tuple(plans), kept_files, tuple(made), tuple((final[file], place) for file, place in places), older)


@dataclass(frozen=True)
class _OlderRows:
    """What the pixel artifact made last has: its rows by key, and its files that still have the bytes they were given."""

    names: tuple[str, ...]
    digests: dict[str, str]
    rows_in: np.ndarray  # int64, rows in each file, live or not
    keys: np.ndarray  # uint64, sorted
    number: np.ndarray  # int64: the number of the row that has the key
    file: np.ndarray  # int32, of each row
    place: np.ndarray

    @classmethod
    def read(cls, older: Artifact | None) -> "_OlderRows":
        none = np.zeros(1, np.int64)  # so that there is something to index with -1
        recorded = {entry["path"]: entry["sha256"] for entry in older.manifest["files"]} if older else {}
        if older is None or not _is_as_recorded(older.path / ROWS_FILE, recorded):
            return cls((), {}, none, np.empty(0, np.uint64), none[:0], none.astype(np.int32), none.astype(np.int32))
        table, files = read_row_list(older.path), shard_files(older)
        digests = {file.name: recorded[file.name] for file in files if _is_as_recorded(file, recorded)}
        whole = np.array([file.name in digests for file in files])
        rows_in = np.array(
            [pq.read_metadata(file).num_rows if good else 0 for file, good in zip(files, whole, strict=True)]
        )
        keys, file = table["key"].to_numpy(), table["file"].to_numpy()
        number = np.argsort(keys, kind="stable")
        number = number[whole[file[number]]]
        return cls(
            tuple(file.name for file in files), digests, rows_in, keys[number], number, file, table["place"].to_numpy()
        )

    def find(self, keys: np.ndarray) -> np.ndarray:
        """The row that has each key: int64, -1 where there is none."""
        if not len(self.keys):
            return np.full(len(keys), -1)
        spot = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return np.where(self.keys[spot] == keys, self.number[spot], -1)

    def worth_keeping(self, copies: np.ndarray, capacity: int) -> np.ndarray:
        """Which files are taken over whole, given the rows of one size that are wanted: bool (files,)."""
        live = np.bincount(self.file[copies[copies >= 0]], minlength=len(self.rows_in))
        kept = (live > 0) & (live >= MIN_LIVE * self.rows_in) & (self.rows_in <= capacity)
        small = kept & (2 * self.rows_in < capacity)
        return kept if small.sum() <= MAX_SMALL else kept & ~small


def _is_as_recorded(file: Path, recorded: dict[str, str]) -> bool:
    return file.is_file() and sha256_file(file) == recorded[file.name]


def _copy_rows(older: Artifact, copies: np.ndarray, pixels: list[np.ndarray], methods: list[str]) -> None:
    """Fill in the rows that an older artifact has."""
    numbers = np.flatnonzero(copies >= 0)
    rows = read_row_list(older.path).select(["file", "place"])
    files, places = (rows[name].to_numpy()[copies[numbers]] for name in ("file", "place"))
    paths = shard_files(older)
    for file in np.unique(files):
        shard, old_rows = open_shard(paths[file]), read_rows(paths[file])
        for number, place in zip(numbers[files == file], places[files == file], strict=True):
            pixels[number], methods[number] = shard[place], old_rows[place].method


def _shard_row(row: Planned, method: str) -> ShardRow:
    left, top, width, height = row.crop.source_box
    return ShardRow(
        image_id=row.image_id, source=row.source, dataset_id=row.dataset_id, width=row.width, height=row.height,
        original_width=row.original_width, original_height=row.original_height, crop_left=left, crop_top=top,
        crop_width=width, crop_height=height, repeat=row.repeat, caption=row.caption,
        caption_id=caption_id(row.caption), crop_style=row.crop_style, method=method,
    )  # fmt: skip


def _link(older: Artifact | None, name: str, digest: str, path: Path) -> None:
    assert older is not None  # it has the file
    if part_is_whole(path):
        return
    path.unlink(missing_ok=True)
    try:
        path.hardlink_to(older.path / name)
    except OSError:  # a file system without links
        shutil.copyfile(older.path / name, path)
    finish_part(path, digest)


def _write_rows(layout: Layout, path: Path) -> int:
    """Write the list of live rows. Returns how many different pictures they show."""
    seen = []
    with atomic_path(path) as tmp, pa.ipc.new_file(tmp, ROWS) as writer:
        for plan, (file, place) in zip(layout.plans, layout.places, strict=True):
            start = 0
            for batch in plan.table().to_batches():
                part = slice(start, start + len(batch))
                captions = batch["caption"].dictionary_encode()
                ids = pa.array([caption_id(text) for text in captions.dictionary.to_pylist()]).take(captions.indices)
                same = [batch[name] for name in ("width", "height", "key", "image_id", "dataset_id")]
                columns = [pa.array(file[part]), pa.array(place[part]), *same, ids]
                writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=ROWS))
                seen.append(np.unique(image_keys(batch["image_id"])))
                start += len(batch)
    return len(np.unique(np.concatenate(seen)))


def _save_sheet(layout: Layout, out: Path) -> None:
    """A contact sheet of the first crops, for the eye: 32 of 64 px, 16 of 256 px."""
    rows = read_row_list(out).slice(0, SHEET_CROPS).to_pylist()
    large = min(rows[0]["width"], rows[0]["height"]) > SHEET_CELL_PX
    count, cell = (SHEET_CROPS // 2, 2 * SHEET_CELL_PX) if large else (SHEET_CROPS, SHEET_CELL_PX)
    shown = [open_shard(out / layout.files[row["file"]])[row["place"]] for row in rows[:count]]
    save_picture(contact_sheet(shown, 8, cell), out / SHEET)
