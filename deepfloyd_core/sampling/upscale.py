"""Upscale: pictures of the user's own through an upscaler alone, of any size: Stage II, with a version's weights or the base
model, or Stage III.

Each picture is sampled by itself, through windows where it is larger than what the stage was trained at, and written as soon
as it is done: a killed job goes on with the first one that is missing. A picture whose canvas does not fit into the device's
memory is left out: all memory, not what is free, so that the same pictures are left out the next time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from deepfloyd_core.config.stage3 import STAGE3
from deepfloyd_core.config.stages import STAGES, UPSCALE
from deepfloyd_core.diffusion.loss import to_bytes, to_model_range
from deepfloyd_core.files import atomic_path
from deepfloyd_core.models.memory import Forecast, device_bytes
from deepfloyd_core.models.torch_device import pick_device
from deepfloyd_core.models.unet import use_threads
from deepfloyd_core.pictures.decode import decode_rgb, read_header
from deepfloyd_core.pictures.faults import Unreadable
from deepfloyd_core.processes.jobs import Job, JobRequest
from deepfloyd_core.sampling.cascade import Sample, sampler_settings, save_png
from deepfloyd_core.sampling.forecasts import (
    MOST_SHARE,
    canvas_bytes,
    pictures_at_once,
    stage3_forecast,
    with_canvas,
)
from deepfloyd_core.sampling.parts import Parts, Sampled
from deepfloyd_core.sampling.pictures import INDEX, Size
from deepfloyd_core.sampling.sampler import Sampler, make_sampler, sample_upscaled
from deepfloyd_core.sampling.stage3 import make_enlarger
from deepfloyd_core.sampling.stored import StoredTexts
from deepfloyd_core.sampling.upscale_jobs import (
    EnlargeRequest,
    OwnPicture,
    OwnPictures,
    UpscaledSummary,
    UpscaleRequest,
)
from deepfloyd_core.sampling.windows import WINDOW_PX, WindowedUnet
from deepfloyd_core.store.parts import finish_part, part_is_whole
from deepfloyd_core.types import Json

R = TypeVar("R", bound=JobRequest[Any])
_SCHEMA = pa.schema(
    [
        ("source", pa.string()), ("file", pa.string()), ("prompt", pa.string()), ("width", pa.int32()),
        ("height", pa.int32()), ("left_out", pa.string()),
    ]
)  # fmt: skip


def upscale_pictures(job: Job[UpscaleRequest]) -> UpscaledSummary:
    """Upscale the pictures: a PNG for each, and a table with those that were left out and why."""
    return _each(job, job.request, _upscaler_memory, _upscaler)


def enlarge_pictures(job: Job[EnlargeRequest]) -> UpscaledSummary:
    """The same with Stage III."""
    return _each(job, job.request, _enlarger_memory, _enlarger)


@dataclass(frozen=True)
class _Upscaler:
    """A model that is loaded."""

    version: str  # empty: it has none
    settings: Json  # that its PNGs record
    upscale: Callable[[OwnPicture, Image.Image], np.ndarray]  # -> uint8 (4H, 4W, 3)


@dataclass(frozen=True)
class _Memory:
    """What a model takes."""

    windows: Callable[[list[Size]], Forecast | None]  # for pictures of these sizes, before they are upscaled
    canvas: Callable[[Size], int]  # bytes of one of them, beside


def _each(
    job: Job[R], request: OwnPictures, memory: Callable[[R], _Memory], load: Callable[[Job[R], Sampled], _Upscaler]
) -> UpscaledSummary:
    """memory, load: of the model, if there is a picture for it. request: the job's own."""
    use_threads(job.request.machine.num_threads)
    undrawn = [one for one in request.pictures if not part_is_whole(job.out / one.file)]
    sizes, left_out, takes = dict[str, Size](), dict[str, str](), memory(job.request)
    room = int(MOST_SHARE * device_bytes(pick_device(job.request.machine.device)))
    for one in undrawn:
        try:
            sizes[one.name] = _size(one, takes.canvas, room)
        except (OSError, Unreadable) as error:
            left_out[one.name] = str(error)
    missing = [one for one in undrawn if one.name in sizes]
    wanted, done = len(request.pictures) - len(left_out), len(request.pictures) - len(undrawn)
    told = None
    if missing:
        told = with_canvas(takes.windows(list(sizes.values())), max(map(takes.canvas, sizes.values())))
    sampled = Parts(job.report, 1).begin("pictures upscaled" + (f", with {told}" if told else ""), wanted, done)
    upscaler = load(job, sampled) if missing else None
    for own in missing:
        assert upscaler is not None
        file, settings = job.out / own.file, upscaler.settings | {"source": own.source.sha256}
        made = upscaler.upscale(own, decode_rgb(_bytes(own)))
        save_png(made, Sample(own.prompt, request.seed, upscaler.version, settings), file)
        finish_part(file)
    _write_index(job.out, request, left_out)
    return UpscaledSummary(pictures=wanted, left_out=left_out)


def _upscaler_memory(request: UpscaleRequest) -> _Memory:
    one = request.upscaler

    def windows(sizes: list[Size]) -> Forecast | None:
        window = max(min(max(size) * UPSCALE, WINDOW_PX) for size in sizes)
        return pictures_at_once(one, [(window, window)], request.machine, most=1)[1]

    return _Memory(windows, lambda size: canvas_bytes(one.stage, size, one.settings.validation_guidance))


def _enlarger_memory(request: EnlargeRequest) -> _Memory:
    """Its canvas is the same whatever the guidance is."""
    return _Memory(
        lambda sizes: stage3_forecast(request.stage3, sizes, request.machine),
        lambda size: canvas_bytes(STAGE3, size, 1.0),
    )


def _upscaler(job: Job[UpscaleRequest], sampled: Sampled) -> _Upscaler:
    """With the upscaler of the cascade, through windows."""
    request, one = job.request, job.request.upscaler
    texts = StoredTexts(request, job.out)
    sampler = make_sampler(one, request.trained(one.stage), request.machine, sampled, request.loras)
    sampler.pipeline.unet = WindowedUnet(sampler.pipeline.unet)
    settings = sampler_settings(one, request.negative_prompt)
    settings |= {"model": one.settings.model_flavour,
                 "bundle": request.bundle.fingerprint if request.bundle else None,
                 **({"loras": [lora.told for lora in request.loras]} if request.loras else {})}  # fmt: skip

    def upscale(own: OwnPicture, picture: Image.Image) -> np.ndarray:
        text, negative = texts.of([own.prompt]), texts.of([request.negative_prompt])
        return to_bytes(_upscaled(sampler, text, negative, request.seed, picture))[0].numpy()

    return _Upscaler(request.version, settings, upscale)


def _enlarger(job: Job[EnlargeRequest], sampled: Sampled) -> _Upscaler:
    """With Stage III."""
    request = job.request
    enlarge = make_enlarger(request.stage3, request.machine, sampled)

    def upscale(own: OwnPicture, picture: Image.Image) -> np.ndarray:
        return enlarge(_small(picture), own.prompt, request.negative_prompt, request.seed)

    return _Upscaler("", request.stage3.recorded(request.negative_prompt), upscale)


def _bytes(one: OwnPicture) -> bytes:
    return one.source.checked("is a picture to upscale").read_bytes()


def _size(one: OwnPicture, canvas: Callable[[Size], int], room: int) -> Size:
    """Of a picture. Raises Unreadable or OSError for one that cannot be upscaled. room: bytes."""
    data = _bytes(one)
    size = read_header(data).size  # first: a damaged file may say that it is huge
    if (needed := canvas(size)) > room:
        raise Unreadable(
            "too_large",
            f"{size[0]}x{size[1]} px take {needed / 1e9:.1f} GB to make four times as wide and high, of {room / 1e9:.1f} GB "
            "that may be used here: make it smaller first",
        )
    return decode_rgb(data).size


def _small(picture: Image.Image) -> torch.Tensor:
    """(1, 3, H, W) in [-1, 1]."""
    return to_model_range(torch.from_numpy(np.array(picture))[None])


def _upscaled(
    sampler: Sampler, text: torch.Tensor, negative: torch.Tensor, seed: int, picture: Image.Image
) -> torch.Tensor:
    """The picture, (1, 3, 4H, 4W) in [-1, 1]. Edges are made to divide as the stage needs by repeating their last pixels."""
    unit = STAGES[sampler.stage].alignment_px // UPSCALE
    small = _small(picture)
    height, width = small.shape[2:]
    padded = torch.nn.functional.pad(small, (0, -width % unit, 0, -height % unit), mode="replicate")
    made = sample_upscaled(sampler, text, negative, [seed], padded)
    return made[:, :, : height * UPSCALE, : width * UPSCALE]


def _write_index(out: Path, request: OwnPictures, left_out: dict[str, str]) -> None:
    rows = []
    for one in request.pictures:
        size: tuple[int | None, int | None] = (None, None)
        if one.name not in left_out:
            with Image.open(out / one.file) as picture:
                size = picture.size
        rows.append({"source": one.name, "file": one.file if size[0] else None, "prompt": one.prompt, "width": size[0],
                     "height": size[1], "left_out": left_out.get(one.name)})  # fmt: skip
    with atomic_path(out / INDEX) as tmp:
        pq.write_table(pa.Table.from_pylist(rows, _SCHEMA), tmp)
