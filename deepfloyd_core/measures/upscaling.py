"""Stage II measured on the held-out pictures: tuned and untuned beside plain enlargements, all of the same low-res pictures.

The low-res picture is the true one, the antialiased 4x downscale of the held-out crop, and, where a stage spoils them in
training, this one spoilt as well; seeds follow from the picture. Every
figure is a mean over pictures, and what the tuned model gains on each other way is paired picture by picture, so its
interval does not carry how the pictures differ among themselves.

In use the low-res picture is one of Stage I's samples, which have no truth. There the measures are what can be said without:
whether the enlarged picture still shows the sample, how much fine detail it has, and whether its colour has shifted.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F

from deepfloyd_core.config.flavours import UPSCALE
from deepfloyd_core.crops.shards import ShardRow, open_shard, read_rows
from deepfloyd_core.diffusion.loss import low_res, to_bytes, to_model_range
from deepfloyd_core.files import atomic_path
from deepfloyd_core.measures.clip import ClipEye, alike, set_distance
from deepfloyd_core.measures.files import DETAIL_SHEET, EVAL_FILE, EVAL_SHEET, SPOILT_SHEETS
from deepfloyd_core.measures.lpips import LpipsEye
from deepfloyd_core.measures.pixel import busiest, colour_shift, detail_energy, mean, mean_and_interval, psnr, ssim
from deepfloyd_core.pictures.sheets import framed, save_picture, titled_rows

PLAIN = ("bilinear", "bicubic")  # enlargements without a model
# What the low-res pictures are: downscales of the truth, the same spoilt as in training, or Stage I's samples.
HELD_OUT, SPOILT, SAMPLED = "held-out", "spoilt", "stage1"
_SHEETS = {HELD_OUT: (EVAL_SHEET, DETAIL_SHEET), SPOILT: SPOILT_SHEETS}
_TITLES = {HELD_OUT: "Stage II on held-out pictures", SPOILT: "Stage II on held-out pictures, low-res spoilt"}
_COLUMNS = pa.schema(
    [(name, pa.string()) for name in ("low_res", "image_id", "way")]
    + [("noise_level", pa.int64())]
    + [
        (name, pa.float64())
        for name in ("psnr", "ssim", "consistency", "detail", "true_detail", "energy", "colour_shift", "clip", "lpips")
    ]
)
_LEARNED, _LESS_IS_BETTER = ("clip", "lpips"), ("lpips",)
_SHOWN, _CELL_PX = 8, 192  # of the sheets
_DETAIL_PX = 64  # edge of a zoomed window: 16 px of the low-res picture
_FRAME = (255, 0, 160)

# Upscales pictures of one size: the rows they are of, low-res (N, C, h, w) in [-1, 1], noise level -> (N, C, H, W).
Upscaler = Callable[[list[ShardRow], torch.Tensor, int], torch.Tensor]
Spoiler = Callable[[list[ShardRow], torch.Tensor], torch.Tensor]  # of rows, their low-res pictures
Row = dict[str, Any]  # of eval.parquet
# A way and the noise level of its low-res pictures, None for a plain enlargement; its pictures, in the order of the truths.
Made = dict[tuple[str, int | None], list[np.ndarray]]


@dataclass(frozen=True)
class Eyes:
    """Learned measures, as far as a run has weights of one's own for them."""

    clip: ClipEye | None = None
    lpips: LpipsEye | None = None


NO_EYES = Eyes()


def measure_upscalers(
    files: list[Path], upscalers: Mapping[str, Callable[[], Upscaler]], levels: Sequence[int], out: Path,
    samples: Sequence[Row] = (), eyes: Eyes = NO_EYES, spoil: Spoiler | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Measure each upscaler, and plain enlargements, on the pictures of some files; each is made when its turn comes.

    levels: of noise on the low-res picture, 0 to 999, the one of most interest first; plain enlargements have none. Writes
    eval.png and eval_details.png at that one, and eval.parquet with a row for each picture, way and level, and those of
    `measure_samples`. Returns the level as `noise_level`; `upscaled`, the means for each way, and `gain`, by how much the
    last upscaler is better than each other way: mean and, of enough pictures, its 95 % interval. `other_levels` has both of
    each other level, if there is one. With eyes both have what these see, `clip` and `lpips`, and with CLIP's `upscaled` the
    `clip_distance` as well. With `spoil` the same is measured once more at the first level, of low-res pictures that it
    spoilt, with sheets of its own, and returned as `spoilt`; consistency is that with the true low-res picture.
    """
    truth = [(open_shard(file).all(), read_rows(file)) for file in files]  # one file, and one batch, a size
    small = {HELD_OUT: [low_res(to_model_range(torch.from_numpy(pixels))) for pixels, _ in truth]}
    if spoil is not None:
        small[SPOILT] = [spoil(rows, part) for (_, rows), part in zip(truth, small[HELD_OUT], strict=True)]
    at = {HELD_OUT: levels, SPOILT: levels[:1]}
    made: dict[str, dict[tuple[str, int | None], list[torch.Tensor]]] = {
        kind: {(way, None): [to_bytes(enlarged(part, way)) for part in parts] for way in PLAIN}
        for kind, parts in small.items()
    }
    for way, make in upscalers.items():
        upscale = make()
        for kind, parts in small.items():
            for level in at[kind]:
                pairs = zip(truth, parts, strict=True)
                made[kind][way, level] = [to_bytes(upscale(rows, part, level)) for (_, rows), part in pairs]
        del upscale  # and its model, before the next one is loaded
    names = [row.image_id for _, rows in truth for row in rows]
    true, ways = _flat([torch.from_numpy(pixels) for pixels, _ in truth]), [*PLAIN, *upscalers]
    low = {kind: _flat([to_bytes(part) for part in parts]) for kind, parts in small.items()}
    tables: dict[str, list[Row]] = {}
    found = {}
    for kind, parts_of in made.items():
        pictures = {key: _flat(parts) for key, parts in parts_of.items()}
        tables[kind], distances = _table(kind, names, pictures, true, low[HELD_OUT], eyes)
        asked = [(way, row) for (way, level), row in pictures.items() if level in (None, levels[0])]
        sheet = [(label, row[:_SHOWN]) for label, row in [("low-res", low[kind]), *asked, ("truth", true)]]
        _save_sheets(sheet, kind, out)
        found[kind] = _by_level(tables[kind], ways, at[kind], partial(_summary, distances=distances))
    with atomic_path(out / EVAL_FILE) as tmp:
        rows = [row for table in (*tables.values(), samples) for row in table]
        pq.write_table(pa.Table.from_pylist(rows, _COLUMNS), tmp)
    return {**found.pop(HELD_OUT), **found}


def _table(
    kind: str, names: list[str], pictures: Made, true: list[np.ndarray], low: list[np.ndarray], eyes: Eyes
) -> tuple[list[Row], dict[tuple[str, int | None], float | None]]:
    """A row for each of some pictures, by each way; and, with CLIP's eyes, how far each way's set is from the truths.

    low: what the truths' downscales are, whatever the pictures were made of.
    """
    details = [_detail(picture) for picture in true]
    table = [
        _row(kind, name, way, level, _measured(picture, truth, from_, detail))
        for (way, level), made_of in pictures.items()
        for name, picture, truth, from_, detail in zip(names, made_of, true, low, details, strict=True)
    ]
    distances = _seen_by_clip(table, pictures, true, eyes.clip) if eyes.clip else {}
    if eyes.lpips:
        _seen_by_lpips(table, pictures, true, eyes.lpips)
    return table, distances


def measure_samples(
    names: Sequence[str], small: Sequence[torch.Tensor], made: Mapping[tuple[str, int], Sequence[torch.Tensor]],
    levels: Sequence[int],
) -> tuple[list[Row], dict[str, Any]]:  # fmt: skip
    """What upscalers, and plain enlargements, made of Stage I's samples: rows for eval.parquet, and as `measure_upscalers`.

    names: of the samples; small: (C, h, w) each, in [-1, 1]; made: for each way and noise level, (C, 4h, 4w) each.
    `gain` is in consistency.
    """
    of: dict[tuple[str, int | None], Sequence[torch.Tensor]] = {
        (way, None): [enlarged(picture[None], way)[0] for picture in small] for way in PLAIN
    }
    of |= dict(made.items())
    table = [
        _row(SAMPLED, name, way, level, _measured_sample(_bytes(picture), _bytes(from_)))
        for (way, level), pictures in of.items()
        for name, picture, from_ in zip(names, pictures, small, strict=True)
    ]
    return table, _by_level(table, list(dict.fromkeys(way for way, _ in of)), levels, _sample_summary)


def enlarged(small: torch.Tensor, way: str) -> torch.Tensor:
    """A plain enlargement, (N, C, h, w) in [-1, 1] -> (N, C, 4h, 4w). way: bilinear or bicubic."""
    size = (small.shape[-2] * UPSCALE, small.shape[-1] * UPSCALE)
    return F.interpolate(small, size, mode=way, align_corners=False).clamp(-1, 1)


def _row(low_res_of: str, name: str, way: str, level: int | None, measures: dict[str, float]) -> Row:
    return {"low_res": low_res_of, "image_id": name, "way": way, "noise_level": level, **measures}


def _measured(picture: np.ndarray, truth: np.ndarray, low: np.ndarray, true_detail: float) -> dict[str, float]:
    """The measures of one picture, and the detail of both. low: uint8 (h, w, 3), what it was made of."""
    small, blurred = _low_pass(picture)
    return {
        "psnr": psnr(picture, truth),
        "ssim": ssim(picture, truth),
        "consistency": psnr(small, low),
        "detail": detail_energy(picture, blurred),
        "true_detail": true_detail,
        "colour_shift": colour_shift(picture, truth),
    }


def _seen_by_clip(
    table: list[Row], pictures: Made, true: list[np.ndarray], eye: ClipEye
) -> dict[tuple[str, int | None], float | None]:
    """Add to each row what CLIP sees; the table has them in the order of the pictures. Returns how far each set is off."""
    truths, distances, rows = eye(true), {}, iter(table)
    for key, made in pictures.items():
        seen = eye(made)
        distances[key] = set_distance(seen, truths)
        for likeness in alike(seen, truths):
            next(rows)["clip"] = likeness
    return distances


def _seen_by_lpips(table: list[Row], pictures: Made, true: list[np.ndarray], eye: LpipsEye) -> None:
    """Add to each row its picture's distance; the table has them in the order of the pictures."""
    for place, truth in enumerate(true):  # outside, so that a truth is looked at once
        distances = eye([made[place] for made in pictures.values()], truth)
        for row, distance in zip(table[place :: len(true)], distances, strict=True):
            row["lpips"] = distance


def _measured_sample(picture: np.ndarray, low: np.ndarray) -> dict[str, float]:
    small, blurred = _low_pass(picture)
    return {
        "consistency": psnr(small, low),
        "detail": detail_energy(picture, blurred),
        "energy": detail_energy(picture, picture.mean((0, 1))),
        "colour_shift": colour_shift(picture, low),
    }


def _detail(picture: np.ndarray) -> float:
    return detail_energy(picture, _low_pass(picture)[1])


def _low_pass(picture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A picture brought down by four, and enlarged again."""
    small = low_res(to_model_range(torch.from_numpy(picture)[None]))
    return to_bytes(small)[0].numpy(), to_bytes(enlarged(small, "bicubic"))[0].numpy()


def _flat(parts: list[torch.Tensor]) -> list[np.ndarray]:
    return [picture for part in parts for picture in part.numpy()]


def _save_sheets(rows: list[tuple[str, list[np.ndarray]]], kind: str, out: Path) -> None:
    """rows: a label and its pictures, the truth last. A frame in it shows where the zoomed details lie."""
    title, (whole, details) = _TITLES[kind], _SHEETS[kind]
    label, truths = rows[-1]
    corners = [busiest(picture, _low_pass(picture)[1], _edge(picture), UPSCALE) for picture in truths]
    marked = [framed(picture, corner, _edge(picture), _FRAME) for picture, corner in zip(truths, corners, strict=True)]
    shown = [*rows[:-1], (f"{label}, and what is zoomed", marked)]
    save_picture(titled_rows(shown, _CELL_PX, title), out / whole)
    zoomed = [
        (label, [_cut(picture, corner, truth) for picture, corner, truth in zip(row, corners, truths, strict=True)])
        for label, row in rows
    ]
    save_picture(titled_rows(zoomed, _CELL_PX, f"{title}, zoomed: {_DETAIL_PX} px"), out / details)


def _edge(truth: np.ndarray) -> int:
    """Of the zoomed window, px; a very wide picture has no more height."""
    return min(_DETAIL_PX, int(truth.shape[0]), int(truth.shape[1]))


def _cut(picture: np.ndarray, corner: tuple[int, int], truth: np.ndarray) -> np.ndarray:
    """The zoomed window of a picture, whether it has the truth's size or the low-res one's."""
    edge, (top, left) = _edge(truth) * len(picture) // len(truth), (at * len(picture) // len(truth) for at in corner)
    return picture[top : top + edge, left : left + edge]


def _bytes(picture: torch.Tensor) -> np.ndarray:
    return to_bytes(picture[None])[0].numpy()


def _by_level(
    table: list[Row],
    ways: list[str],
    levels: Sequence[int],
    summarise: Callable[[list[Row], list[str]], dict[str, Any]],
) -> dict[str, Any]:
    found = {level: summarise([row for row in table if row["noise_level"] in (None, level)], ways) for level in levels}
    others = {str(level): found[level] for level in levels[1:]}
    return {"noise_level": levels[0], **found[levels[0]], **({"other_levels": others} if others else {})}


def _summary(
    table: list[Row], ways: list[str], distances: Mapping[tuple[str, int | None], float | None]
) -> dict[str, Any]:
    seen = tuple(name for name in _LEARNED if name in table[0])

    def measured(rows: list[Row]) -> dict[str, float | None]:
        names = ("psnr", "ssim", "consistency", "colour_shift", *seen)
        plain = {name: mean([row[name] for row in rows]) for name in names}
        apart = {"clip_distance": distances[rows[0]["way"], rows[0]["noise_level"]]} if distances else {}
        return {**plain, "detail": _share(rows, "true_detail"), **apart}

    of = {way: [row for row in table if row["way"] == way] for way in ways}
    return {"upscaled": {way: measured(rows) for way, rows in of.items()}, "gain": _gain(of, ("psnr", "ssim", *seen))}


def _sample_summary(table: list[Row], ways: list[str]) -> dict[str, Any]:
    def measured(rows: list[Row]) -> dict[str, float | None]:
        plain = {name: mean([row[name] for row in rows]) for name in ("consistency", "colour_shift")}
        return {**plain, "detail_share": _share(rows, "energy")}

    of = {way: [row for row in table if row["way"] == way] for way in ways}
    return {"upscaled": {way: measured(rows) for way, rows in of.items()}, "gain": _gain(of, ("consistency",))}


def _share(rows: list[Row], of: str) -> float | None:
    """The detail of some pictures, as a share of something that they have."""
    there = sum(row[of] for row in rows)
    return round(sum(row["detail"] for row in rows) / there, 4) if there else None


def _gain(of: dict[str, list[Row]], measures: Sequence[str]) -> dict[str, dict[str, list[float]]]:
    """By how much the last way is better than each other one, paired picture by picture."""
    *others, last = of

    def gain(measure: str, way: str) -> list[float]:
        pairs, sign = zip(of[last], of[way], strict=True), -1 if measure in _LESS_IS_BETTER else 1
        more = [sign * (mine[measure] - its[measure]) for mine, its in pairs]
        return [round(value, 4) for value in mean_and_interval(more)]

    return {way: {measure: gain(measure, way) for measure in measures} for way in others}
