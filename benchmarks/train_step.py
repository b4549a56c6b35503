"""A step of training a LoRA, ours beside a plain loop: seconds, peak memory, and what is not arithmetic. `--run` for 400M.

Ours is the product's trainer on a stored stage text. `plain` is a loop as people write it after diffusers' DreamBooth
example for IF: the whole UNet in float32, T5's rows on its input, torch's AdamW over LoRA weights, the same rank,
targets, batch and pictures. Each runs in a process of its own, one warm-up step, then the steps that are timed. Memory:
what the process itself holds at its highest (on the CPU anonymous memory, sampled; on a GPU torch's own count). `random:`
weights have the real architecture; without `--run` only the shipped tiny model is measured.
"""

import argparse
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from worlds import one_set, peak_bytes, prepare

from deepfloyd_core.config.run import Run
from deepfloyd_core.config.stages import Stage
from deepfloyd_core.hashing import caption_id
from deepfloyd_core.index.ledger import caption_counts
from deepfloyd_core.models.folders import resolve
from deepfloyd_core.models.unet import DTYPES, load_scheduler, load_text_modules, load_unet
from deepfloyd_core.processes.jobs import Job
from deepfloyd_core.store.artifacts import Artifact, Request, materialise
from deepfloyd_core.store.manifest import Summary
from deepfloyd_core.text.embed_file import embed_schema, stored_row, write_embed_file
from deepfloyd_core.text.embeds import CAPTIONS, CAPTIONS_FILE, FILES
from deepfloyd_core.text.projection import Projected, projector, store, text_is_frozen
from deepfloyd_core.training import forward as stage_loss
from deepfloyd_core.training import trainer as train
from deepfloyd_core.training.batches import TrainingRows
from deepfloyd_core.training.jobs import TrainingInputs, TrainRequest, train_job
from deepfloyd_core.types import Report, no_report

TINY, REAL = "tiny-i", "random:i-medium-400m"
# One is held out; batches of 1, 2, 3, 4, 6 or 8 of the others are all whole: a compiled step has one size.
RANK, PICTURES, SIZES = 32, 25, {1: 64, 2: 256}
WAYS = ("plain", "ours", "compiled")  # the last with --dynamo-backend alone


class Enough(Exception):
    """The steps that are timed are done; what follows them in a run is not part of a step."""


def make_run(
    folder: Path, model: str, precision: str, batch: int, device: str, stage: Stage = 1, **keys: Any
) -> tuple[Run, Path]:
    """A run over a few pictures of noise, and its model folder. keys: of its stage."""
    (folder / "pictures").mkdir(exist_ok=True)
    for number in range(len(list((folder / "pictures").iterdir())), PICTURES):
        pixels = np.random.default_rng(number).integers(0, 256, (SIZES[stage], SIZES[stage], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "pictures" / f"caption {number}.png")
    settings = {"model_flavour": model, "train_batch_size": batch, "mixed_precision": precision,
                "max_train_steps": 1000, "learning_rate": 1e-4, **(keys or {"lora_rank": RANK})}  # fmt: skip
    common: dict[str, Any] = {"device": device, "num_eval_images": 1, f"stage{stage}": settings}
    if device == "cpu":
        common["num_threads"] = 1
    run = one_set(folder, stage, {"caption_strategy": "filename", "resolution": 64}, **common)
    return run, resolve(run.config.stage(stage).model, stage)


def stored_text(run: Run, folder: Path, captions: list[str]) -> Artifact:
    """A stage's text of random rows in T5's place: the trainer reads what it would read of real ones."""
    (stage,) = run.config.stages
    frozen, names = text_is_frozen(run.config.stage(stage)), sorted(captions, key=caption_id)
    rows = t5_rows(folder, len(names))

    def build(work: Any) -> Summary:
        if frozen:
            modules = load_text_modules(folder, DTYPES[run.config.stage(stage).mixed_precision])
            project = projector(modules, run.config.stage(stage).mixed_precision)
            by_id = dict(zip(map(caption_id, names), rows, strict=True))
            store(work.path, list(by_id), lambda name: project(by_id[name]), no_report)
        else:
            write_rows(work.path, names, rows)
        return Summary()

    request = Request(f"stage{stage}_text" if frozen else "text_embeds", 0, {"captions": names}, {})
    return materialise(run.workspace, request, build)


def write_rows(out: Path, texts: list[str], rows: torch.Tensor) -> None:
    """The embeds of texts that are sorted by their ids: one file, and the table that says so."""
    schema, stored = embed_schema("bf16", *rows.shape[1:], "none"), [stored_row(row, "none") for row in rows]
    write_embed_file(out / FILES.replace("*", "0"), texts, [1] * len(texts), stored, schema)
    keys, places = [int(caption_id(text), 16) for text in texts], list(range(len(texts)))
    columns = zip([keys, [0] * len(texts), places], CAPTIONS.types, strict=True)
    with pa.ipc.new_file(out / CAPTIONS_FILE, CAPTIONS) as writer:
        writer.write_batch(pa.record_batch([pa.array(*column) for column in columns], schema=CAPTIONS))


def t5_rows(folder: Path, count: int) -> torch.Tensor:
    """Random rows (count, 77, D) in bf16."""
    width = json.loads((folder / "unet/config.json").read_bytes())["encoder_hid_dim"]
    return torch.randn((count, 77, width), generator=torch.Generator().manual_seed(0)).bfloat16()


Data = tuple[Artifact, Artifact, list[str]]  # pixels, eval set, captions


def prepared(run: Run) -> Data:
    """A run's data, as the product makes it of the pictures."""
    from deepfloyd_core.crops.identity import eval_request
    from deepfloyd_core.crops.pixels import build_shards, plan_eval

    (stage,) = run.config.stages
    index, pixels = prepare(run, stage)
    eval_set = materialise(
        run.workspace, eval_request(run, index), lambda work: build_shards(plan_eval(run, index, work), work)
    )
    return pixels, eval_set, list(caption_counts(index))


def training_job(
    run: Run, folder: Path, report: Report, data: Callable[[Run], Data] = prepared,
    text: Callable[[Run, Path, list[str]], Artifact] = stored_text,
) -> Job[TrainRequest]:  # fmt: skip
    """A training of a run's stage into its workspace."""
    (stage,) = run.config.stages
    pixels, eval_set, captions = data(run)
    inputs = TrainingInputs(pixels=pixels, text=text(run, folder, [*captions, ""]), eval_set=eval_set)
    return Job(train_job(run, stage, folder, inputs, [], None), run.workspace, report)


def ours(run: Run, folder: Path, steps: int) -> tuple[list[float], float]:
    """Seconds of each step of the product's trainer, and the share of them outside forward, backward and optimizer."""
    ends: list[float] = []
    outside: list[float] = []

    def report(done: int, total: int, line: str) -> None:
        ends.append(clock())
        if len(ends) == steps + 1:
            raise Enough

    job = training_job(run, folder, report)
    parts: list[tuple[Any, str]] = [(TrainingRows, "take"), (Projected, "batch"), (stage_loss, "draw"), (stage_loss, "vary"),
                                    (stage_loss, "to_model_range"), (train, "learning_rate_at")]  # fmt: skip
    try:
        with timed(parts, outside):
            train.train(job)
    except Enough:
        pass
    seconds = [after - before for before, after in itertools.pairwise(ends)]
    return seconds, sum(outside) / (ends[-1] - ends[0]) * len(seconds) / (len(seconds) + 1)


@contextmanager
def timed(parts: list[tuple[Any, str]], spent: list[float]) -> Any:
    """Add the seconds of every call of some functions to a list."""

    def watched(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **named: Any) -> Any:
            start = time.perf_counter()
            result = call(*args, **named)
            spent.append(time.perf_counter() - start)
            return result

        return wrapper

    before = [getattr(owner, name) for owner, name in parts]
    for (owner, name), call in zip(parts, before, strict=True):
        setattr(owner, name, watched(call))
    try:
        yield
    finally:
        for (owner, name), call in zip(parts, before, strict=True):
            setattr(owner, name, call)


def plain(run: Run, folder: Path, steps: int) -> tuple[list[float], float]:
    """The same steps as people write them: everything in float32, T5's rows in every step."""
    from peft import LoraConfig

    config, device = run.config.stage(1), torch.device(run.config.device)
    unet = load_unet(folder, torch.float32).to(device)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj"]
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets))
    params = [param for param in unet.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-4)
    scheduler, rows = load_scheduler(folder), t5_rows(folder, PICTURES)
    pictures = [np.asarray(Image.open(path)) for path in sorted(Path(folder_of(run)).glob("*.png"))]
    batch, seconds = config.train_batch_size, []
    unet.train()
    for _ in range(steps + 1):
        start = clock()
        chosen = np.random.default_rng(0).integers(0, PICTURES, batch)
        x_0 = torch.from_numpy(np.stack([pictures[n] for n in chosen])).permute(0, 3, 1, 2).float() / 127.5 - 1
        noise, t = torch.randn(x_0.shape), torch.randint(0, 1000, (batch,))
        x_t = scheduler.add_noise(x_0, noise, t).to(device)
        text = rows[torch.from_numpy(chosen)].float().to(device)
        eps, _ = unet(x_t, t.to(device), text).sample.chunk(2, dim=1)
        torch.nn.functional.mse_loss(eps, noise.to(device)).backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(clock() - start)
    return seconds[1:], 0.0


def folder_of(run: Run) -> str:
    return str(run.datasets[0].instance_data_dir)


def clock() -> float:
    """Seconds, once the GPU has done all it was asked for."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def child(wanted: argparse.Namespace) -> None:
    """One way in this process. Prints one JSON line."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        keys = {"lora_rank": RANK} | ({"dynamo_backend": wanted.dynamo_backend} if wanted.child == "compiled" else {})
        run, folder = make_run(Path(name), wanted.model, wanted.precision, wanted.batch, wanted.device, **keys)
        with peak_bytes() as peak:
            seconds, outside = (plain if wanted.child == "plain" else ours)(run, folder, wanted.steps)
    memory = torch.cuda.max_memory_allocated() if wanted.device == "cuda" else peak[0]
    print(json.dumps({"seconds": seconds, "outside": outside, "bytes": memory}))


def measured(way: str, model: str, wanted: argparse.Namespace) -> dict[str, Any]:
    """Run one way in a process of its own."""
    command = [sys.executable, __file__, "--child", way, "--model", model, "--precision", wanted.precision,
               "--batch", str(wanted.batch), "--steps", str(wanted.steps), "--device", wanted.device,
               "--dynamo-backend", wanted.dynamo_backend]  # fmt: skip
    out = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
    return dict(json.loads(out.splitlines()[-1]))


def main() -> None:
    """Print a table for each model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", action="store_true", help=f"measure {REAL} too: minutes, and 4 GB of memory")
    parser.add_argument("--model", help="this one alone")
    parser.add_argument("--precision", choices=("no", "bf16"), default="bf16", help="mixed_precision of ours")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--dynamo-backend", choices=("no", "inductor", "aot_eager"), default="no", help="a third way: ours, compiled"
    )
    parser.add_argument("--child", choices=WAYS, help=argparse.SUPPRESS)
    wanted = parser.parse_args()
    if wanted.child:
        child(wanted)
        return
    where = (
        torch.cuda.get_device_name() if wanted.device == "cuda" else f"CPU ({torch.backends.cpu.get_cpu_capability()})"
    )
    print(
        f"{where}, {platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; torch {torch.__version__}"
    )
    for model in [wanted.model] if wanted.model else [TINY, REAL] if wanted.run else [TINY]:
        ways = WAYS if wanted.dynamo_backend != "no" else WAYS[:-1]
        found = {way: measured(way, model, wanted) for way in ways}
        print(f"\n### {model}, batch {wanted.batch}, rank {RANK}, ours with mixed_precision = {wanted.precision}\n")
        print(
            "| way | s a step, median | peak, GiB | not arithmetic | time, of plain | memory, of plain |\n"
            + "|---" * 6
            + "|"
        )
        for way, row in found.items():
            median = {name: float(np.median(one["seconds"])) for name, one in found.items()}
            shares = f"{median[way] / median['plain']:.2f} | {row['bytes'] / found['plain']['bytes']:.2f}"
            outside = f"{row['outside']:.2%}" if way != "plain" else ""
            print(f"| {way} | {median[way]:.3f} | {row['bytes'] / 2**30:.2f} | {outside} | {shares} |", flush=True)
    if not (wanted.run or wanted.model):
        print(f"\n{REAL} was not measured: add --run.")


if __name__ == "__main__":
    main()
