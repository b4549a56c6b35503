"""Generate: samples pictures with every stage of a run, with the trained weights of a version or with the base models.

A stage is drawn in batches, and each picture is written as soon as its batch is done: a killed job goes on with the first
batch that is missing. On a CPU a batch is one picture, because the rounding of a matrix product follows its size: so a
picture has the same bytes whatever is drawn beside it.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from deepfloyd_core.adapters.controlnet import control_of
from deepfloyd_core.config.stage3 import SOURCE, STAGE3, DrawnStage, title_of
from deepfloyd_core.config.stages import STAGES, Stage
from deepfloyd_core.diffusion.conditioning import as_conditioning, conditioning_picture
from deepfloyd_core.diffusion.loss import to_bytes, to_model_range
from deepfloyd_core.errors import ModelError
from deepfloyd_core.files import atomic_path
from deepfloyd_core.models.memory import Forecast
from deepfloyd_core.models.unet import use_threads
from deepfloyd_core.pictures.decode import read_fitted, read_mask
from deepfloyd_core.processes.jobs import Job
from deepfloyd_core.sampling.cascade import Sample, sampler_settings, save_png
from deepfloyd_core.sampling.comparison import save_sheet, version_words
from deepfloyd_core.sampling.forecasts import pictures_at_once, stage3_forecast
from deepfloyd_core.sampling.jobs import (
    GeneratedSummary,
    GeneratePartRequest,
    GenerateRequest,
    GeneratesPictures,
    PartDrawn,
    SampledStage,
)
from deepfloyd_core.sampling.parts import Parts
from deepfloyd_core.sampling.pictures import INDEX, Size, batches, picture_file, picture_scale
from deepfloyd_core.sampling.sampler import Sampler, Start, make_sampler, sample
from deepfloyd_core.sampling.stage3 import make_enlarger
from deepfloyd_core.sampling.stage3_jobs import Stage3
from deepfloyd_core.sampling.stored import DRAWN, StoredTexts, store_tensor, stored_tensor
from deepfloyd_core.sampling.styled import StyledUnet
from deepfloyd_core.store.parts import finish_part, part_is_whole
from deepfloyd_core.types import Json

_Job = Job[GeneratesPictures[Any]]
_SCHEMA = pa.schema(
    [
        ("file", pa.string()), ("stage", pa.int8()), ("prompt", pa.string()), ("negative_prompt", pa.string()),
        ("seed", pa.int64()), ("width", pa.int32()), ("height", pa.int32()), ("version", pa.string()),
        ("loras", pa.list_(pa.string())),
    ]
)  # fmt: skip


def generate_pictures(job: Job[GenerateRequest]) -> GeneratedSummary:
    """Draw the pictures: a PNG for each stage and picture, a table of them, and a sheet of those of the last stage."""
    request, stages = job.request, _stages(job)
    use_threads(request.machine.num_threads)
    _draw_all(job, dict.fromkeys(stages, range(len(request.pictures))))
    _write_index(job)
    loras = dict.fromkeys(lora.told for lora in request.drawn_from.loras)
    drawn_by = " and ".join([version_words(request.version), *loras])
    drawn_by += f" in the style of {request.drawn_from.style}" if request.drawn_from.style else ""
    save_sheet(request.pictures, job.out, _scale(job, stages[-1]), drawn_by)
    return GeneratedSummary(pictures=len(request.pictures), stages=stages)


def generate_part(job: Job[GeneratePartRequest]) -> PartDrawn:
    """Draw every nth batch of each stage, and what its pictures are drawn from, and nothing else, as one of n processes."""
    use_threads(job.request.machine.num_threads)
    _draw_all(job, _share(job))
    return PartDrawn()


def _share(job: Job[GeneratePartRequest]) -> dict[DrawnStage, Collection[int]]:
    """The pictures of each stage that a part draws. Those of one stage are drawn from those of the stage before: where the
    batches of two stages do not fit together, two parts draw the same batch, with the same bytes.
    """
    request, shares = job.request, dict[DrawnStage, Collection[int]]()
    wanted = set[int]()
    for stage in reversed(_stages(job)):
        one = next((one for one in request.cascade.stages if one.stage == stage), None)
        groups = batches(request.pictures, 1 if one is None else _at_once(job, one)[0])
        own = groups[request.number :: request.parts]
        wanted = {number for group in groups if group in own or not wanted.isdisjoint(group) for number in group}
        shares[stage] = wanted
    return shares


def _draw_all(job: _Job, shares: Mapping[DrawnStage, Collection[int]]) -> None:
    """Draw what each stage lacks. shares: the pictures of each stage."""
    request = job.request
    parts, texts = Parts(job.report, len(shares)), StoredTexts(request, job.out)
    for one in request.cascade.stages:
        _draw(job, one, texts, parts, shares[one.stage])
    if request.stage3 is not None:
        _enlarge(job, request.stage3, parts, shares[STAGE3])


def _stages(job: _Job) -> tuple[DrawnStage, ...]:
    """The stages that draw."""
    stages: tuple[DrawnStage, ...] = tuple(one.stage for one in job.request.cascade.stages)
    return stages if job.request.stage3 is None else (*stages, STAGE3)


def _draw(job: _Job, one: SampledStage, texts: StoredTexts, parts: Parts, share: Collection[int]) -> None:
    """Draw what a stage lacks of some pictures."""
    request, pictures = job.request, job.request.pictures
    undrawn = {number for number in share if not _is_drawn(job, one.stage, number)}
    at_once, forecast = _at_once(job, one) if undrawn else (1, None)
    missing = [group for group in batches(pictures, at_once) if not undrawn.isdisjoint(group)]
    done = len(share) - sum(map(len, missing))
    sampled = parts.begin(_told(one.stage, forecast), len(share), done)
    if not missing:
        return
    loras = request.drawn_from.of_stage(one.stage)
    sampler = make_sampler(one, request.trained(one.stage), request.machine, sampled, loras, job.gpu)
    if request.drawn_from.style is not None:
        style, styled = texts.of([request.drawn_from.style]), STAGES[one.stage].style_share
        sampler.pipeline.unet = StyledUnet(sampler.pipeline.unet, style, styled)
    hint, start = cache(partial(_conditioning, job, sampler)), cache(partial(_start, job, one.stage))
    for group in missing:
        batch = [pictures[number] for number in group]
        made = sample(
            sampler, texts.of([each.prompt for each in batch]), texts.of([each.negative_prompt for each in batch]),
            [each.seed for each in batch], batch[0].size, _given(job, one.stage, group, hint),
            _repeated(start(batch[0].size), len(batch)),
        )  # fmt: skip
        for number, picture in zip(group, made, strict=True):
            _keep(job, one, number, picture)


def _at_once(job: _Job, one: SampledStage) -> tuple[int, Forecast | None]:
    styled = job.request.drawn_from.style is not None
    return pictures_at_once(one, _sizes(job, one.stage), job.request.machine, styled, gpu=job.gpu)


def _sizes(job: _Job, stage: Stage) -> set[Size]:
    """Of a stage's pictures."""
    scale = _scale(job, stage)
    return {(width * scale, height * scale) for width, height in (one.size for one in job.request.pictures)}


def _told(stage: DrawnStage, forecast: Forecast | None) -> str:
    return f"{title_of(stage)}'s pictures" + (f", with {forecast}" if forecast else "")


def _enlarge(job: _Job, stage3: Stage3, parts: Parts, share: Collection[int]) -> None:
    """Draw what Stage III lacks of some pictures, one at a time."""
    request, pictures = job.request, job.request.pictures
    missing = [number for number in sorted(share) if not _is_drawn(job, STAGE3, number)]
    forecast = stage3_forecast(stage3, _sizes(job, SOURCE), request.machine, job.gpu) if missing else None
    sampled = parts.begin(_told(STAGE3, forecast), len(share), len(share) - len(missing))
    if not missing:
        return
    enlarge = make_enlarger(stage3, request.machine, sampled, job.gpu)
    for number in missing:
        one = pictures[number]
        small = stored_tensor(_state(job, SOURCE, number))[None]
        made = enlarge(small, one.prompt, one.negative_prompt, one.seed)
        _write(job, STAGE3, number, stage3.recorded(one.negative_prompt), made)


def _given(
    job: _Job, stage: Stage, group: list[int], hint: Callable[[Size], torch.Tensor | None]
) -> torch.Tensor | None:
    """What a batch is sampled from beside the text: an upscaler's low-res pictures (N, 3, H, W) in [-1, 1], a ControlNet's
    conditioning in [0, 1].
    """
    source = STAGES[stage].upscales
    if source is not None:
        return torch.stack([stored_tensor(_state(job, source, number)) for number in group])
    found = hint(job.request.pictures[group[0]].size)
    return None if found is None else found.expand(len(group), -1, -1, -1)


def _start(job: _Job, stage: Stage, small: Size) -> Start | None:
    """The user's own picture at a stage's size; None: pictures start from noise. small: the size of the first stage."""
    asked, scale = job.request.drawn_from.start, _scale(job, stage)
    if asked is None or not STAGES[stage].starts_from_picture(job.request.drawn_from.style is not None):
        return None
    size = (small[0] * scale, small[1] * scale)
    fitted = read_fitted(asked.image.checked("is the picture to start from"), size)
    pictures = to_model_range(torch.from_numpy(np.array(fitted))[None])
    mask = None if asked.mask is None else read_mask(asked.mask.checked("is the mask"), size)
    return Start(pictures, asked.strength, None if mask is None else torch.from_numpy(mask)[None, None])


def _repeated(start: Start | None, count: int) -> Start | None:
    """The same picture for each of a batch."""
    return start and replace(start, pictures=start.pictures.expand(count, -1, -1, -1))


def _is_drawn(job: _Job, stage: DrawnStage, number: int) -> bool:
    file = job.out / picture_file(job.request.pictures, number, _scale(job, stage))
    return part_is_whole(file) and (not _is_upscaled(job, stage) or part_is_whole(_state(job, stage, number)))


def _is_upscaled(job: _Job, stage: DrawnStage) -> bool:
    """Whether another stage takes the pictures of this one."""
    if job.request.stage3 is not None and stage == SOURCE:
        return True
    return any(STAGES[one.stage].upscales == stage for one in job.request.cascade.stages)


def _state(job: _Job, stage: DrawnStage, number: int) -> Path:
    """The picture as the next stage takes it, which is not rounded to bytes."""
    return job.out / DRAWN / f"stage{stage}-{number}.safetensors"


def _scale(job: _Job, stage: DrawnStage) -> int:
    return picture_scale(stage, job.request.cascade.stages[0].stage)


def _conditioning(job: _Job, sampler: Sampler, size: Size) -> torch.Tensor | None:
    """The conditioning of pictures of a size, (1, 3, H, W) in [0, 1]; also written beside them for people. None: they follow
    no picture.
    """
    request, control = job.request, job.request.drawn_from.control
    if control is None:
        return None
    controlnet = control_of(sampler.pipeline.unet)
    assert controlnet is not None  # the flow saw to it
    fitted = torch.from_numpy(np.array(read_fitted(control.checked("is the conditioning picture"), size)))[None]
    if controlnet.conditioning == "paired":
        hint = as_conditioning(fitted)
    else:
        hint = conditioning_picture(controlnet.conditioning, to_model_range(fitted))
    settings = {"conditioning": controlnet.conditioning, "picture": control.sha256}
    file = job.out / f"conditioning-{size[0]}x{size[1]}.png"
    if not file.exists():
        save_png(to_bytes(hint * 2 - 1)[0].numpy(), Sample("", 0, request.version, settings), file)
    return hint


def _keep(job: _Job, one: SampledStage, number: int, made: torch.Tensor) -> None:
    """Keep a picture (3, H, W) in [-1, 1]: for people, and for the next stage."""
    request = job.request
    picture, bundle = request.pictures[number], request.bundle
    if not made.isfinite().all():
        title = STAGES[one.stage].title
        raise ModelError(
            f"{title} gave values that are not finite for {picture.prompt!r}. Look at its weights and --lora."
        )
    loras = request.drawn_from.of_stage(one.stage)
    settings = sampler_settings(one, picture.negative_prompt)
    settings |= {
        "model": one.settings.model_flavour,
        "lora": bundle.inputs.get(f"stage{one.stage}_lora") if bundle else None,
        **({"loras": [lora.told for lora in loras]} if loras else {}),
    }
    if _is_upscaled(job, one.stage):  # first: a picture that is recorded as whole is never drawn again
        store_tensor(made, _state(job, one.stage, number))
    _write(job, one.stage, number, settings, to_bytes(made[None])[0].numpy())


def _write(job: _Job, stage: DrawnStage, number: int, settings: Json, made: np.ndarray) -> None:
    """Write a picture (H, W, 3) for people. settings: those of the stage."""
    request = job.request
    picture, bundle, given = request.pictures[number], request.bundle, request.drawn_from
    settings = settings | {
        "bundle": bundle.fingerprint if bundle else None,
        "size": list(picture.size),
        "drawn_with": request.drawn_with,
        **({"strength": given.start.strength} if given.start else {}),
        **({"style": given.style} if given.style else {}),
    }
    file = job.out / picture_file(request.pictures, number, _scale(job, stage))
    save_png(made, Sample(picture.prompt, picture.seed, request.version, settings), file)
    finish_part(file)


def _write_index(job: _Job) -> None:
    request, rows = job.request, []
    for stage in _stages(job):
        scale = _scale(job, stage)
        loras = [lora.told for lora in request.drawn_from.loras if lora.stage == stage]
        for number, picture in enumerate(request.pictures):
            width, height = (edge * scale for edge in picture.size)
            rows.append({
                "file": picture_file(request.pictures, number, scale), "stage": stage, "prompt": picture.prompt,
                "negative_prompt": picture.negative_prompt, "seed": picture.seed, "width": width, "height": height,
                "version": request.version, "loras": loras,
            })  # fmt: skip
    with atomic_path(job.out / INDEX) as tmp:
        pq.write_table(pa.Table.from_pylist(rows, _SCHEMA), tmp)
