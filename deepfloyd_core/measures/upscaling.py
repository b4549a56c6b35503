"""Measures an upscaler on the held-out pictures: tuned and untuned model, bilinear and bicubic, on equal low-res inputs.

The low-res picture is the antialiased 4x downscale of the held-out crop. When a stage degrades low-res pictures in
training, a degraded copy is measured as well. Seeds follow from the picture. Every figure is a mean over pictures. The
tuned model's gain over each other method is paired, picture by picture: its interval does not contain the spread
between pictures.

At inference the low-res picture is a sample of the stage before, which has no ground truth. Then only these are
measured: whether the upscaled picture agrees with the sample, how much fine detail it has, and whether its colour has
shifted. `registry.py` has the table of measures.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from deepfloyd_core.config.stages import STAGES, Stage
from deepfloyd_core.crops.shards import ShardRow, open_shard, read_rows
from deepfloyd_core.diffusion.loss import low_res, to_bytes, to_model_range
from deepfloyd_core.files import atomic_path
from deepfloyd_core.hashing import digest
from deepfloyd_core.measures.comparison import Compared, Picture, enlarged
from deepfloyd_core.measures.figures import LevelFigures, UpscalingFigures
from deepfloyd_core.measures.files import UpscalingFiles
from deepfloyd_core.measures.measure import Against, Enlargement, Measure, MeasureFn, Outputs
from deepfloyd_core.measures.pixel import mean, mean_and_interval
from deepfloyd_core.measures.registry import COLUMNS, measures_against
from deepfloyd_core.measures.upscaling_sheets import save_sheets

PLAIN = ("bilinear", "bicubic")  # interpolation, without a model
# Kinds of low-res pictures: downscales of the ground truth, or these degraded as in training. Those of samples are named
# by the table of the stage that sampled them.
HELD_OUT, SPOILT = "held-out", "spoilt"
_FIELDS = {HELD_OUT: "held_out", SPOILT: "spoilt"}  # of `SamplesSummary`
_SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("low_res", "image_id", "conditions", "way")]
    + [("noise_level", pa.int64())]
    + [(name, pa.float64()) for name in COLUMNS]
)

# Upscales pictures of one size: the rows they are of, low-res (N, C, h, w) in [-1, 1], noise level -> (N, C, H, W).
Upscaler = Callable[[list[ShardRow], torch.Tensor, int], torch.Tensor]
Spoiler = Callable[[list[ShardRow], torch.Tensor], torch.Tensor]  # of rows, their low-res pictures
Row = dict[str, Any]  # of eval.parquet
SetFigures = Mapping[str, Mapping[Enlargement, float | None]]  # of the measures of whole sets, by name


def measure_upscalers(
    files: list[Path], upscalers: Mapping[str, Callable[[], Upscaler]], levels: Sequence[int], out: UpscalingFiles,
    samples: Sequence[Row] = (), looks: Sequence[MeasureFn] = (), spoil: Spoiler | None = None, sampled_with: str = "",
) -> dict[str, UpscalingFigures]:  # fmt: skip
    """Measure each upscaler, and interpolation, on the pictures of some files. Each upscaler is built only when it is used.

    levels: of noise on the low-res picture, 0 to 999, the main one first; interpolation has none. looks: the networks
    that also measure. sampled_with: the sampler's settings, for the column `conditions`: a digest of all that decides a
    held-out picture's row beside model and level. Writes two sheets at the first level, and a table with a row for each
    picture, method and level, and the rows of `measure_samples`. Returns the figures as `held_out`.

    With `spoil` all is measured once more at the first level, on low-res pictures that `spoil` degraded, with sheets of
    its own, and returned as `spoilt`; consistency is then still with the clean low-res picture.
    """
    truth, small = held_out_pictures(files, spoil)
    at = {HELD_OUT: levels, SPOILT: levels[:1]}
    enlargements = _enlargements([rows for _, rows in truth], small, upscalers, at)
    named = [
        (row.image_id, digest(crop.tobytes(), str(crop.shape), row.caption, sampled_with))
        for pixels, rows in truth
        for crop, row in zip(pixels, rows, strict=True)
    ]
    truths, methods = _flat([torch.from_numpy(pixels) for pixels, _ in truth]), [*PLAIN, *upscalers]
    low = {kind: _flat([to_bytes(part) for part in parts]) for kind, parts in small.items()}
    tables: dict[str, list[Row]] = {}
    summaries: dict[str, UpscalingFigures] = {}
    for kind, pictures in enlargements.items():
        outputs = Outputs(pictures, truths)
        tables[kind], of_sets = _table(kind, named, outputs, low[HELD_OUT], looks)
        shown = [(method, part) for (method, level), part in pictures.items() if level in (None, levels[0])]
        sheets = out.spoilt if kind == SPOILT else (out.sheet, out.details)
        title = f"{out.kind.title} on held-out pictures{', low-res degraded' if kind == SPOILT else ''}"
        save_sheets([("low-res", low[kind]), *shown, ("truth", truths)], title, *sheets)
        summary = partial(level_figures, against="truth", of_sets=of_sets)
        summaries[_FIELDS[kind]] = _by_level(tables[kind], methods, at[kind], summary)
    with atomic_path(out.table) as tmp:
        rows = [row for table in (*tables.values(), samples) for row in table]
        pq.write_table(pa.Table.from_pylist(rows, _SCHEMA), tmp)
    return summaries


def held_out_pictures(
    files: list[Path], spoil: Spoiler | None
) -> tuple[list[tuple[np.ndarray, list[ShardRow]]], dict[str, list[torch.Tensor]]]:
    """The ground truths and rows of some files, a batch each; and their low-res pictures by kind: HELD_OUT, SPOILT."""
    truth = [(open_shard(file).all(), read_rows(file)) for file in files]  # one file, and one batch, a size
    small = {HELD_OUT: [low_res(to_model_range(torch.from_numpy(pixels))) for pixels, _ in truth]}
    if spoil is not None:
        small[SPOILT] = [spoil(rows, part) for (_, rows), part in zip(truth, small[HELD_OUT], strict=True)]
    return truth, small


def measure_samples(
    source: Stage, names: Sequence[str], small: Sequence[torch.Tensor],
    upscaled: Mapping[tuple[str, int], Sequence[torch.Tensor]], levels: Sequence[int],
) -> tuple[list[Row], UpscalingFigures]:  # fmt: skip
    """Measure the outputs of upscalers, and of interpolation, for samples of another stage, `source`.

    names: of the samples; small: (C, h, w) each, in [-1, 1]; upscaled: for each method and noise level, (C, 4h, 4w)
    each. Returns rows for the table, and the figures; their `gain` is in consistency.
    """
    pictures: dict[Enlargement, Sequence[torch.Tensor]] = {
        (method, None): [enlarged(picture[None], method)[0] for picture in small] for method in PLAIN
    }
    pictures |= dict(upscaled.items())
    table = []
    for enlargement, part in pictures.items():
        for name, picture, sample in zip(names, part, map(_bytes, small), strict=True):
            compared = Compared(Picture(_bytes(picture)), Picture(sample), sample)
            table.append(_row(STAGES[source].table, name, "", enlargement, measured(compared, "sample")))
    methods = list(dict.fromkeys(method for method, _ in pictures))
    return table, _by_level(table, methods, levels, partial(level_figures, against="sample"))


def measured(compared: Compared, against: Against) -> dict[str, float]:
    """The columns of one picture that need no network."""
    columns: dict[str, float] = {}
    for measure in measures_against(against):
        if measure.compute is not None:
            figure = measure.compute(compared)
            columns |= zip(measure.columns, figure if isinstance(figure, tuple) else (figure,), strict=True)
    return columns


def level_figures(
    table: list[Row], methods: list[str], against: Against, of_sets: SetFigures | None = None
) -> LevelFigures:
    """The mean of each measure by method, and the last method's gain over each other method."""
    sets = of_sets or {}
    by_method = {method: [row for row in table if row["way"] == method] for method in methods}
    measures = [
        measure
        for measure in measures_against(against)
        if (measure.name in sets if measure.of == "set" else table[0].keys() >= {*measure.columns})
    ]
    means = {
        method: {measure.name: _mean(measure, rows, sets) for measure in measures} for method, rows in by_method.items()
    }
    return LevelFigures(upscaled=means, gain=_gain(by_method, [measure for measure in measures if measure.gains]))


def _enlargements(
    rows: list[list[ShardRow]], small: Mapping[str, list[torch.Tensor]],
    upscalers: Mapping[str, Callable[[], Upscaler]], levels: Mapping[str, Sequence[int]],
) -> dict[str, dict[Enlargement, list[np.ndarray]]]:  # fmt: skip
    """The output of each method for each kind of low-res pictures. rows, small: one batch a size; small and levels by
    kind.
    """
    pictures: dict[str, dict[Enlargement, list[np.ndarray]]] = {
        kind: {(method, None): _flat([to_bytes(enlarged(part, method)) for part in parts]) for method in PLAIN}
        for kind, parts in small.items()
    }
    for method, make in upscalers.items():
        upscale = make()
        for kind, parts in small.items():
            for level in levels[kind]:
                batches = [to_bytes(upscale(*batch, level)) for batch in zip(rows, parts, strict=True)]
                pictures[kind][method, level] = _flat(batches)
        del upscale  # and its model, before the next one is loaded
    return pictures


def _table(
    kind: str, named: list[tuple[str, str]], outputs: Outputs, low: list[np.ndarray], looks: Sequence[MeasureFn]
) -> tuple[list[Row], SetFigures]:
    """A row for each picture of each method and level; and the networks' figures of whole sets.

    named: of each picture its id and conditions; low: the ground truths' downscales, whatever the inputs were.
    """
    truths = [Picture(truth) for truth in outputs.truths]
    table = {
        enlargement: [
            _row(kind, *name, enlargement, measured(Compared(Picture(picture), truth, small), "truth"))
            for name, picture, truth, small in zip(named, pictures, truths, low, strict=True)
        ]
        for enlargement, pictures in outputs.pictures.items()
    }
    of_sets: dict[str, Mapping[Enlargement, float | None]] = {}
    for look in looks:
        figures = look(outputs)
        of_sets |= figures.of_sets
        for column, of_pictures in figures.of_pictures.items():
            for enlargement, values in of_pictures.items():
                for row, value in zip(table[enlargement], values, strict=True):
                    row[column] = value
    return [row for rows in table.values() for row in rows], of_sets


def _row(kind: str, name: str, conditions: str, enlargement: Enlargement, columns: dict[str, float]) -> Row:
    method, level = enlargement
    return {"low_res": kind, "image_id": name, "conditions": conditions, "way": method, "noise_level": level, **columns}


def _flat(parts: list[torch.Tensor]) -> list[np.ndarray]:
    return [picture for part in parts for picture in part.numpy()]


def _bytes(picture: torch.Tensor) -> np.ndarray:
    return to_bytes(picture[None])[0].numpy()


def _by_level(
    table: list[Row], methods: list[str], levels: Sequence[int],
    summarise: Callable[[list[Row], list[str]], LevelFigures],
) -> UpscalingFigures:  # fmt: skip
    summaries = {
        level: summarise([row for row in table if row["noise_level"] in (None, level)], methods) for level in levels
    }
    first, *others = levels
    own = summaries[first]
    return UpscalingFigures(
        noise_level=first,
        upscaled=own.upscaled,
        gain=own.gain,
        other_levels={level: summaries[level] for level in others},
    )


def _mean(measure: Measure, rows: list[Row], of_sets: SetFigures) -> float | None:
    """The figure of one method; None if there are too few pictures, or the denominator of a share is zero."""
    if measure.of == "set":
        return of_sets[measure.name][rows[0]["way"], rows[0]["noise_level"]]
    if measure.share is None:
        return mean([row[measure.name] for row in rows])
    part, whole = (sum(row[column] for row in rows) for column in measure.share)
    return round(part / whole, 4) if whole else None


def _gain(by_method: dict[str, list[Row]], measures: Sequence[Measure]) -> dict[str, dict[str, tuple[float, ...]]]:
    """The last method's gain over each other method, paired picture by picture."""
    *others, last = by_method

    def gain(measure: Measure, method: str) -> tuple[float, ...]:
        pairs, sign = zip(by_method[last], by_method[method], strict=True), -1 if measure.better == "less" else 1
        more = [sign * (tuned[measure.name] - other[measure.name]) for tuned, other in pairs]
        return tuple(round(value, 4) for value in mean_and_interval(more))

    return {method: {measure.name: gain(measure, method) for measure in measures} for method in others}
