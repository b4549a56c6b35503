"""Model folders with the real architectures and random weights, for benchmarks and tests of size: `random:<flavour>`.

Each weight is a pure function of (its name, seed), so a folder has the same bytes wherever it is written. It is written
once, into Hugging Face's assets cache (HF_HOME moves it). The text encoder is written only when it is needed, and once
for all real flavours: 9.5 GB. A part (`unet`, `text_encoder`, ...) gets its name when its bytes are on the disk, so an
interrupted part is never used. One tensor is in memory at a time, at most 0.8 GB; torch is in a child process only.
"""

import json
import logging
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deepfloyd_core.config.flavours import FLAVOURS, RANDOM, Flavour
from deepfloyd_core.config.stages import STAGES, Stage
from deepfloyd_core.errors import ModelError
from deepfloyd_core.files import TMP_PREFIX, canonical_json, fsync_path, sha256_bytes, write_bytes
from deepfloyd_core.hashing import hash_seed
from deepfloyd_core.models.text_encoders import text_encoder_of
from deepfloyd_core.processes.pool import Children, Limits, Lost
from deepfloyd_core.store.locks import locked

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

FORMAT = 1
SHARD_BYTES = 1_900_000_000
BUILD_S = 7200.0  # far more than the largest takes: 2 minutes
SPARE_BYTES = 1 << 28  # configurations, tokenizer, and something for the others on this disk

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
        return self._id({"unet": self.unet, "schedulers": self.schedulers})

    @property
    def text_id(self) -> str:
        """Fingerprint of the text encoder, the same for all flavours that share one."""
        return self._id({"text": self.text})

    def _id(self, configs: dict[str, Any]) -> str:
        parts = {"format": FORMAT, "dtype": self.dtype, "seed": self.seed, **configs}
        return sha256_bytes(canonical_json(parts).encode())[:12]


def design_of(flavour: Flavour, seed: int = 0) -> Design:
    """The architecture of a flavour without its `random:`: the table's, or that of the shipped folder."""
    encoder = text_encoder_of(flavour.stage)
    names, folder = flavour.kind.schedulers, Path(flavour.repo)
    if folder.is_absolute():
        schedulers = {name: _read(folder / name / "scheduler_config.json") for name in names}
        text = _read(folder / encoder.weights_folder / "config.json")
        return Design(flavour.stage, _read(folder / "unet/config.json"), schedulers, text, "float32", seed)
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
    log.info("%s: writing random weights to %s", name, folder)
    with Children(1, Limits(memory_mib=None, seconds=BUILD_S)) as children:
        (result,) = children.map(write_folder, [(name, design, text, cache)])
    if isinstance(result, Lost):
        raise ModelError(f"{name} was not written to {folder}: {result.detail}. Run the same command again.")
    return result


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
        write_bytes(folder / "model_index.json", _json(_model_index(design)))
        _part(folder / "unet", lambda out: _write_unet(design, out))
        for scheduler, config in design.schedulers.items():
            _part(folder / scheduler, lambda out, config=config: _write(out / "scheduler_config.json", config))  # type: ignore[misc]
    if text:
        shared, encoder = cache / f"text-{design.text_id}", text_encoder_of(design.stage)
        with locked(cache, shared.name):
            tokenizer = encoder.random_tokenizer
            _part(shared / encoder.tokenizer_folder, lambda out: shutil.copytree(tokenizer, out, dirs_exist_ok=True))
            _part(shared / encoder.weights_folder, lambda out: _write_text(design, out))
            for part in encoder.parts:
                if not (folder / part).is_symlink():
                    (folder / part).symlink_to(Path("..") / shared.name / part)
    return folder


def draw(name: str, shape: tuple[int, ...], seed: int) -> "np.ndarray[Any, np.dtype[np.float32]]":
    """The float32 weight `name`: biases 0, norms 1, the rest uniform with variance 1 / fan-in, so that signals stay finite.

    Uniform, not normal: 5 times as fast, and its bits are the same on every machine. T5 does not scale its logits, so its
    queries are smaller by the square root of 64, as when T5 is initialised; its table has variance 1.
    """
    if len(shape) == 1:
        return np.full(shape, 0.0 if name.endswith("bias") else 1.0, np.float32)
    fan_in = 1 if name == "shared.weight" else math.prod(shape[1:])
    if name.endswith("SelfAttention.q.weight"):
        fan_in *= 64
    values = np.random.Generator(np.random.PCG64(hash_seed("random", seed, name))).random(shape, np.float32)
    values -= np.float32(0.5)
    values *= np.float32(math.sqrt(12 / fan_in))
    return values


def default_cache() -> Path:
    """Where folders of random weights are kept: among Hugging Face's assets of this user."""
    from huggingface_hub import cached_assets_path

    return Path(cached_assets_path("deepfloyd", "models", "random"))


def _folder(name: str, design: Design, cache: Path) -> Path:
    return cache / f"{name.removeprefix(RANDOM)}-{design.unet_id}"


def _parts(design: Design, text: bool) -> list[str]:
    return ["unet", *design.schedulers, *(text_encoder_of(design.stage).parts if text else ())]


def _part(part: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a subfolder under a temporary name, and rename it when every byte is on the disk."""
    if part.is_dir():
        return
    tmp = part.with_name(TMP_PREFIX + part.name)
    shutil.rmtree(tmp, ignore_errors=True)  # of a killed build; the lock is ours
    tmp.mkdir(parents=True)
    try:
        write(tmp)
        for path in (*tmp.iterdir(), tmp):
            fsync_path(path)
        tmp.rename(part)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    fsync_path(part.parent)


def _write_unet(design: Design, out: Path) -> None:
    import torch
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        model = UNet2DConditionModel.from_config(design.unet)
    _write(out / "config.json", design.unet)
    _write_weights(model, out, "diffusion_pytorch_model", design)


def _write_text(design: Design, out: Path) -> None:
    import torch
    import transformers

    kind = text_encoder_of(design.stage)
    with torch.device("meta"):
        model = getattr(transformers, kind.model_class)(getattr(transformers, kind.config_class)(**design.text))
    _write(out / "config.json", design.text)
    _write_weights(model, out, kind.weights_file.removesuffix(".safetensors"), design)


def _write_weights(model: "torch.nn.Module", out: Path, stem: str, design: Design) -> None:
    """Write every parameter (a shared one once) into shards with the libraries' names. Raises ModelError without room."""
    width = {"float32": 4, "bfloat16": 2}[design.dtype]
    sizes = {name: param.numel() * width for name, param in model.named_parameters()}
    needed, free = sum(sizes.values()) + SPARE_BYTES, shutil.disk_usage(out).free
    if needed > free:
        raise ModelError(
            f"Random weights need {needed / 1e9:.1f} GB in {out.parent}, where {free / 1e9:.1f} GB are free. "
            "Make room there, or point HF_HOME at another disk."
        )
    shapes = {name: tuple(param.shape) for name, param in model.named_parameters()}
    shards = list(_shards(sizes))
    files = [f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    if len(shards) == 1:
        files = [f"{stem}.safetensors"]
    else:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        _write(out / f"{stem}.safetensors.index.json", index)
    for file, names in zip(files, shards, strict=True):
        _write_shard(out / file, {name: shapes[name] for name in names}, design)


def _shards(sizes: dict[str, int]) -> Iterator[list[str]]:
    names: list[str] = []
    filled = 0
    for name, size in sizes.items():
        if names and filled + size > SHARD_BYTES:
            yield names
            names, filled = [], 0
        names.append(name)
        filled += size
    yield names


def _write_shard(path: Path, shapes: dict[str, tuple[int, ...]], design: Design) -> None:
    """Write a safetensors file tensor by tensor; the library's own writer needs all tensors in memory."""
    import torch

    kind, width = {"float32": ("F32", 4), "bfloat16": ("BF16", 2)}[design.dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * width
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8
    with path.open("wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            tensor = torch.from_numpy(draw(name, shape, design.seed)).to(getattr(torch, design.dtype))
            tensor.reshape(-1).view(torch.uint8).numpy().tofile(handle)


def _model_index(design: Design) -> dict[str, Any]:
    kind = text_encoder_of(design.stage)
    parts = {"unet": ["diffusers", "UNet2DConditionModel"], kind.weights_folder: ["transformers", kind.model_class]}
    parts |= {name: ["diffusers", "DDPMScheduler"] for name in design.schedulers}
    absent: dict[str, Any] = {name: [None, None] for name in ("feature_extractor", "safety_checker", "watermarker")}
    rest = {kind.tokenizer_folder: ["transformers", kind.tokenizer_class], "requires_safety_checker": False}
    return {"_class_name": STAGES[design.stage].pipeline, **absent, **parts, **rest}


def _read(path: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(path.read_bytes())
    return config


def _write(path: Path, record: dict[str, Any]) -> None:
    path.write_bytes(_json(record))


def _json(record: dict[str, Any]) -> bytes:
    return (json.dumps(record, indent=2, sort_keys=True) + "\n").encode()
