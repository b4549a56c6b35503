"""Stage I and Stage II pixels and the eval set: crops of the accepted pictures, cut into shards of a fixed plan.

The plan is a pure function of the index and the settings, so shards can be made in any order, by any number of
workers, and again after a kill, with the same bytes. One file is decoded once for all its repeats.
"""

from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from deepfloyd_core.artifacts import Artifact, Request, finish_part, part_is_whole
from deepfloyd_core.config import Run
from deepfloyd_core.datafile import ImageDataset
from deepfloyd_core.draws import image_keys, seeded
from deepfloyd_core.errors import DataError
from deepfloyd_core.files import sha256_bytes
from deepfloyd_core.flavours import Stage
from deepfloyd_core.geometry import Crop, Geometry, geometry, plan_crops
from deepfloyd_core.image_index import Row, read_index
from deepfloyd_core.shards import ShardRow, map_pixels, read_rows, write_shard
from deepfloyd_core.sheets import contact_sheet, save_picture
from deepfloyd_core.shrink import take_crops
from deepfloyd_core.types import caption_id, hash_unit

FORMAT = 3  # 3: crops from scaled decodes, and the columns `crop_style` and `method`
SHEET, SHEET_CROPS, SHEET_CELL_PX = "sheet.jpg", 32, 64


@dataclass(frozen=True)
class PlannedCrop:
    """One row that a shard will have, and where its file is."""

    path: str
    row: ShardRow
    crop: Crop


@dataclass(frozen=True)
class ShardPlan:
    """One Parquet file: its name and its crops, all of one size."""

    name: str
    crops: tuple[PlannedCrop, ...]


@dataclass(frozen=True)
class ShardResult:
    """What became of one shard: rows in it, pictures decoded for it now (0: it was there already)."""

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


def plan_shards(run: Run, index: Artifact, stage: Stage) -> list[ShardPlan]:
    """The shards of a stage: rows sorted by (size, picture, repeat), cut every `shard_mib`.

    Raises DataError when no accepted picture is large enough for the stage.
    """
    rows = [row for row in read_index(index) if usable(row, stage)]
    if not rows:
        raise DataError(f"No picture is large enough for stage {stage}. The ledger is {index.path}/index.parquet.")
    crops = []
    for dataset in run.datasets:
        own = [row for row in rows if row.dataset_id == dataset.id]
        crops += plan_rows(run, dataset, stage, own, dataset.repeats + 1)
    crops.sort(key=lambda c: (c.row.width, c.row.height, c.row.image_id, c.row.dataset_id, c.row.source, c.row.repeat))
    return _cut(crops, int(run.config.shard_mib * 2**20), f"stage{stage}")


def plan_eval(run: Run, index: Artifact) -> list[ShardPlan]:
    """One file for each stage and size with the held-out pictures, cropped at the centre.

    Of each data set the pictures, fit for every stage that it feeds, with the smallest hashes of (seed, picture): the
    same in every run and on every machine. Raises DataError when nothing is left to train on, or to hold out.
    """
    rows = read_index(index)
    chosen = []
    for dataset in run.datasets:
        fed = [stage for stage in run.config.stages if dataset.factor(stage) is not None]
        fit = [row for row in rows if row.dataset_id == dataset.id and fed and all(usable(row, stage) for stage in fed)]
        own = {row.image_id: row for row in fit}
        order = sorted(own.values(), key=lambda row: hash_unit("eval", run.config.seed, row.image_id))
        if own and len(order) <= run.config.num_eval_images:
            raise DataError(
                f"{dataset.id} has {len(order)} usable pictures, and num_eval_images = {run.config.num_eval_images} "
                "would hold all of them out. Add pictures or lower num_eval_images."
            )
        chosen += [(row, dataset) for row in order[: run.config.num_eval_images]]
    plans = []
    for stage in run.config.stages:
        held_out = [(row, dataset) for row, dataset in chosen if usable(row, stage)]
        if not held_out:
            raise DataError(
                f"No picture can be held out to measure stage {stage}: no data set that feeds it has a picture that is "
                f"large enough for each of its stages. The ledger is {index.path}/index.parquet."
            )
        crops = [planned for row, dataset in held_out for planned in plan_rows(run, dataset, stage, [row], 1, "center")]
        plans += _cut(crops, 1 << 30, f"stage{stage}")
    return plans


def plan_rows(
    run: Run, dataset: ImageDataset, stage: Stage, rows: list[Row], passes: int, crop_style: str | None = None
) -> list[PlannedCrop]:
    """The crops of a data set's usable pictures, each with its passes one after the other."""
    rules = geometry(run.config, dataset, stage, crop_style)
    assert rules is not None  # usable rows are of data sets that feed the stage
    every = [row for row in rows for _ in range(passes)]
    repeats = np.tile(np.arange(passes), len(rows))
    draw = seeded(run.config.seed, image_keys(str(row.image_id) for row in every), repeats)
    sizes = np.array([(row.width, row.height) for row in every], np.int32).reshape(-1, 2)
    faces = np.array([_face_centre(row) for row in every]).reshape(-1, 2) if rules.crop_style == "face" else None
    crops = plan_crops(sizes, rules, draw, faces)
    return [_plan_row(row, dataset, int(repeats[n]), crops.crop(n), rules) for n, row in enumerate(every)]


def build_shard(plan: ShardPlan, out: Path) -> ShardResult:
    """Make one shard, or keep it when an interrupted build finished it.

    Raises DataError when a picture is no longer what the index saw: the run must then be started again.
    """
    path = out / plan.name
    if part_is_whole(path):
        return ShardResult(len(plan.crops), 0)
    by_file: dict[str, list[int]] = defaultdict(list)
    for number, planned in enumerate(plan.crops):
        by_file[planned.path].append(number)
    rows = [planned.row for planned in plan.crops]
    pixels: list[np.ndarray] = [np.empty(0)] * len(rows)
    for file, numbers in by_file.items():
        data = _read_same(file, rows[numbers[0]].image_id)
        made = take_crops(data, [(plan.crops[number].crop.scaled, plan.crops[number].crop.box) for number in numbers])
        for number, (crop, method) in zip(numbers, made, strict=True):
            pixels[number], rows[number] = crop, replace(rows[number], method=method)
    write_shard(path, rows, pixels)
    finish_part(path)
    return ShardResult(len(plan.crops), len(by_file))


def pixels_summary(plans: list[ShardPlan], results: list[ShardResult]) -> dict[str, Any]:
    """Counts for the manifest; the same whether or not the build was interrupted."""
    sizes = sorted({(crop.row.width, crop.row.height) for plan in plans for crop in plan.crops})
    return {
        "shards": len(plans),
        "rows": sum(result.rows for result in results),
        "pictures": len({crop.row.image_id for plan in plans for crop in plan.crops}),
        "sizes": [f"{width}x{height}" for width, height in sizes],
    }


def save_sheet(out: Path) -> None:
    """A contact sheet of the first crops, for the eye: 32 of 64 px, 16 of 256 px."""
    pixels: list[np.ndarray] = []
    for file in sorted(out.glob("stage*-*.parquet")):  # not the dot files that a killed writer left
        pixels += [picture for group in map_pixels(file) for picture in group[:SHEET_CROPS]]
    large = min(pixels[0].shape[:2]) > SHEET_CELL_PX
    shown, cell = (pixels[: SHEET_CROPS // 2], 2 * SHEET_CELL_PX) if large else (pixels[:SHEET_CROPS], SHEET_CELL_PX)
    save_picture(contact_sheet(shown, 8, cell), out / SHEET)


def shard_files(pixels: Artifact, stage: Stage | None = None) -> list[Path]:
    """The Parquet files of a pixel artifact (of one stage, for the eval set), in order."""
    return sorted(pixels.path.glob(f"stage{stage or '*'}-*.parquet"))


def eval_ids(eval_set: Artifact) -> frozenset[str]:
    """The held-out pictures."""
    return frozenset(row.image_id for file in shard_files(eval_set) for row in read_rows(file))


def usable(row: Row, stage: Stage) -> bool:
    """Whether a ledger row feeds a stage."""
    return row.status == "accepted" and (row.stage1_reason if stage == 1 else row.stage2_reason) is None


def _face_centre(row: Row) -> tuple[float, float]:
    if row.face is None:
        return np.nan, np.nan
    left, top, width, height = row.face
    return left + width / 2, top + height / 2


def _plan_row(row: Row, dataset: ImageDataset, repeat: int, crop: Crop | None, rules: Geometry) -> PlannedCrop:
    assert row.width and row.height and row.image_id and crop  # an accepted row has them
    left, top, width, height = crop.source_box
    caption = row.captions[repeat % len(row.captions)]
    central = rules.whole or (rules.crop_style == "face" and row.face is None)
    shard_row = ShardRow(
        image_id=row.image_id, source=row.source, dataset_id=row.dataset_id, width=crop.width, height=crop.height,
        original_width=row.width, original_height=row.height, crop_left=left, crop_top=top, crop_width=width,
        crop_height=height, repeat=repeat, caption=caption, caption_id=caption_id(caption),
        crop_style="center" if central else rules.crop_style,
    )  # fmt: skip
    return PlannedCrop(str(Path(dataset.instance_data_dir, row.source)), shard_row, crop)


def _cut(crops: list[PlannedCrop], shard_bytes: int, prefix: str) -> list[ShardPlan]:
    by_size: dict[tuple[int, int], list[PlannedCrop]] = defaultdict(list)
    for planned in crops:
        by_size[planned.row.width, planned.row.height].append(planned)
    plans = []
    for (width, height), group in sorted(by_size.items()):
        rows = max(1, shard_bytes // (width * height * 3))
        for number, start in enumerate(range(0, len(group), rows)):
            name = f"{prefix}-{width}x{height}-{number:05d}.parquet"
            plans.append(ShardPlan(name, tuple(group[start : start + rows])))
    return plans


def _read_same(file: str, image_id: str) -> bytes:
    try:
        data = Path(file).read_bytes()
    except OSError as error:
        raise DataError(
            f"{file} was indexed and can no longer be read ({error.strerror}). Start the run again."
        ) from None
    if sha256_bytes(data) != image_id:
        raise DataError(f"{file} changed while the run was using it. Start the run again.")
    return data
