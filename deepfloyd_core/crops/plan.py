"""Plans the crops of an index: one row for each, in Arrow files by training size, before any picture is decoded.

The plan is a pure function of the index and the settings. It streams: some ten thousand pictures are in memory at a
time and the files are mapped. So ten million rows need no more memory than ten thousand, and take minutes less than
decoding one in a thousand of them; figures in `benchmarks/results.md`.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from deepfloyd_core.arrow import mapped_table
from deepfloyd_core.config.data_sets import ImageDataset
from deepfloyd_core.config.run import Run
from deepfloyd_core.config.stages import Stage
from deepfloyd_core.files import atomic_path
from deepfloyd_core.index.ledger import PICTURE, ledger_batches
from deepfloyd_core.pictures.draws import image_keys, mixed, seeded
from deepfloyd_core.pictures.geometry import Crop, Geometry, Size, geometry, plan_crops
from deepfloyd_core.store.artifacts import Artifact

ROWS_AT_ONCE = 1 << 16
_NUMBERS = (
    "width", "height", "original_width", "original_height", "scaled_width", "scaled_height", "left", "top", "repeat",
)  # fmt: skip
_TEXTS = ("image_id", "source", "dataset_id", "caption", "crop_style")
_COUNTED = ("image_id", "dataset_id", "width", "height", "captions")
_Counts = dict[tuple[str, Size], np.ndarray]  # of a data set and size: pictures, rows and passes
_DRAWN = 4  # passes that are drawn to see how random aspects are divided
PLAN = pa.schema([(name, pa.string()) for name in _TEXTS] + [(name, pa.int32()) for name in _NUMBERS]
                 + [("times", pa.int32()), ("key", pa.uint64())])  # fmt: skip


@dataclass(frozen=True)
class Planned:
    """One row of a plan."""

    image_id: str
    source: str
    dataset_id: str
    caption: str
    crop_style: str
    width: int
    height: int
    original_width: int
    original_height: int
    scaled_width: int
    scaled_height: int
    left: int
    top: int
    repeat: int  # the first pass that shows it
    times: int  # how many passes do
    key: int  # 64 bits of everything else: rows with the same key have the same pixels and columns

    @property
    def crop(self) -> Crop:
        """Its geometry."""
        original, scaled = (self.original_width, self.original_height), (self.scaled_width, self.scaled_height)
        return Crop(original, scaled, self.left, self.top, self.width, self.height)


@dataclass(frozen=True)
class SizePlan:
    """The planned rows of one stage and training size, on disk."""

    name: str  # such as stage1-64x64
    size: Size
    path: Path

    def table(self) -> pa.Table:
        """PLAN, memory-mapped."""
        return mapped_table(self.path)

    def rows(self, numbers: np.ndarray) -> list[Planned]:
        """The rows of ascending numbers."""
        span = self.table().slice(numbers[0], numbers[-1] - numbers[0] + 1)
        return [Planned(**row) for row in span.take(numbers - numbers[0]).to_pylist()]


def write_plan(
    run: Run, index: Artifact, stage: Stage, folder: Path, columns: tuple[str, ...] = PICTURE
) -> list[SizePlan]:
    """Plan the passes over every picture (columns PICTURE) that feeds a stage, or over its pair (columns PAIR).

    Rows are in the index's order, passes one after the other; equal passes are one row.
    """
    tables = (
        plan_pictures(run, dataset, stage, part, dataset.repeats + 1)
        for batch in ledger_batches(index, columns, stage)
        for dataset, part in by_dataset(run, batch)
    )
    return write_sizes(tables, folder, f"stage{stage}")


def by_dataset(run: Run, pictures: pa.Table) -> Iterator[tuple[ImageDataset, pa.Table]]:
    """A table's rows, data set by data set; at most so many at a time that their passes fit ROWS_AT_ONCE."""
    for dataset in sorted(run.datasets, key=lambda dataset: dataset.id):  # their order in the data file has no meaning
        own = pictures.filter(pc.equal(pictures["dataset_id"], dataset.id))
        step = max(1, ROWS_AT_ONCE // min(dataset.repeats + 1, 2 * dataset.random_crops))
        for start in range(0, len(own), step):
            yield dataset, own.slice(start, step)


def write_sizes(tables: Iterable[pa.Table], folder: Path, prefix: str) -> list[SizePlan]:
    """Sort planned rows by training size into files of `folder`, keeping their order."""
    plans: dict[Size, SizePlan] = {}
    writers: dict[Size, pa.ipc.RecordBatchFileWriter] = {}
    with ExitStack() as files:
        for table in tables:
            for size, own in by_size(table):
                if size not in plans:
                    name = f"{prefix}-{size[0]}x{size[1]}"
                    plans[size] = SizePlan(name, size, folder / f".plan-{name}.arrow")
                    # Atomic: a worker of a killed run may still be reading the plan that this one replaces.
                    tmp = files.enter_context(atomic_path(plans[size].path))
                    writers[size] = files.enter_context(pa.ipc.new_file(tmp, PLAN))
                writers[size].write_table(table.filter(pa.array(own)))
    return [plans[size] for size in sorted(plans)]


def by_size(rows: pa.Table) -> Iterator[tuple[Size, np.ndarray]]:
    """The training sizes of a table's rows, ascending, and which rows have each: bool (rows,)."""
    codes = rows["width"].to_numpy().astype(np.int64) << 32 | rows["height"].to_numpy()
    for code in np.unique(codes):
        yield (int(code >> 32), int(code & 0xFFFFFFFF)), codes == code


def plan_pictures(
    run: Run, dataset: ImageDataset, stage: Stage, pictures: pa.Table, passes: int, crop_style: str | None = None
) -> pa.Table:
    """PLAN of a data set's pictures (columns PICTURE, all of them fit for the stage), each with its passes in a row.

    Passes with the same crop and caption are one row. There are at most `random_crops` random crops: then pass r
    repeats pass r modulo the number of planned passes. With the columns PAIR the rows have the crops of the pictures,
    and the name and the bytes of their pairs.
    """
    rules = geometry(run.config, dataset, stage, crop_style)
    assert rules is not None  # the pictures are of a data set that feeds the stage
    planned = _planned_passes(rules, dataset, pictures["captions"], passes)
    owner = np.repeat(np.arange(len(pictures)), planned)
    repeats = (np.arange(len(owner)) - (np.cumsum(planned) - planned)[owner]).astype(np.int32)
    times = -(-(passes - repeats) // planned[owner])
    every = pictures.take(owner).combine_chunks()
    keys = image_keys(every["image_id"])
    sizes = np.stack([every["width"].to_numpy(), every["height"].to_numpy()], axis=1)
    faces = _face_centres(every["face"]) if rules.crop_style == "face" else None
    crops = plan_crops(sizes, rules, seeded(run.config.seed, keys, repeats), faces)
    assert not crops.reason.any()
    central = np.full(len(every), rules.whole) if faces is None else np.isnan(faces[:, 0])
    pairs = (crops.target, crops.sizes, crops.scaled, crops.place)
    numbers = [np.ascontiguousarray(pair[:, axis]) for pair in pairs for axis in (0, 1)] + [repeats]
    captions, number = _captions(every["captions"], repeats)
    if "conditioning_id" in every.column_names:
        every = every.drop_columns(["image_id", "source"])
        every = every.rename_columns({"conditioning_id": "image_id", "conditioning": "source"})
        keys = image_keys(every["image_id"])
    names = pc.binary_join_element_wise(every["source"], every["dataset_id"], captions, "\n")
    styles = pc.if_else(central, "center", rules.crop_style)
    texts = [every["image_id"], every["source"], every["dataset_id"], captions, styles]
    rows = pa.table([*texts, *numbers, times, _row_keys(keys, names, central, numbers)], schema=PLAN)
    return _once(rows, [owner, number, *numbers[:-1]])


@dataclass(frozen=True)
class CropCount:
    """The crops of one training size of a data set."""

    dataset_id: str
    size: Size
    pictures: int
    rows: int  # of its shards, at most: passes that turn out equal become one
    shown: int  # in an epoch


def count_crops(run: Run, index: Artifact, stage: Stage, left_out: pa.Array) -> tuple[list[CropCount], list[CropCount]]:
    """The crops that a plan of an index will have, by data set and size, without planning them: a million pictures a second.

    First of the pictures that are trained on, then of all. left_out: the ids of the others. Where an aspect is drawn for
    each pass, rows are divided among the sizes as the first passes are.
    """
    trained: _Counts = {}
    every: _Counts = {}
    for batch in ledger_batches(index, _COUNTED, stage):
        out = pc.is_in(batch["image_id"], left_out)
        of_all = list(_of_sets(run, stage, batch))
        kept = list(_of_sets(run, stage, batch.filter(pc.invert(out)))) if pc.any(out).as_py() else of_all
        for counts, found in ((trained, kept), (every, of_all)):
            for key, numbers in found:
                counts[key] = counts.get(key, np.zeros(3, np.int64)) + numbers
    of_trained, of_every = (
        [CropCount(name, size, *found.tolist()) for (name, size), found in sorted(counts.items())]
        for counts in (trained, every)
    )
    return of_trained, of_every


def _of_sets(run: Run, stage: Stage, pictures: pa.Table) -> Iterator[tuple[tuple[str, Size], np.ndarray]]:
    """`_counted` of each data set."""
    for dataset, part in by_dataset(run, pictures):
        for size, found in _counted(run, dataset, stage, part):
            yield (dataset.id, size), found


def _counted(run: Run, dataset: ImageDataset, stage: Stage, pictures: pa.Table) -> Iterator[tuple[Size, np.ndarray]]:
    """Each size of some pictures of a data set, with its pictures, rows and passes: int64 (3,)."""
    rules = geometry(run.config, dataset, stage)
    assert rules is not None  # the pictures are of a data set that feeds the stage
    passes = dataset.repeats + 1
    planned = _planned_passes(rules, dataset, pictures["captions"], passes)
    turns = min(passes, int(planned.max(initial=1)), _DRAWN) if rules.aspect == "random" else 1
    keys = image_keys(pictures["image_id"])
    sizes = np.stack([pictures["width"].to_numpy(), pictures["height"].to_numpy()], axis=1)
    for turn in range(turns):
        draw = seeded(run.config.seed, keys, np.full(len(keys), turn, np.int32))
        crops = plan_crops(sizes, rules, draw)
        table = pa.table({"width": crops.target[:, 0], "height": crops.target[:, 1]})
        for size, own in by_size(table):
            count = np.array([own.sum(), planned[own].sum(), own.sum() * passes], np.int64)
            yield size, -(-count // turns)


def _planned_passes(rules: Geometry, dataset: ImageDataset, captions: pa.ChunkedArray, passes: int) -> np.ndarray:
    """How many passes over each picture can differ, or are planned: int64 (N,). All captions have equally many."""
    counts = pc.list_value_length(captions).to_numpy().astype(np.int64)
    random = rules.aspect == "random" or (rules.crop_style == "random" and not rules.whole)
    rounds = -(-dataset.random_crops // counts) if random else 1
    return np.asarray(np.minimum(passes, counts * rounds))


def _once(rows: pa.Table, same: list[np.ndarray]) -> pa.Table:
    """Rows that are equal in some columns become one: the first of them, with the `times` of all."""
    key = np.zeros(len(rows), np.uint64)
    for column in same:
        key = mixed(key + column.astype(np.uint64))
    _, first, group = np.unique(key, return_index=True, return_inverse=True)
    if len(first) == len(rows):
        return rows
    times = np.zeros(len(rows), np.int32)
    np.add.at(times, first[group], rows["times"].to_numpy())
    place = rows.schema.get_field_index("times")
    return rows.set_column(place, PLAN.field("times"), pa.array(times)).take(np.sort(first))


def _captions(lists: pa.ChunkedArray, repeats: np.ndarray) -> tuple[pa.ChunkedArray, np.ndarray]:
    """Pass number r takes caption r, modulo how many there are; and that number."""
    counts = pc.list_value_length(lists).to_numpy()
    starts = np.cumsum(counts) - counts
    return pc.list_flatten(lists).take(starts + repeats % counts), repeats % counts


def _face_centres(faces: pa.ChunkedArray) -> np.ndarray:
    """float64 (N, 2), NaN where there is no face; faces are left, top, width, height."""
    centres = np.full((len(faces), 2), np.nan)
    found = np.flatnonzero(pc.is_valid(faces).to_numpy())
    boxes = pc.list_flatten(faces).to_numpy().reshape(-1, 4).astype(np.float64)
    centres[found] = boxes[:, :2] + boxes[:, 2:] / 2
    return centres


def _row_keys(keys: np.ndarray, names: pa.ChunkedArray, central: np.ndarray, numbers: list[np.ndarray]) -> np.ndarray:
    """uint64 (N,): a hash over all columns of each row."""
    digests = (blake2b(name.encode(), digest_size=8).digest() for name in names.to_pylist())
    key = keys ^ np.frombuffer(b"".join(digests), "<u8")
    for column in [central, *numbers]:
        key = mixed(key + column.astype(np.uint64))
    return np.asarray(key)
