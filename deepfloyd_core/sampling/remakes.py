"""Stage I's remakes of an upscaler's low-res pictures: inputs as at inference, for crops whose ground truth is known.

At inference Stage II upscales Stage I's samples; in training it upscales clean downscales. A remake is such a downscale
with noise added, then sampled again by the Stage I that the run trained, with the crop's own caption (SDEdit, Meng et
al. 2022; `IFImg2ImgPipeline`). It still shows the crop, with the errors of a Stage I sample. Each crop is remade once,
with the share `low_res_stage1_strength` of the steps of a sample.

Row n of the remakes' list of rows belongs to row n of the pixels' list. The remakes' shards are cut from that list
alone: how the pixels are cut into shards depends on earlier versions.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from deepfloyd_core.config.stages import UPSCALE, Stage
from deepfloyd_core.crops.pixels import SHEET, SHEET_CELL_PX
from deepfloyd_core.crops.plan import by_size
from deepfloyd_core.crops.reader import Crops, Size, crops_of
from deepfloyd_core.crops.rows import ROWS_FILE, pixels_of, read_row_list, shard_files, write_moved_row_list
from deepfloyd_core.crops.shards import PIXELS_SUM, ShardRow, read_rows, write_shard
from deepfloyd_core.diffusion.loss import low_res, to_bytes, to_model_range
from deepfloyd_core.hashing import hash_seed
from deepfloyd_core.models.unet import use_threads
from deepfloyd_core.pictures.sheets import contact_sheet, save_picture
from deepfloyd_core.processes.jobs import Job
from deepfloyd_core.sampling.jobs import LowResSummary, RemakeRequest
from deepfloyd_core.sampling.parts import counted
from deepfloyd_core.sampling.sampler import Sampler, Start, make_sampler, sample_from_text
from deepfloyd_core.store.artifacts import Artifact
from deepfloyd_core.store.parts import finish_part, part_is_whole
from deepfloyd_core.text.embeds import Embeds

SHARD_ROWS = 512  # 6 MiB of 64 px; a kill costs at most so many samples
SHEET_PAIRS = 16
METHOD = "stage1"  # in the column with the resize method of a crop


@dataclass(frozen=True)
class _Part:
    """One shard to make: which rows of the pixels' list, all of one size."""

    name: str
    size: Size  # of the pixels
    numbers: np.ndarray  # int64, ascending


def remake_low_res(job: Job[RemakeRequest]) -> LowResSummary:
    """Remake the low-res picture of every row of the pixels, resuming at the first unfinished shard."""
    use_threads(job.request.machine.num_threads)
    pixels = job.request.inputs.pixels
    rows = read_row_list(pixels.path)
    parts = list(_parts(rows, job.request.upscaler))
    todo = [part for part in parts if not part_is_whole(job.out / part.name)]
    if todo:
        _make(job, pixels, rows, todo)
    _write_list(rows, parts, job.out)
    _save_sheet(pixels, [job.out / part.name for part in parts], job.out)
    return LowResSummary(
        shards=len(parts),
        rows=len(rows),
        sizes=tuple(dict.fromkeys(f"{part.size[0] // UPSCALE}x{part.size[1] // UPSCALE}" for part in parts)),
        sampled_by_this_process=sum(len(part.numbers) for part in todo),
    )


def true_low_res(crops: Crops, size: Size, numbers: np.ndarray) -> torch.Tensor:
    """The input of a remake: the downscales of some crops of one size, float32 (B, C, h, w) in [-1, 1]."""
    return low_res(to_model_range(crops.take(size, numbers)))


def remake_seed(seed: int, row: ShardRow) -> int:
    """The seed of a crop's remake; it does not depend on the other remakes."""
    return hash_seed("low-res of stage 1", seed, row.image_id, row.repeat)


def _parts(rows: pa.Table, stage: Stage) -> Iterator[_Part]:
    """The shards, in the order of their numbers."""
    number = 0
    for size, own in by_size(rows):
        places = np.flatnonzero(own)
        for start in range(0, len(places), SHARD_ROWS):
            yield _Part(f"stage{stage}-{number:06d}.parquet", size, places[start : start + SHARD_ROWS])
            number += 1


def _make(job: Job[RemakeRequest], pixels: Artifact, rows: pa.Table, todo: list[_Part]) -> None:
    """Make shards, each finished on its own."""
    done, request = len(rows) - sum(len(part.numbers) for part in todo), job.request
    sampled = counted(job.report, len(rows), "low-res pictures remade by Stage I", done)
    files, crops, embeds = shard_files(pixels), crops_of(pixels), Embeds(request.inputs.text_embeds)
    sampler = make_sampler(request.source, request.inputs.stage1_lora.path, request.machine, sampled)
    for part in todo:
        width, height = part.size[0] // UPSCALE, part.size[1] // UPSCALE
        known = _shard_rows(files, rows, part.numbers)
        made: list[np.ndarray] = []
        batch = request.source.settings.sampled_at_once
        for start in range(0, len(known), batch):  # of all at once, text alone would take some hundred MB
            own = slice(start, start + batch)
            small = true_low_res(crops, part.size, part.numbers[own])
            made += list(_remade(request, sampler, embeds, known[own], small))
        own_rows = [replace(row, width=width, height=height, method=METHOD) for row in known]
        write_shard(job.out / part.name, own_rows, made)
        finish_part(job.out / part.name)


def _remade(
    request: RemakeRequest, sampler: Sampler, embeds: Embeds, rows: list[ShardRow], small: torch.Tensor
) -> np.ndarray:
    """The remakes of low-res pictures of one size, uint8 (B, h, w, 3)."""
    negative = embeds.of(request.negative_prompt)
    text = torch.stack([embeds[row.caption_id] for row in rows])
    seeds = [remake_seed(request.seed, row) for row in rows]
    size, start = (small.shape[3], small.shape[2]), Start(small, request.strength)
    return to_bytes(sample_from_text(sampler, text, negative.expand_as(text), seeds, size, start=start)).numpy()


def _shard_rows(files: list[Path], rows: pa.Table, numbers: np.ndarray) -> list[ShardRow]:
    """The columns of some rows of the list, from the pixels' shards."""
    chosen = rows.select(["file", "place"]).take(numbers).to_pylist()
    known = {file: read_rows(files[file]) for file in {row["file"] for row in chosen}}
    return [known[row["file"]][row["place"]] for row in chosen]


def _write_list(rows: pa.Table, parts: list[_Part], out: Path) -> None:
    """The pixels' rows in their order, each with its place here."""
    file, place = np.empty(len(rows), np.int32), np.empty(len(rows), np.int32)
    starts, sums, first = pixels_of([out / part.name for part in parts])
    for number, part in enumerate(parts):
        file[part.numbers], place[part.numbers] = number, np.arange(len(part.numbers))
    changed = {name: rows[name].to_numpy() // UPSCALE for name in ("width", "height")}
    changed |= {"start": starts[first[file] + place], PIXELS_SUM: sums[first[file] + place]}
    write_moved_row_list(rows, {"file": file, "place": place, **changed}, out / ROWS_FILE)


def _save_sheet(pixels: Artifact, files: list[Path], out: Path) -> None:
    """The first true low-res pictures, each with its remake on the right."""
    rows, true, made = read_row_list(out), crops_of(pixels), Crops(read_row_list(out), files)
    shown = []
    for number, row in enumerate(rows.slice(0, SHEET_PAIRS).to_pylist()):
        size, own = (row["width"], row["height"]), np.array([number])
        large = (size[0] * UPSCALE, size[1] * UPSCALE)
        shown += [to_bytes(true_low_res(true, large, own))[0].numpy(), made.take(size, own)[0].numpy()]
    save_picture(contact_sheet(shown, 8, SHEET_CELL_PX), out / SHEET)
