"""Writes the parts of a model's folder with random weights: each whole or not at all, a tensor in memory at a time.

Each weight is a pure function of (its name, seed). torch is in a child process only.
"""

import json
import logging
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from deepfloyd_core.errors import ModelError
from deepfloyd_core.files import TMP_PREFIX, canonical_json, fsync_path, sha256_bytes
from deepfloyd_core.hashing import hash_seed
from deepfloyd_core.processes.pool import Children, Limits, Lost
from deepfloyd_core.types import Json

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

FORMAT = 1
SHARD_BYTES = 1_900_000_000
BUILD_S = 7200.0  # far more than the largest takes: 2 minutes
SPARE_BYTES = 1 << 28  # configurations, tokenizer, and something for the others on this disk
Order = TypeVar("Order")


@dataclass(frozen=True)
class Weights:
    """How weights are drawn and stored."""

    dtype: str
    seed: int

    def id_of(self, configs: dict[str, Any]) -> str:
        """Fingerprint of what has these configurations."""
        parts = {"format": FORMAT, "dtype": self.dtype, "seed": self.seed, **configs}
        return sha256_bytes(canonical_json(parts).encode())[:12]


def write_in_child(name: str, folder: Path, write: Callable[[Order], Path], order: Order) -> Path:
    """Let a child process write a model's folder. Raises ModelError when the disk has no room, or the child dies."""
    log.info("%s: writing random weights to %s", name, folder)
    with Children(1, Limits(memory_mib=None, seconds=BUILD_S)) as children:
        (result,) = children.map(write, [order])
    if isinstance(result, Lost):
        raise ModelError(f"{name} was not written to {folder}: {result.detail}. Run the same command again.")
    return result


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


def write_part(part: Path, write: Callable[[Path], Any]) -> None:
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


def write_schedulers(folder: Path, configs: Mapping[str, dict[str, Any]]) -> None:
    """Write the parts with schedulers' configurations."""
    for name, config in configs.items():
        write_part(folder / name, lambda out, config=config: write_json(out / "scheduler_config.json", config))  # type: ignore[misc]


def write_model(
    build: "Callable[[], torch.nn.Module]", config: dict[str, Any], out: Path, stem: str, weights: Weights
) -> None:
    """Write what is built, a model of a library: its configuration, and random weights with a stem's names."""
    import torch

    with torch.device("meta"):
        model = build()
    write_json(out / "config.json", config)
    _write_weights(model, out, stem, weights)


def _write_weights(model: "torch.nn.Module", out: Path, stem: str, weights: Weights) -> None:
    """Write every parameter (a shared one once) into shards with the libraries' names. Raises ModelError without room."""
    width = {"float32": 4, "bfloat16": 2}[weights.dtype]
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
        write_json(out / f"{stem}.safetensors.index.json", index)
    for file, names in zip(files, shards, strict=True):
        _write_shard(out / file, {name: shapes[name] for name in names}, weights)


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


def _write_shard(path: Path, shapes: dict[str, tuple[int, ...]], weights: Weights) -> None:
    """Write a safetensors file tensor by tensor; the library's own writer needs all tensors in memory."""
    import torch

    kind, width = {"float32": ("F32", 4), "bfloat16": ("BF16", 2)}[weights.dtype]
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
            tensor = torch.from_numpy(draw(name, shape, weights.seed)).to(getattr(torch, weights.dtype))
            handle.write(tensor.reshape(-1).view(torch.uint8).numpy().data)  # `tofile` does not say why it failed


def read_json(path: Path) -> Json:
    config: dict[str, Any] = json.loads(path.read_bytes())
    return config


def write_json(path: Path, record: dict[str, Any]) -> None:
    path.write_bytes(json_bytes(record))


def json_bytes(record: dict[str, Any]) -> bytes:
    return (json.dumps(record, indent=2, sort_keys=True) + "\n").encode()
