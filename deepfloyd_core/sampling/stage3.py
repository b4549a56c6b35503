"""Stage III with diffusers' own pipeline, a picture at a time, or Lanczos' filter in its place."""

import json
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionUpscalePipeline
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer

from deepfloyd_core.config.run_machine import Machine
from deepfloyd_core.config.stage3 import TITLE, UNIT_PX
from deepfloyd_core.config.stages import UPSCALE
from deepfloyd_core.diffusion.loss import to_bytes
from deepfloyd_core.errors import ModelError
from deepfloyd_core.models.torch_device import pick_device
from deepfloyd_core.models.unet import DTYPES, load_unet, order_channels_last
from deepfloyd_core.sampling.parts import Sampled, so_far
from deepfloyd_core.sampling.stage3_jobs import Stage3
from deepfloyd_core.sampling.windows import WINDOW_PX, WindowedUnet

# A picture (1, 3, H, W) in [-1, 1], its prompt, negative prompt and seed -> uint8 (4H, 4W, 3).
Enlarge = Callable[[torch.Tensor, str, str, int], np.ndarray]


def make_enlarger(stage3: Stage3, machine: Machine, sampled: Sampled, gpu: int = 0) -> Enlarge:
    """Load Stage III. sampled: called in each step; gpu: as in `Job`."""
    if stage3.settings is None or stage3.model is None:
        return _by_lanczos(sampled)
    settings = stage3.settings
    pipeline = stage3_pipeline(stage3, machine, gpu)
    steps = settings.validation_num_inference_steps

    def enlarge(picture: torch.Tensor, prompt: str, negative: str, seed: int) -> np.ndarray:
        height, width = picture.shape[2:]
        pad = (0, -width % UNIT_PX, 0, -height % UNIT_PX)
        tell = so_far(sampled)
        made = pipeline(
            prompt=[prompt], negative_prompt=[negative],
            image=torch.nn.functional.pad(picture, pad, mode="replicate") / 2 + 0.5,  # the pipeline takes [0, 1]
            generator=[torch.Generator().manual_seed(seed)], num_inference_steps=steps,
            guidance_scale=settings.validation_guidance, noise_level=settings.validation_noise_level, output_type="np",
            callback=lambda number, t, x_t: tell((number + 1) / steps),
        ).images[0]  # fmt: skip
        tell(1.0)
        if not np.isfinite(made).all():
            raise ModelError(f"{TITLE} gave values that are not finite for {prompt!r}. Look at its weights.")
        rounded: np.ndarray = (made * 255).round().astype(np.uint8)  # as the pipeline's own PIL pictures
        return rounded[: height * UPSCALE, : width * UPSCALE]

    return enlarge


def stage3_pipeline(stage3: Stage3, machine: Machine, gpu: int = 0) -> Any:
    """The stock pipeline. Its VAE is in fp32, as bf16 has 1 of 256 levels; a picture above 1,024 px is sampled through
    windows, and decoded in tiles.
    """
    assert stage3.settings is not None and stage3.model is not None
    folder, dtype = stage3.model, DTYPES[stage3.settings.mixed_precision]
    unet = load_unet(folder, dtype)
    order_channels_last(unet)
    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae", dtype=torch.float32, use_safetensors=True)
    vae.tile_latent_min_size, vae.tile_sample_min_size = WINDOW_PX, WINDOW_PX * UPSCALE
    vae.enable_tiling()
    own = json.loads((folder / "scheduler" / "scheduler_config.json").read_bytes())["_class_name"]
    # Of named classes: `from_pretrained` of all would take them from model_index.json, which decides nothing here.
    pipeline = StableDiffusionUpscalePipeline(
        vae=vae, unet=unet,
        text_encoder=CLIPTextModel.from_pretrained(
            folder, subfolder="text_encoder", dtype=dtype, use_safetensors=True, local_files_only=True
        ).eval(),
        tokenizer=CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer", local_files_only=True),
        scheduler=getattr(diffusers, own).from_pretrained(folder, subfolder="scheduler"),
        low_res_scheduler=DDPMScheduler.from_pretrained(folder, subfolder="low_res_scheduler"),
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(pick_device(machine.device, gpu))
    pipeline.unet = WindowedUnet(pipeline.unet)  # of latents, which are as many as pixels of the low-res picture
    return pipeline


def _by_lanczos(sampled: Sampled) -> Enlarge:
    def enlarge(picture: torch.Tensor, prompt: str, negative: str, seed: int) -> np.ndarray:
        small = Image.fromarray(to_bytes(picture)[0].numpy())
        large = small.resize((small.width * UPSCALE, small.height * UPSCALE), Image.Resampling.LANCZOS)
        sampled(1.0)
        return np.asarray(large)

    return enlarge
