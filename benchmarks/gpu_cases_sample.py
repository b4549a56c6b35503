"""The cases of groups e and f: pictures a second, resident and offloaded, and JPEGs that are decoded on the card."""

import io
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import torch
from gpu_plan import Asked, Yields
from gpu_world import bare_folder, peak_memory, run_of, seconds_of, weights_in_memory
from PIL import Image

from deepfloyd_core.config.stages import STAGES, Stage
from deepfloyd_core.pictures.decode import decode_rgb
from deepfloyd_core.sampling.jobs import SampledStage
from deepfloyd_core.sampling.sampler import Sampler, make_sampler, sample_from_text, sample_upscaled

FLAVOUR: dict[Stage, str] = {1: "i-medium-400m", 2: "ii-medium-450m"}
TOKENS = 77


def sampled(asked: Asked, stage: Stage, offload: bool) -> Yields:
    """One batch of the product's sampler, guided. offload: by the stock pipeline, from and to main memory."""
    folder, steps = bare_folder(asked, FLAVOUR[stage]), 2 if asked.tiny else 50
    run = run_of(asked, folder, stage, 4, lora_rank=8, validation_num_inference_steps=steps)
    with weights_in_memory("cpu" if offload else asked.device), peak_memory(asked.device) as most:
        config = run.config.model_copy(update={"device": "cpu"}) if offload else run.config
        sampler = make_sampler(
            SampledStage(stage=stage, settings=config.stage(stage), model=folder), None, config, lambda count: None
        )
        if offload:
            sampler.pipeline.enable_model_cpu_offload(device=asked.device)
            sampler = replace(sampler, device=torch.device(asked.device))
        count = 1 if asked.tiny else STAGES[stage].sample_batch
        settings = sampler.config.model_copy(update={"validation_num_inference_steps": 1})
        pictures(replace(sampler, config=settings), count)  # warms the card up
        seconds = seconds_of(lambda: pictures(sampler, count))
        yield "pictures/s", count / seconds, f"{count} in {seconds:.2f} s, {steps} steps"
        yield "peak memory", *most()


def decoded(asked: Asked) -> Yields:
    """JPEGs of 2 megapixels: nvJPEG through torchvision where that is installed, and our way on the CPU. A note, no goal."""
    count, size = (64, (1632, 1224)) if not asked.tiny else (2, (160, 120))
    smooth = np.random.default_rng(0).integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
    handle = io.BytesIO()
    Image.fromarray(smooth).resize(size, Image.Resampling.BICUBIC).save(handle, "JPEG", quality=90)
    data = handle.getvalue()
    ours = count / seconds_of(lambda: [decode_rgb(data) for _ in range(count)])
    yield "our CPU path, one thread: pictures/s", ours, f"{len(data) / 2**10:.0f} KiB each"
    if find_spec("torchvision") is None:
        yield "on the card: pictures/s", float("nan"), "torchvision is not installed"
        return
    from torchvision.io import decode_jpeg

    raw = [torch.frombuffer(bytearray(data), dtype=torch.uint8)] * count
    decode_jpeg(raw[:1], device=asked.device)
    yield "on the card: pictures/s", count / seconds_of(lambda: decode_jpeg(raw, device=asked.device)), ""


def pictures(sampler: Sampler, count: int) -> torch.Tensor:
    """Some pictures of random texts; Stage II's of random low-res pictures."""
    generator = torch.Generator().manual_seed(0)
    width = sampler.pipeline.unet.config.encoder_hid_dim
    text, negative = (torch.randn((count, TOKENS, width), generator=generator) for _ in range(2))
    if sampler.stage == 1:
        return sample_from_text(sampler, text, negative, list(range(count)), (64, 64))
    return sample_upscaled(
        sampler, text, negative, list(range(count)), torch.rand((count, 3, 64, 64), generator=generator) * 2 - 1
    )
