"""Stage II measured on the held-out pictures: tuned and untuned beside plain enlargements, all of the same low-res pictures.

The low-res picture is the true one, the antialiased 4x downscale of the held-out crop; seeds follow from the picture. Every
figure is a mean over pictures, and what the tuned model gains on each other way is paired picture by picture, so its
interval does not carry how the pictures differ among themselves.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F

from deepfloyd_core.files import atomic_path
from deepfloyd_core.flavours import UPSCALE
from deepfloyd_core.metrics import colour_shift, detail_energy, mean, mean_and_interval, psnr, ssim
from deepfloyd_core.objective import low_res, to_bytes, to_model_range
from deepfloyd_core.shards import ShardRow, open_shard, read_rows
from deepfloyd_core.sheets import save_picture, titled_rows

EVAL_SHEET, EVAL_FILE = "eval.png", "eval.parquet"
PLAIN = ("bilinear", "bicubic")  # enlargements without a model
_SHOWN = 8

# Upscales pictures of one size: the rows they are of, low-res (N, C, h, w) in [-1, 1], noise level -> (N, C, H, W).
Upscaler = Callable[[list[ShardRow], torch.Tensor, int], torch.Tensor]
Row = dict[str, Any]  # of eval.parquet


def measure_upscalers(
    files: list[Path], upscalers: Mapping[str, Callable[[], Upscaler]], levels: Sequence[int], out: Path
) -> dict[str, Any]:
    """Measure each upscaler, and plain enlargements, on the pictures of some files; each is made when its turn comes.

    levels: of noise on the low-res picture, 0 to 999, the one of most interest first; plain enlargements have none. Writes
    eval.png at that one, and eval.parquet with a row for each picture, way and level. Returns it as `noise_level`;
    `upscaled`, the means for each way, and `gain`, what the last upscaler has more than each other way: mean and, of
    enough pictures, its 95 % interval. `other_levels` has both of each other level, if there is one.
    """
    truth = [(open_shard(file).all(), read_rows(file)) for file in files]  # one file, and one batch, a size
    small = [low_res(to_model_range(torch.from_numpy(pixels))) for pixels, _ in truth]
    made: dict[tuple[str, int | None], list[torch.Tensor]] = {
        (way, None): [to_bytes(enlarged(part, way)) for part in small] for way in PLAIN
    }
    for way, make in upscalers.items():
        upscale = make()
        for level in levels:
            parts = zip(truth, small, strict=True)
            made[way, level] = [to_bytes(upscale(rows, part, level)) for (_, rows), part in parts]
        del upscale  # and its model, before the next one is loaded
    names = [row.image_id for _, rows in truth for row in rows]
    true, low = _flat([torch.from_numpy(pixels) for pixels, _ in truth]), _flat([to_bytes(part) for part in small])
    pictures = {key: _flat(parts) for key, parts in made.items()}
    details = [_detail(picture) for picture in true]
    table = [
        {"image_id": name, "way": way, "noise_level": level, **_measured(picture, truth, from_, detail)}
        for (way, level), made_of in pictures.items()
        for name, picture, truth, from_, detail in zip(names, made_of, true, low, details, strict=True)
    ]
    with atomic_path(out / EVAL_FILE) as tmp:
        pq.write_table(pa.Table.from_pylist(table), tmp)
    asked = [(way, row) for (way, level), row in pictures.items() if level in (None, levels[0])]
    shown = [(label, row[:_SHOWN]) for label, row in [("low-res", low), *asked, ("truth", true)]]
    save_picture(titled_rows(shown, 192, "Stage II on held-out pictures"), out / EVAL_SHEET)
    return _by_level(table, [*PLAIN, *upscalers], levels)


def enlarged(small: torch.Tensor, way: str) -> torch.Tensor:
    """A plain enlargement, (N, C, h, w) in [-1, 1] -> (N, C, 4h, 4w). way: bilinear or bicubic."""
    size = (small.shape[-2] * UPSCALE, small.shape[-1] * UPSCALE)
    return F.interpolate(small, size, mode=way, align_corners=False).clamp(-1, 1)


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


def _detail(picture: np.ndarray) -> float:
    return detail_energy(picture, _low_pass(picture)[1])


def _low_pass(picture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A picture brought down by four, and enlarged again."""
    small = low_res(to_model_range(torch.from_numpy(picture)[None]))
    return to_bytes(small)[0].numpy(), to_bytes(enlarged(small, "bicubic"))[0].numpy()


def _flat(parts: list[torch.Tensor]) -> list[np.ndarray]:
    return [picture for part in parts for picture in part.numpy()]


def _by_level(table: list[Row], ways: list[str], levels: Sequence[int]) -> dict[str, Any]:
    found = {level: _summary([row for row in table if row["noise_level"] in (None, level)], ways) for level in levels}
    others = {str(level): found[level] for level in levels[1:]}
    return {"noise_level": levels[0], **found[levels[0]], **({"other_levels": others} if others else {})}


def _summary(table: list[Row], ways: list[str]) -> dict[str, Any]:
    of = {way: [row for row in table if row["way"] == way] for way in ways}
    *others, last = ways

    def gain(measure: str, way: str) -> list[float]:
        pairs = zip(of[last], of[way], strict=True)
        return [round(value, 4) for value in mean_and_interval([mine[measure] - its[measure] for mine, its in pairs])]

    def measured(rows: list[Row]) -> dict[str, float | None]:
        there = sum(row["true_detail"] for row in rows)
        plain = {name: mean([row[name] for row in rows]) for name in ("psnr", "ssim", "consistency", "colour_shift")}
        return {**plain, "detail": round(sum(row["detail"] for row in rows) / there, 4) if there else None}

    return {
        "upscaled": {way: measured(rows) for way, rows in of.items()},
        "gain": {way: {measure: gain(measure, way) for measure in ("psnr", "ssim")} for way in others},
    }
