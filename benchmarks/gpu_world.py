"""What the cases of the GPU day stand on: folders without weights, weights made on the device, a training that is watched.

Random weights of IF-I-XL are 8.6 GB. On the card they are drawn in less than a second; written to a file and read again they
would take a minute of it.
"""

import gc
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import torch
import train_step
from gpu_plan import Asked
from safetensors.torch import save_file
from train_step import PICTURES, SIZES, Data, Enough, make_run, training_job, write_rows
from worlds import peak_bytes

from deepfloyd_core.config.flavours import FLAVOURS, TINY
from deepfloyd_core.config.run import Run
from deepfloyd_core.config.stages import Stage
from deepfloyd_core.crops.rows import HELD_OUT, HELD_OUT_FILE, ROWS, ROWS_FILE, pixels_of
from deepfloyd_core.crops.shards import PIXELS_SUM, ShardRow, write_shard
from deepfloyd_core.crops.summary import CropsSummary
from deepfloyd_core.hashing import caption_id, hash_seed
from deepfloyd_core.models import quantized as quantized_base
from deepfloyd_core.models.random_weights import design_of
from deepfloyd_core.models.unet import empty_unet
from deepfloyd_core.sampling import sampler as sampling
from deepfloyd_core.store.artifacts import Artifact, Request, materialise
from deepfloyd_core.store.manifest import Summary
from deepfloyd_core.text.projection import store, text_is_frozen
from deepfloyd_core.training import steps as loop
from deepfloyd_core.training import trainer as train
from deepfloyd_core.types import Json, no_report

GIB = 2**30
TINY_OF = {1: "tiny-i", 2: "tiny-ii"}


def bare_folder(asked: Asked, flavour: str, **text: Any) -> Path:
    """A pipeline folder without weights of a flavour, or of the tiny one of its stage. text: changes of T5's config."""
    stage = FLAVOURS[flavour].stage
    name = TINY_OF[stage] if asked.tiny else flavour
    wanted, folder = design_of(FLAVOURS[name]), asked.folder / "models" / f"{name}{len(text) or ''}"
    if folder.is_dir():
        return folder
    unet = two_levels(wanted.unet) if name == TINY_OF[1] else wanted.unet
    configs = {"unet/config.json": unet, "text_encoder/config.json": {**wanted.text, **text}}
    configs |= {f"{part}/scheduler_config.json": config for part, config in wanted.schedulers.items()}
    for path, config in configs.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(json.dumps(config))
    save_file({}, folder / "unet/diffusion_pytorch_model.safetensors")  # or it would pass for a folder that lacks it
    (folder / "tokenizer").symlink_to(TINY / "i/tokenizer")
    return folder


def two_levels(unet: Json) -> Json:
    """The two outer levels of a UNet's config, with each kind of block: to trace more takes a rehearsal 8 s."""
    cut = {key: unet[key][:2] for key in ("block_out_channels", "down_block_types")}
    return unet | cut | {"up_block_types": unet["up_block_types"][-2:]}


def drawn(model: torch.nn.Module, device: str, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Random weights for a model that is on torch's meta device, made on a device, as `random_models.draw` scales them."""
    generator = torch.Generator(device).manual_seed(0)
    for name, param in model.named_parameters():
        made = torch.empty(param.shape, device=device, dtype=dtype)
        if made.ndim == 1:
            yield name, made.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        fan_in = 1 if name == "shared.weight" else math.prod(made.shape[1:])
        if name.endswith("SelfAttention.q.weight"):
            fan_in *= 64
        yield name, made.uniform_(-math.sqrt(3 / fan_in), math.sqrt(3 / fan_in), generator=generator)


@contextmanager
def weights_in_memory(device: str) -> Iterator[None]:
    """Within it the product gets random weights, on a device, where it would read a UNet's files."""

    def load(projected: bool, folder: Path, dtype: torch.dtype) -> Any:
        unet = empty_unet(folder, projected)
        unet.load_state_dict(dict(drawn(unet, device, dtype)), assign=True)
        return unet.requires_grad_(False).eval()

    def each(folder: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, torch.Tensor]]:
        found = drawn(empty_unet(folder, projected=False), device, torch.bfloat16)
        return ((name, tensor) for name, tensor in found if wanted(name))

    def whole(folder: Path, dtype: torch.dtype) -> Any:
        return load(False, folder, dtype)

    with ExitStack() as stack:
        for module in (quantized_base, train_step, sampling):
            stack.enter_context(patch.object(module, "load_unet", whole))
        stack.enter_context(
            patch.object(quantized_base, "load_projected_unet", lambda folder, dtype: load(True, folder, dtype))
        )
        stack.enter_context(patch.object(quantized_base, "each_unet_weight", each))
        yield


def run_of(asked: Asked, folder: Path, stage: Stage, batch: int, **keys: Any) -> Run:
    """A run on the device over pictures of noise, of the model in a folder."""
    where = asked.folder / f"stage{stage}"
    where.mkdir(parents=True, exist_ok=True)
    precision = keys.pop("mixed_precision", "bf16" if asked.device == "cuda" else "no")
    if asked.device == "cpu" and keys.get("optimizer") == "adamw_bf16":
        precision = "bf16"  # which that optimizer asks for
    keys["pretrained_model_name_or_path"] = str(folder)
    return make_run(where, TINY_OF[stage], precision, batch, asked.device, stage, **keys)[0]


def noise(run: Run) -> Data:
    """Pixels and an eval set of noise, written as the product lays them out; no picture is looked into.

    Its own way there, the index, needs packages that a bare machine lacks, and seconds.
    """
    (stage,) = run.config.stages
    edge, names = SIZES[stage], [f"caption {number}" for number in range(PICTURES)]
    rng = np.random.default_rng(0)
    crops = [rng.integers(0, 256, (edge, edge, 3), dtype=np.uint8) for _ in names]

    def write(first: int, last: int, work: Any) -> CropsSummary:
        rows = [
            ShardRow(
                image_id=f"{number:064x}", source=name, dataset_id="set", width=edge, height=edge, original_width=edge,
                original_height=edge, crop_left=0, crop_top=0, crop_width=edge, crop_height=edge, repeat=0, caption=name,
                caption_id=caption_id(name), crop_style="center",
            )
            for number, name in enumerate(names)
        ][first:last]  # fmt: skip
        shard = work.path / f"stage{stage}-{edge}x{edge}-noise.parquet"
        write_shard(shard, rows, crops[first:last])
        starts, sums, _ = pixels_of([shard])
        places: dict[str, Sequence[int]] = {
            "file": [0] * len(rows), "place": range(len(rows)), "key": range(first, last), "times": [1] * len(rows),
            "start": starts.tolist(), PIXELS_SUM: sums.tolist(),
        }  # fmt: skip
        columns = [places.get(name) or [getattr(row, name) for row in rows] for name in ROWS.names]
        table = pa.table([pa.array(list(column), kind) for column, kind in zip(columns, ROWS.types, strict=True)], ROWS)
        for file, listed in ((ROWS_FILE, table), (HELD_OUT_FILE, table.select(HELD_OUT.names))):
            with pa.ipc.new_file(work.path / file, listed.schema) as writer:
                writer.write_table(listed)
        return CropsSummary(
            shards=1, rows=len(rows), shown_per_epoch=len(rows), pictures=len(rows), sizes=(f"{edge}x{edge}",), decoded=0,
            shards_taken_over=0,
        )  # fmt: skip

    pixels, eval_set = (
        materialise(run.workspace, Request(kind, 0, {"stage": stage}, {}), lambda work, part=part: write(*part, work))
        for kind, part in ((f"stage{stage}_pixels", (0, PICTURES)), ("eval_set", (0, 1)))
    )
    return pixels, eval_set, names


def stand_in_text(run: Run, folder: Path, captions: list[str]) -> Artifact:
    """A stage's text of random numbers: no text module makes them."""
    (stage,) = run.config.stages
    config, names = run.config.stage(stage), sorted(captions, key=caption_id)
    unet = json.loads((folder / "unet/config.json").read_bytes())
    dtype = torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32
    frozen = text_is_frozen(config)

    def rows_of(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(hash_seed("text", name))
        rows = torch.randn((1, 77, unet["cross_attention_dim"]), generator=generator)
        pooled = torch.randn((1, 4 * unet["block_out_channels"][0]), generator=generator)
        return rows.to(dtype), pooled.to(dtype)

    def build(work: Any) -> Summary:
        if frozen:
            store(work.path, [caption_id(name) for name in names], rows_of, no_report)
        else:
            write_rows(work.path, names, train_step.t5_rows(folder, len(names)))
        return Summary()

    spec = {"captions": names, "model": str(folder), "precision": config.mixed_precision}
    return materialise(run.workspace, Request(f"stage{stage}_text" if frozen else "text_embeds", 0, spec, {}), build)


@dataclass
class Watched:
    """Some steps of the product's trainer."""

    seconds: list[float] = field(default_factory=list)  # of each step but the first
    first_s: float = 0.0  # the first one, with what it loads and compiles
    losses: list[float] = field(default_factory=list)
    idle: float = math.nan  # share of the wall time of some further steps in which the device did nothing


def watched(asked: Asked, run: Run, folder: Path, steps: int, profiled: int = 0) -> Watched:
    """Time `steps` steps behind the first one, then see in `profiled` further ones how long the device waits."""
    found, ends, idle = Watched(), [math.nan], _Idle(asked.device)

    def report(done: int, total: int, line: str) -> None:
        if done <= steps + 1:
            ends.append(train_step.clock())
        if done == steps + 1 and profiled:
            idle.start()
        if done == steps + 1 + profiled:
            raise Enough

    real = loop.take_step

    def step(*given: Any, **named: Any) -> Any:
        if not found.losses:
            ends[0] = train_step.clock()
        row, stop = real(*given, **named)
        found.losses.append(row.loss)
        return row, stop

    with patch.object(loop, "take_step", step), kernels(asked), suppress(Enough):
        train.train(training_job(run, folder, report, noise, stand_in_text))
    found.idle = idle.share()
    found.first_s = ends[1] - ends[0]
    found.seconds = [after - before for before, after in pairwise(ends[1:])]
    return found


@contextmanager
def kernels(asked: Asked) -> Iterator[None]:
    """Which kernels the product may take inside; plain loops before and after it take any, as torch does."""
    with ExitStack() as stack:
        if asked.any_kernels:
            stack.enter_context(patch.object(train, "use_repeatable_kernels", lambda device: None))
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)


class _Idle:
    """How long a device waits, by torch's profiler; where that does not work the other figures of a case are kept."""

    def __init__(self, device: str) -> None:
        self._device, self._profiler = device, None

    def start(self) -> None:
        """Look from here on."""
        from torch.profiler import ProfilerActivity, profile

        try:
            started: Any = profile(activities=[getattr(ProfilerActivity, self._device.upper())])
            started.start()
        except RuntimeError as error:
            print(f"no idle share: {error}")
            return
        self._profiler = started

    def share(self) -> float:
        """Share of the time between the first and the last kernel (on the CPU: operation) in which none ran."""
        if self._profiler is None:
            return math.nan
        train_step.clock()
        self._profiler.stop()
        spans = sorted(
            (event.time_range.start, event.time_range.end)
            for event in self._profiler.events()
            if event.device_type.name == self._device.upper()
        )
        if not spans:
            return math.nan
        busy, reached = 0.0, spans[0][0]
        for start, end in spans:
            busy += max(0.0, end - max(start, reached))
            reached = max(reached, end)
        return float(1 - busy / (reached - spans[0][0]))


@contextmanager
def peak_memory(device: str) -> Iterator[Callable[[], tuple[float, str]]]:
    """Give the most memory that was held inside, GiB, and a note: torch's own count on a GPU, the process's on the CPU."""
    release()
    with peak_bytes() as sampled:
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()

        def peak() -> tuple[float, str]:
            if device == "cpu":
                return sampled[0] / GIB, "of the process"
            reserved = torch.cuda.max_memory_reserved() / GIB
            return torch.cuda.max_memory_allocated() / GIB, f"reserved {reserved:.2f} GiB"

        yield peak
    release()


def release() -> None:
    """Give back what no name holds any longer."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def seconds_of(work: Callable[[], Any]) -> float:
    """Wall time of a call, until the device has done all that it was asked for."""
    start = train_step.clock()
    work()
    return train_step.clock() - start
