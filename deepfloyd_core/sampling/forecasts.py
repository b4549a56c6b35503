"""How much memory a stage will take, said before it is loaded, and how many of its pictures are sampled at once.

A picture that is upscaled through windows has a canvas beside them, whose bytes grow with its pixels.
"""

from collections.abc import Iterable
from pathlib import Path

from deepfloyd_core.config.run_machine import Machine
from deepfloyd_core.config.stage3 import STAGE3, TITLE, DrawnStage
from deepfloyd_core.config.stages import STAGES, UPSCALE
from deepfloyd_core.errors import ModelError
from deepfloyd_core.models.headers import UNET_WEIGHTS, weight_files
from deepfloyd_core.models.memory import (
    Forecast,
    encoder_forecast,
    free_bytes,
    text_forecast,
    unet_forecast,
    vae_forecast,
)
from deepfloyd_core.models.text_encoders import TEXT_ENCODERS
from deepfloyd_core.models.torch_device import pick_device
from deepfloyd_core.models.unet import DTYPES
from deepfloyd_core.sampling.jobs import SampledStage
from deepfloyd_core.sampling.pictures import Size
from deepfloyd_core.sampling.stage3_jobs import Stage3
from deepfloyd_core.sampling.texts_jobs import TextsRequest
from deepfloyd_core.sampling.windows import WINDOW_PX

SAID_FROM = 500_000_000  # bytes of a UNet's file: a smaller one is loaded before it can be forecast
MOST_SHARE = 0.9  # of a GPU's memory: its allocator and its kernels need some
# Bytes of a canvas for each pixel that is made, in fp32, at most, counted by `models.memory.Counted`: of Stage II without
# guidance and with it (UniPC; DDPM takes 140 and 218); of Stage III, which samples latents, 31, and numpy's copies.
_CANVAS = {False: 206, True: 278}
_DECODED = 40


def pictures_at_once(
    one: SampledStage, sizes: Iterable[Size], machine: Machine, styled: bool = False, most: int | None = None,
    gpu: int = 0,
) -> tuple[int, Forecast | None]:  # fmt: skip
    """How many pictures a stage samples at once, and what that takes; None: little. sizes: of the stage. styled: in
    another style, for which a call of the UNet has a third sample of each picture. most: else the stage's own. gpu: as in
    `Job`.

    On a CPU it is one, because the rounding of a matrix product follows its size. Raises ModelError where a GPU has no room
    for the weights.
    """
    device, parts = pick_device(machine.device, gpu), 3 if styled else _samples(one.settings.validation_guidance)
    count = 1 if device.type == "cpu" else most or max(1, one.settings.sampled_at_once * 2 // max(2, parts))
    if _stored_bytes(one.model) < SAID_FROM:
        return count, None
    size, dtype = max(sizes, key=lambda size: size[0] * size[1]), DTYPES[one.settings.mixed_precision]
    free = free_bytes(device)
    while True:
        found = unet_forecast(one.model, size, count * parts, dtype, device)
        _check(STAGES[one.stage].title, found, free)
        if count == 1 or free is None or found.total <= MOST_SHARE * free:
            return count, found
        count //= 2


def texts_forecast(request: TextsRequest) -> Forecast | None:
    """What the text encoder takes; None: little, or not known, because it is streamed or quantised. Raises as above."""
    kind, machine, keys = TEXT_ENCODERS[request.encoder_name], request.machine, request.keys
    files = weight_files(request.encoder / kind.weights_folder, kind.weights_file)
    if machine.text_encoder_streaming or keys.text_encoder_quantization != "none" or _bytes(files) < SAID_FROM:
        return None
    found = encoder_forecast(kind, request.encoder, DTYPES[keys.text_encoder_dtype])
    advice = "set text_encoder_streaming = true, or text_encoder_dtype = bf16"
    _check(kind.title, found, free_bytes(pick_device(machine.device)), advice)
    return found


def stage3_forecast(stage3: Stage3, low_res: Iterable[Size], machine: Machine, gpu: int = 0) -> Forecast | None:
    """What Stage III takes for pictures of these sizes, one at a time; None: little. Raises ModelError as above."""
    settings, folder, device = stage3.settings, stage3.model, pick_device(machine.device, gpu)
    if settings is None or folder is None or _stored_bytes(folder) < SAID_FROM:
        return None
    width, height = (min(max(edges), WINDOW_PX) for edges in zip(*low_res, strict=True))
    dtype, count = DTYPES[settings.mixed_precision], _samples(settings.validation_guidance)
    found = unet_forecast(folder, (width, height), count, dtype, device) | text_forecast(folder, dtype)
    found |= vae_forecast(folder, (width, height), device)
    _check(TITLE, found, free_bytes(device))
    return found


def canvas_bytes(stage: DrawnStage, low_res: Size, guidance: float) -> int:
    """What an upscaler holds of a picture that is this large before, beside its weights and a call on one window."""
    made = low_res[0] * low_res[1] * UPSCALE**2
    return made * (_DECODED if stage == STAGE3 else _CANVAS[guidance > 1])


def with_canvas(forecast: Forecast | None, canvas: int) -> Forecast | None:
    """A forecast of calls on windows with the canvas; None: little."""
    if forecast is None:
        return Forecast(0, canvas) if canvas >= SAID_FROM else None
    return Forecast(forecast.weights, forecast.call + canvas)


def _samples(guidance: float) -> int:
    """Of a picture in a call of the UNet."""
    return 2 if guidance > 1 else 1


def _check(
    title: str, forecast: Forecast, free: int | None,
    advice: str = "set mixed_precision = bf16, or take a smaller model_flavour",
) -> None:  # fmt: skip
    if free is not None and forecast.weights > free:
        raise ModelError(
            f"The weights of {title} take {forecast.weights / 1e9:.1f} GB, and the GPU has {free / 1e9:.1f} GB free. End "
            f"what else uses it, {advice}."
        )


def _stored_bytes(folder: Path) -> int:
    return _bytes(weight_files(folder / "unet", UNET_WEIGHTS))


def _bytes(files: Iterable[Path]) -> int:
    return sum(file.stat().st_size for file in files)
