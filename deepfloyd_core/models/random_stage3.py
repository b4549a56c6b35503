"""`random:x4-upscaler`: Stage III's architecture with random weights, as `random_weights` has those of the other stages."""

import shutil
from functools import partial
from pathlib import Path
from typing import Any

from deepfloyd_core.config.flavours import RANDOM_STAGE3, TINY
from deepfloyd_core.config.stage3 import PARTS, PIPELINE
from deepfloyd_core.files import write_bytes
from deepfloyd_core.models.headers import UNET_WEIGHTS
from deepfloyd_core.models.random_files import (
    Weights,
    default_cache,
    json_bytes,
    write_in_child,
    write_model,
    write_part,
    write_schedulers,
)
from deepfloyd_core.store.locks import locked

WEIGHTS = Weights("bfloat16", 0)
# 473,398,020, 55,325,927 and 340,387,840 parameters.
UNET = {
    "_class_name": "UNet2DConditionModel", "sample_size": 128, "in_channels": 7, "out_channels": 4,
    "block_out_channels": [256, 512, 512, 1024], "layers_per_block": 2, "attention_head_dim": 8,
    "cross_attention_dim": 1024, "num_class_embeds": 1000, "use_linear_projection": True,
    "only_cross_attention": [True, True, True, False], "act_fn": "silu", "norm_num_groups": 32,
    "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 3,
    "up_block_types": ["CrossAttnUpBlock2D"] * 3 + ["UpBlock2D"],
}  # fmt: skip
VAE = {
    "_class_name": "AutoencoderKL", "sample_size": 256, "in_channels": 3, "out_channels": 3, "latent_channels": 4,
    "block_out_channels": [128, 256, 512], "layers_per_block": 2, "norm_num_groups": 32, "scaling_factor": 0.08333,
    "act_fn": "silu", "down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3,
}  # fmt: skip
TEXT = {
    "architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "hidden_size": 1024, "intermediate_size": 4096,
    "num_hidden_layers": 23, "num_attention_heads": 16, "vocab_size": 49408, "max_position_embeddings": 77,
    "hidden_act": "gelu", "projection_dim": 512, "dtype": "bfloat16",
}  # fmt: skip
NOISE = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "scaled_linear"}
SCHEDULERS: dict[str, dict[str, Any]] = {
    "scheduler": {
        "_class_name": "DDIMScheduler", **NOISE, "prediction_type": "v_prediction", "clip_sample": False,
        "set_alpha_to_one": False, "steps_offset": 1,
    },
    "low_res_scheduler": {"_class_name": "DDPMScheduler", **NOISE},
}  # fmt: skip
_INDEX = {
    "_class_name": PIPELINE, "vae": ["diffusers", "AutoencoderKL"], "unet": ["diffusers", "UNet2DConditionModel"],
    "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
    "scheduler": ["diffusers", "DDIMScheduler"], "low_res_scheduler": ["diffusers", "DDPMScheduler"],
    "max_noise_level": 350,
}  # fmt: skip


def random_stage3(cache: Path | None = None) -> Path:
    """The pipeline folder; a child process writes the missing parts. Raises ModelError when the disk has no room for it."""
    cache = cache or default_cache()
    return written_stage3(cache) or write_in_child(RANDOM_STAGE3, _folder(cache), write_stage3, cache)


def written_stage3(cache: Path | None = None) -> Path | None:
    """The same folder if it is already written; None if not."""
    folder = _folder(cache or default_cache())
    return folder if all((folder / part).is_dir() for part in PARTS) else None


def write_stage3(cache: Path) -> Path:
    """Write the missing parts of the folder, in this process."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    folder = _folder(cache)
    with locked(cache, folder.name):
        folder.mkdir(exist_ok=True)
        write_bytes(folder / "model_index.json", json_bytes(_INDEX))
        write_schedulers(folder, SCHEDULERS)
        stem = Path(UNET_WEIGHTS).stem
        for part, kind, config in (("unet", UNet2DConditionModel, UNET), ("vae", AutoencoderKL, VAE)):
            build = partial(kind.from_config, config)
            write_part(folder / part, partial(_write, build, config, stem))
        tokenizer = TINY / "iii" / "tokenizer"
        write_part(folder / "tokenizer", lambda out: shutil.copytree(tokenizer, out, dirs_exist_ok=True))
        write_part(
            folder / "text_encoder", partial(_write, lambda: CLIPTextModel(CLIPTextConfig(**TEXT)), TEXT, "model")
        )
    return folder


def _write(build: Any, config: dict[str, Any], stem: str, out: Path) -> None:
    write_model(build, config, out, stem, WEIGHTS)


def _folder(cache: Path) -> Path:
    configs = {"unet": UNET, "vae": VAE, "text": TEXT, "schedulers": SCHEDULERS}
    return cache / f"x4-upscaler-{WEIGHTS.id_of(configs)}"
