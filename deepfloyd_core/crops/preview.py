"""A preview of a few pictures before anything is made: their crop boxes, the downsampled picture, the training crops.

The pictures are those with the smallest hashes: the same ones in every preview, and a fair sample of the data sets.
Every file is hashed, as in a run, unless some are given; only the shown pictures are decoded.
"""

from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import pyarrow as pa
from PIL import Image, ImageDraw

from deepfloyd_core.config.data_sets import ImageDataset
from deepfloyd_core.config.run import Run
from deepfloyd_core.config.stages import STAGES, Stage
from deepfloyd_core.crops.plan import Planned, plan_pictures
from deepfloyd_core.errors import DataError
from deepfloyd_core.index.judge import Entry, judge, look
from deepfloyd_core.index.ledger import PICTURE, SCHEMA, Row, in_words
from deepfloyd_core.index.left_out import sample_order
from deepfloyd_core.index.scan import scan
from deepfloyd_core.pictures.draws import image_keys
from deepfloyd_core.pictures.geometry import Crop, Size
from deepfloyd_core.pictures.resize import take_crops
from deepfloyd_core.pictures.sheets import fitted, font, save_picture
from deepfloyd_core.sources.source import read_again
from deepfloyd_core.store.counts import many
from deepfloyd_core.store.locks import create_workspace

PREVIEW_FILE = "preview.png"
CELL_PX, GAP_PX, LINE_PX, MARGIN_PX, FONT_PX, TILES_ACROSS = 176, 8, 18, 14, 13, 2
INK, SOFT, PAPER, EDGE = (30, 30, 30), (105, 105, 105), (245, 245, 245), (200, 200, 200)
Box = tuple[float, float, float, float]  # left, top, right, bottom
_NO_BOXES: Mapping[Stage, Box] = MappingProxyType({})


@dataclass(frozen=True)
class Shown:
    """One picture of the preview: its row and its first crop for each stage of the run that it feeds."""

    row: Row
    dataset: ImageDataset
    crops: dict[Stage, Planned]


def save_preview(run: Run, count: int, path: Path, scanned: pa.Table | None = None) -> tuple[int, str]:
    """Draw `count` pictures of the run's data sets into a PNG. scanned: of these (SCAN); None: of all.

    Returns how many were drawn, and a sentence about other chosen pictures that cannot be used, empty for none. Raises
    DataError if no picture can be used.
    """
    shown, rejected = choose_shown(run, count, scan(run) if scanned is None else scanned)
    counts = Counter(str(row.reason) for row in rejected)
    reasons = ", ".join(f"{number} {reason}" for reason, number in sorted(counts.items()))
    most = next((row for row in rejected if row.reason == max(counts, key=counts.__getitem__)), None)
    example = ""
    if most and most.reason and most.detail:
        example = f" For example {most.source}: {in_words(most.reason, most.detail)}."
    if not shown:
        raise DataError(f"No picture of the data sets can be used ({reasons or 'none can be read'}).{example}")
    create_workspace(path.parent)
    save_picture(_sheet(shown, run.config.stages, run.config.workers), path)
    return len(shown), f"{many(len(rejected), 'other')} cannot be used ({reasons}).{example}" if rejected else ""


def choose_shown(run: Run, count: int, scanned: pa.Table) -> tuple[list[Shown], list[Row]]:
    """The pictures to show, and the rejected ones before them."""
    scanned = scanned.filter(scanned["sha256"].is_valid())
    datasets = {dataset.id: dataset for dataset in run.datasets}
    taken = dict.fromkeys(datasets, 0)
    shown: list[Shown] = []
    rejected: list[Row] = []
    for place in sample_order(image_keys(scanned["sha256"]), run.config.seed):
        entry = Entry(**scanned.slice(place, 1).to_pylist()[0])
        dataset = datasets[entry.dataset_id]
        if len(shown) == count or taken[dataset.id] == dataset.max_num_samples:
            continue
        row = judge(run, dataset, entry, look(run, dataset, entry))
        stages = [stage for stage in run.config.stages if row.status == "accepted" and row.unfit(stage) is None]
        if stages:
            taken[dataset.id] += 1
            picture = pa.Table.from_pylist([vars(row)], schema=SCHEMA).select(PICTURE)
            plans = {stage: plan_pictures(run, dataset, stage, picture, passes=1) for stage in stages}
            crops = {stage: Planned(**plan.to_pylist()[0]) for stage, plan in plans.items()}
            shown.append(Shown(row, dataset, crops))
        elif row.reason:
            rejected.append(row)
    return shown, rejected


def _sheet(shown: list[Shown], stages: tuple[Stage, ...], threads: int) -> Image.Image:
    titles = [
        ("original", SOFT),
        ("downsampled", SOFT),
        *((f"stage {STAGES[stage].roman}", STAGES[stage].colour) for stage in stages),
    ]
    tile = len(titles) * (CELL_PX + GAP_PX) - GAP_PX, CELL_PX + 2 * LINE_PX + GAP_PX
    across = min(TILES_ACROSS, len(shown))
    lines, head = -(-len(shown) // across), LINE_PX + MARGIN_PX
    size = across * (tile[0] + MARGIN_PX) + MARGIN_PX, lines * (tile[1] + MARGIN_PX) + head
    sheet = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(sheet)
    for column in range(across):
        for number, (title, colour) in enumerate(titles):
            left = MARGIN_PX + column * (tile[0] + MARGIN_PX) + number * (CELL_PX + GAP_PX)
            pen.text((left, MARGIN_PX // 2), title, colour, font(FONT_PX))
    with ThreadPoolExecutor(threads) as pool:
        for number, made in enumerate(pool.map(lambda one: _tile(one, stages, tile), shown)):
            line, column = divmod(number, across)
            place = MARGIN_PX + column * (tile[0] + MARGIN_PX), head + line * (tile[1] + MARGIN_PX)
            sheet.paste(made, place)
    return sheet


def _tile(one: Shown, stages: tuple[Stage, ...], size: Size) -> Image.Image:
    """The original with each stage's box, the downsampled picture with the first one's, then the crop of each stage."""
    tile = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(tile)
    (stage, first), *_ = one.crops.items()
    original, downsampled, *crops = _views(one)
    boxes: dict[Stage, Box] = {stage: _corners(planned.crop) for stage, planned in one.crops.items()}
    _paste(tile, original, 0, boxes, first.crop.original)
    _paste(tile, downsampled, 1, {stage: first.crop.box})
    for number, stage in enumerate(stages, 2):
        if stage in one.crops:
            _paste(tile, crops.pop(0), number)
        else:
            why = one.row.unfit(stage) or ""
            pen.text((_left(number), 2 * LINE_PX + CELL_PX // 2), why.replace("_", " "), SOFT, font(FONT_PX))
    sizes = [
        first.crop.original,
        first.crop.scaled,
        *((planned.crop.width, planned.crop.height) for planned in one.crops.values()),
    ]
    steps = " > ".join(f"{width}x{height}" for width, height in sizes)
    title = f"{one.row.source} | {steps} | {first.crop_style}"
    pen.text((0, 0), fitted(title, size[0], FONT_PX), INK, font(FONT_PX))
    pen.text((0, LINE_PX), fitted(" ".join(first.caption.split()), size[0], FONT_PX), SOFT, font(FONT_PX))
    return tile


def _views(one: Shown) -> list[Image.Image]:
    """The original (at most as large as a cell), the downsampled picture, and each crop, made as a run makes it."""
    data = read_again(one.dataset, one.row.source, one.row.image_id)
    if data is None:
        raise DataError(f"{one.row.source} changed or went away while the preview was made. Start it again.")
    planned = [each.crop for each in one.crops.values()]
    small = _fit(planned[0].original, 1.0)
    whole = [(size, (0, 0, *size)) for size in (small, planned[0].scaled)]
    made = take_crops(data, [*whole, *((crop.scaled, crop.box) for crop in planned)])
    return [Image.fromarray(pixels) for pixels, _ in made]


def _fit(size: Size, most: float) -> Size:
    """A size scaled to fit into a cell, at most by `most`."""
    scale = min(most, CELL_PX / size[0], CELL_PX / size[1])
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _corners(crop: Crop) -> Box:
    left, top, width, height = crop.source_box
    return left, top, left + width, top + height


def _left(number: int) -> int:
    return number * (CELL_PX + GAP_PX)


def _paste(
    tile: Image.Image, view: Image.Image, number: int, boxes: Mapping[Stage, Box] = _NO_BOXES, own: Size | None = None
) -> None:
    """Fit a picture into cell `number` of a tile and draw boxes on it, given in pixels of a picture of the size `own`."""
    size = _fit(view.size, float(CELL_PX))
    small = view.resize(size, Image.Resampling.NEAREST if size > view.size else Image.Resampling.LANCZOS)
    pen = ImageDraw.Draw(small)
    pen.rectangle((0, 0, size[0] - 1, size[1] - 1), outline=EDGE)
    width, height = own or view.size
    x, y = size[0] / width, size[1] / height
    for stage, (left, top, right, bottom) in reversed(tuple(boxes.items())):
        pen.rectangle((left * x, top * y, right * x - 1, bottom * y - 1), outline=STAGES[stage].colour, width=2)
    tile.paste(small, (_left(number) + (CELL_PX - size[0]) // 2, 2 * LINE_PX + (CELL_PX - size[1]) // 2))
