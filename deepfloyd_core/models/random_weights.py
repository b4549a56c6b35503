"""Model folders with the real architectures and random weights, for benchmarks and tests of size: `random:<flavour>`.

Each weight is a pure function of (its name, seed), so a folder has the same bytes wherever it is written. It is written
once, into Hugging Face's assets cache (HF_HOME moves it). The text encoder is written only when it is needed, and once
for all real flavours: 9.5 GB. A part (`unet`, `text_encoder`, ...) gets its name when its bytes are on the disk, so an
interrupted part is never used. One tensor is in memory at a time, at most 0.8 GB; torch is in a child process only.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepfloyd_core.config.flavours import FLAVOURS, RANDOM, Flavour
from deepfloyd_core.config.stages import STAGES, Stage
from deepfloyd_core.files import write_bytes
from deepfloyd_core.models.headers import UNET_WEIGHTS
from deepfloyd_core.models.random_files import (
    Weights,
    default_cache,
    json_bytes,
    read_json,
    write_in_child,
    write_model,
    write_part,
    write_schedulers,
)
from deepfloyd_core.models.text_encoders import text_encoder_of
from deepfloyd_core.store.locks import locked

_BOTH = {
    "_class_name": "UNet2DConditionModel", "out_channels": 6, "act_fn": "gelu", "norm_num_groups": 32,
    "attention_head_dim": 64, "cross_attention_norm": "group_norm", "encoder_hid_dim": 4096,
    "encoder_hid_dim_type": "text_proj", "addition_embed_type": "text", "addition_embed_type_num_heads": 64,
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn", "resnet_time_scale_shift": "scale_shift",
}  # fmt: skip
_PLAIN_DOWN, _PLAIN_UP = "ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"
_CROSS_DOWN, _CROSS_UP = "SimpleCrossAttnDownBlock2D", "SimpleCrossAttnUpBlock2D"


def _stage1(base: int) -> dict[str, Any]:
    """IF-I: levels of 1, 2, 3 and 4 times `base` channels, attention on the inner three."""
    return {
        **_BOTH, "sample_size": 64, "in_channels": 3, "block_out_channels": [base, base * 2, base * 3, base * 4],
        "layers_per_block": 3, "cross_attention_dim": base * 4, "down_block_types": [_PLAIN_DOWN] + [_CROSS_DOWN] * 3,
        "up_block_types": [_CROSS_UP] * 3 + [_PLAIN_UP],
    }  # fmt: skip


def _stage2(base: int) -> dict[str, Any]:
    """A stand-in of IF-II's traits: its channels are published nowhere, so these were chosen by the count of parameters."""
    return {
        **_BOTH, "sample_size": 256, "in_channels": 6, "block_out_channels": [base * n for n in (1, 2, 3, 4, 4)],
        "layers_per_block": [2, 4, 8, 8, 8], "cross_attention_dim": base * 4, "only_cross_attention": True,
        "down_block_types": [_PLAIN_DOWN] * 3 + [_CROSS_DOWN] * 2, "up_block_types": [_CROSS_UP] * 2 + [_PLAIN_UP] * 3,
        "class_embed_type": "timestep", "time_embedding_act_fn": "gelu", "resnet_skip_time_act": True,
        "resnet_out_scale_factor": 1 / 0.7071, "mid_block_scale_factor": 1 / 0.7071,
    }  # fmt: skip


# 371,605,830, 935,365,830 and 4,304,695,110 parameters, as published; then 442,303,750 and 1,244,597,446 as stand-ins.
UNETS = {
    "i-medium-400m": _stage1(192),
    "i-large-900m": _stage1(320),
    "i-xlarge-4.3b": _stage1(704),
    "ii-medium-450m": _stage2(128),
    "ii-large-1.2b": _stage2(224),
}
_COSINE = {"_class_name": "DDPMScheduler", "beta_schedule": "squaredcos_cap_v2"}
_SAMPLER = {"prediction_type": "epsilon", "variance_type": "learned_range", "thresholding": True}
_SAMPLER |= {"dynamic_thresholding_ratio": 0.95}


@dataclass(frozen=True)
class Design:
    """Everything that decides the bytes of a folder."""

    stage: Stage
    unet: dict[str, Any]
    schedulers: dict[str, dict[str, Any]]
    text: dict[str, Any]
    dtype: str  # of the stored weights
    seed: int

    @property
    def unet_id(self) -> str:
        """Fingerprint of everything but the text encoder."""
        return self.weights.id_of({"unet": self.unet, "schedulers": self.schedulers})

    @property
    def text_id(self) -> str:
        """Fingerprint of the text encoder, the same for all flavours that share one."""
        return self.weights.id_of({"text": self.text})

    @property
    def weights(self) -> Weights:
        """How they are drawn and stored."""
        return Weights(self.dtype, self.seed)


def design_of(flavour: Flavour, seed: int = 0) -> Design:
    """The architecture of a flavour without its `random:`: the table's, or that of the shipped folder."""
    encoder = text_encoder_of(flavour.stage)
    names, folder = flavour.kind.schedulers, Path(flavour.repo)
    if folder.is_absolute():
        schedulers = {name: read_json(folder / name / "scheduler_config.json") for name in names}
        text = read_json(folder / encoder.weights_folder / "config.json")
        return Design(flavour.stage, read_json(folder / "unet/config.json"), schedulers, text, "float32", seed)
    sampler = {**_COSINE, **_SAMPLER, "sample_max_value": flavour.kind.sample_max}
    schedulers = dict(zip(names, (sampler, _COSINE), strict=False))
    return Design(flavour.stage, UNETS[flavour.name], schedulers, dict(encoder.random_config), "bfloat16", seed)


def random_folder(name: str, text: bool = False, cache: Path | None = None) -> Path:
    """The pipeline folder of a flavour named `random:...`; a child process writes the missing parts.

    Raises ModelError when the disk has no room for it.
    """
    cache = cache or default_cache()
    design = design_of(FLAVOURS[name.removeprefix(RANDOM)])
    if written := written_folder(name, text, cache):
        return written
    folder = _folder(name, design, cache)
    return write_in_child(name, folder, write_folder, (name, design, text, cache))


def written_folder(name: str, text: bool = False, cache: Path | None = None) -> Path | None:
    """The same folder if it is already written; None if not."""
    design = design_of(FLAVOURS[name.removeprefix(RANDOM)])
    folder = _folder(name, design, cache or default_cache())
    return folder if all((folder / part).is_dir() for part in _parts(design, text)) else None


def write_folder(order: tuple[str, Design, bool, Path]) -> Path:
    """Write the missing parts of a folder, in this process. order: name, design, with text encoder or not, cache."""
    name, design, text, cache = order
    folder = _folder(name, design, cache)
    with locked(cache, folder.name):
        folder.mkdir(exist_ok=True)
        write_bytes(folder / "model_index.json", json_bytes(_model_index(design)))
        write_part(folder / "unet", lambda out: _write_unet(design, out))
        write_schedulers(folder, design.schedulers)
    if text:
        shared, encoder = cache / f"text-{design.text_id}", text_encoder_of(design.stage)
        with locked(cache, shared.name):
            tokenizer = encoder.random_tokenizer
            write_part(
                shared / encoder.tokenizer_folder, lambda out: shutil.copytree(tokenizer, out, dirs_exist_ok=True)
            )
            write_part(shared / encoder.weights_folder, lambda out: _write_text(design, out))
            for part in encoder.parts:
                if not (folder / part).is_symlink():
                    (folder / part).symlink_to(Path("..") / shared.name / part)
    return folder


def _folder(name: str, design: Design, cache: Path) -> Path:
    return cache / f"{name.removeprefix(RANDOM)}-{design.unet_id}"


def _parts(design: Design, text: bool) -> list[str]:
    return ["unet", *design.schedulers, *(text_encoder_of(design.stage).parts if text else ())]


def _write_unet(design: Design, out: Path) -> None:
    from diffusers import UNet2DConditionModel

    stem = Path(UNET_WEIGHTS).stem
    write_model(lambda: UNet2DConditionModel.from_config(design.unet), design.unet, out, stem, design.weights)


def _write_text(design: Design, out: Path) -> None:
    import transformers

    kind = text_encoder_of(design.stage)
    model, config = (getattr(transformers, name) for name in (kind.model_class, kind.config_class))
    stem = kind.weights_file.removesuffix(".safetensors")
    write_model(lambda: model(config(**design.text)), design.text, out, stem, design.weights)


def _model_index(design: Design) -> dict[str, Any]:
    kind = text_encoder_of(design.stage)
    parts = {"unet": ["diffusers", "UNet2DConditionModel"], kind.weights_folder: ["transformers", kind.model_class]}
    parts |= {name: ["diffusers", "DDPMScheduler"] for name in design.schedulers}
    absent: dict[str, Any] = {name: [None, None] for name in ("feature_extractor", "safety_checker", "watermarker")}
    rest = {kind.tokenizer_folder: ["transformers", kind.tokenizer_class], "requires_safety_checker": False}
    return {"_class_name": STAGES[design.stage].pipeline, **absent, **parts, **rest}
