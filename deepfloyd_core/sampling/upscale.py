"""Upscale: pictures of the user's own through an upscaler alone, of any size, with a version's weights or the base model.

Each picture is sampled by itself, through windows where it is larger than what the stage was trained at, and written as soon
as it is done: a killed job goes on with the first one that is missing.
"""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from deepfloyd_core.config.stages import STAGES, UPSCALE
from deepfloyd_core.diffusion.loss import to_bytes, to_model_range
from deepfloyd_core.files import atomic_path
from deepfloyd_core.models.unet import use_threads
from deepfloyd_core.pictures.decode import decode_rgb
from deepfloyd_core.pictures.faults import Unreadable
from deepfloyd_core.processes.jobs import Job
from deepfloyd_core.sampling.cascade import Sample, sampler_settings, save_png
from deepfloyd_core.sampling.jobs import OwnPicture, UpscaledSummary, UpscaleRequest
from deepfloyd_core.sampling.parts import Parts
from deepfloyd_core.sampling.pictures import INDEX
from deepfloyd_core.sampling.sampler import Sampler, make_sampler, sample_upscaled
from deepfloyd_core.sampling.stored import StoredTexts
from deepfloyd_core.sampling.windows import WindowedUnet
from deepfloyd_core.store.parts import finish_part, part_is_whole

MOST_PX = 1024  # of an edge of a picture that is given
_SCHEMA = pa.schema(
    [
        ("source", pa.string()), ("file", pa.string()), ("prompt", pa.string()), ("width", pa.int32()),
        ("height", pa.int32()), ("left_out", pa.string()),
    ]
)  # fmt: skip


def upscale_pictures(job: Job[UpscaleRequest]) -> UpscaledSummary:
    """Upscale the pictures: a PNG for each, and a table with those that were left out and why."""
    request = job.request
    use_threads(request.machine.num_threads)
    (job.out / ".drawn").mkdir(exist_ok=True)
    undrawn = [one for one in request.pictures if not part_is_whole(job.out / one.file)]
    left_out = {one.name: fault for one in undrawn if (fault := _fault(one))}
    missing = [one for one in undrawn if one.name not in left_out]
    wanted, done = len(request.pictures) - len(left_out), len(request.pictures) - len(undrawn)
    sampled = Parts(job.report, 1).begin("pictures upscaled", wanted, done)
    if missing:
        both = [*(one.prompt for one in request.pictures), request.negative_prompt]
        texts = StoredTexts(both, request, job.out / ".drawn" / "text.safetensors")
        texts.make()
        one = request.upscaler
        sampler = make_sampler(one, request.trained(one.stage), request.machine, sampled, request.loras)
        sampler.pipeline.unet = WindowedUnet(sampler.pipeline.unet)
        for own in missing:
            text, negative = texts.of([own.prompt]), texts.of([request.negative_prompt])
            _keep(job, own, _upscaled(sampler, text, negative, request.seed, _read(own)))
    _write_index(job, left_out)
    return UpscaledSummary(pictures=wanted, left_out=left_out)


def _read(one: OwnPicture) -> Image.Image:
    """Raises Unreadable."""
    return decode_rgb(one.source.checked("is a picture to upscale").read_bytes())


def _fault(one: OwnPicture) -> str:
    """Why a picture cannot be upscaled; empty when it can."""
    try:
        width, height = _read(one).size
    except (OSError, Unreadable) as error:
        return str(error)
    return f"{width}x{height} px, and an edge may have {MOST_PX:,}" if max(width, height) > MOST_PX else ""


def _upscaled(
    sampler: Sampler, text: torch.Tensor, negative: torch.Tensor, seed: int, picture: Image.Image
) -> torch.Tensor:
    """The picture, (1, 3, 4H, 4W) in [-1, 1]. Edges are made to divide as the stage needs by repeating their last pixels."""
    unit = STAGES[sampler.stage].alignment_px // UPSCALE
    small = to_model_range(torch.from_numpy(np.array(picture))[None])
    height, width = small.shape[2:]
    padded = torch.nn.functional.pad(small, (0, -width % unit, 0, -height % unit), mode="replicate")
    made = sample_upscaled(sampler, text, negative, [seed], padded)
    return made[:, :, : height * UPSCALE, : width * UPSCALE]


def _keep(job: Job[UpscaleRequest], one: OwnPicture, made: torch.Tensor) -> None:
    request = job.request
    settings = sampler_settings(request.upscaler, request.negative_prompt)
    settings |= {"model": request.upscaler.settings.model_flavour, "source": one.source.sha256,
                 "bundle": request.bundle.fingerprint if request.bundle else None,
                 **({"loras": [lora.told for lora in request.loras]} if request.loras else {})}  # fmt: skip
    file = job.out / one.file
    save_png(to_bytes(made)[0].numpy(), Sample(one.prompt, request.seed, request.version, settings), file)
    finish_part(file)


def _write_index(job: Job[UpscaleRequest], left_out: dict[str, str]) -> None:
    rows = []
    for one in job.request.pictures:
        size: tuple[int | None, int | None] = (None, None)
        if one.name not in left_out:
            with Image.open(job.out / one.file) as picture:
                size = picture.size
        rows.append({"source": one.name, "file": one.file if size[0] else None, "prompt": one.prompt, "width": size[0],
                     "height": size[1], "left_out": left_out.get(one.name)})  # fmt: skip
    with atomic_path(job.out / INDEX) as tmp:
        pq.write_table(pa.Table.from_pylist(rows, _SCHEMA), tmp)
