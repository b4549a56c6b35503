"""Memory of one step of training a LoRA: nothing recomputed, what diffusers recomputes, and ours. `--run` for real sizes.

One forward and one backward pass in fp32 on random input, each way in a process of its own on one thread. Memory is what the
process itself holds (anonymous, sampled every 20 ms): before the step, mostly weights, and at its highest. The frozen
weights are as `--base-model-precision` says, several in turn; what they take is counted beside that, and loading them has a
peak of its own. `random:` weights have the real architecture; that of ii-medium-450m is a stand-in of its size. The forecast
is that of `deepfloyd plan`, for the same peak, without the optimizer's states; of diffusers' way there is none.
"""

import argparse
import json
import subprocess
import sys
import time
from typing import get_args

import torch
from worlds import own_bytes, peak_bytes

from deepfloyd_core.adapters.lora import add_lora
from deepfloyd_core.config.stage import StageConfig
from deepfloyd_core.config.stage_method import BasePrecision
from deepfloyd_core.models.folders import resolve
from deepfloyd_core.models.quantized import frozen_bytes, load_base
from deepfloyd_core.training.costs import PROGRAM, cost_request, step_parts
from deepfloyd_core.training.measured_costs import step_costs
from deepfloyd_core.training.recompute import recompute_activations

WAYS = ("nothing", "diffusers", "ours")
# Model, batch, and edge of what is trained on, px: Stage II's crops, or windows of them (`stage2_patch`).
TINY = (("tiny-i", 4, 64), ("tiny-ii", 1, 256), ("tiny-ii", 1, 128), ("tiny-ii", 1, 64))
REAL = (
    ("random:i-medium-400m", 1, 64), ("random:i-medium-400m", 4, 64), ("random:ii-medium-450m", 1, 256),
    ("random:ii-medium-450m", 1, 128), ("random:ii-medium-450m", 1, 64),
)  # fmt: skip


def child(way: str, model: str, batch: int, edge: int, precision: str, size: int) -> None:
    """One step in this process, in micro-batches of a size. Prints one JSON line."""
    torch.set_num_threads(1)
    config = settings(model, precision)
    stage = config.flavour.stage
    with peak_bytes() as loading:
        folder, cpu = resolve(config.model, stage), torch.device("cpu")
        unet = load_base(folder, True, torch.float32, config.base_model_precision, cpu)
    add_lora(unet, config, 0)
    unet.train()
    if way == "diffusers":
        unet.enable_gradient_checkpointing()
    elif way == "ours":
        recompute_activations(unet)
    x = torch.randn(batch, 3 * stage, edge, edge)
    text = torch.randn(batch, 77, unet.config.cross_attention_dim)
    pooled = torch.randn(batch, unet.time_embedding.linear_2.out_features)
    level = torch.full((batch,), 250) if stage == 2 else None
    before, start = own_bytes(), time.perf_counter()
    with peak_bytes() as peak:
        for part in (slice(start, start + size) for start in range(0, batch, size)):
            own = None if level is None else level[part]
            inputs = x[part], torch.full((len(x[part]),), 500), text[part]
            made = unet(*inputs, class_labels=own, added_cond_kwargs={"pooled": pooled[part]})[0]
            (made[:, :3].square().mean() * (len(made) / batch)).backward()
    seconds, held = time.perf_counter() - start, {"frozen": frozen_bytes(unet), "loading": loading[0]}
    print(json.dumps({**held, "before": before, "peak": peak[0], "seconds": seconds}))


def settings(model: str, precision: str) -> StageConfig:
    """Of all cases of a model."""
    keys = {"model_flavour": model, "lora_rank": 32, "mixed_precision": "no", "base_model_precision": precision}
    return StageConfig.model_validate(keys)


def forecast(way: str, model: str, batch: int, edge: int, precision: str, size: int) -> int | None:
    """Bytes of the peak, as a plan has them; None for a way that no run file asks for."""
    if way == "diffusers":
        return None
    keys = {"train_batch_size": batch, "micro_batch_size": size, "gradient_checkpointing": way == "ours"}
    config = settings(model, precision).model_copy(update=keys)
    request = cost_request(config, resolve(config.model, config.flavour.stage), (edge, edge))
    assert request is not None
    parts = step_parts(config, step_costs(request), on_cpu=True)
    return PROGRAM + sum(parts.values()) - parts["optimizer"]


def measured(way: str, model: str, batch: int, edge: int, precision: str, size: int) -> list[str]:
    """The cells of a line, from a process of its own."""
    command = [sys.executable, __file__, "--child", way, model, str(batch), str(edge), precision, str(size)]
    out = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
    found = json.loads(out.splitlines()[-1])
    gib = {name: found[name] / 2**30 for name in ("frozen", "loading", "before", "peak")}
    sizes = [f"{size:.2f}" for size in (*gib.values(), gib["peak"] - gib["before"])]
    told = forecast(way, model, batch, edge, precision, size)
    compared = [f"{told / 2**30:.2f}", f"{told / found['peak']:.2f}"] if told else ["", ""]
    return [model, str(batch), str(size), str(edge), way, precision, *sizes, *compared, f"{found['seconds']:.1f}"]


def main() -> None:
    """Print a line for each way and model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", action="store_true", help="measure real sizes too: half an hour, and 16 GB of memory")
    parser.add_argument("--only", default="", help="only models whose name has this")
    parser.add_argument("--batch", type=int, help="only cases with this one")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    precisions = get_args(BasePrecision)
    parser.add_argument("--base-model-precision", nargs="+", choices=precisions, default=["no_change"])
    parser.add_argument("--micro-batch-size", type=int, help="at most so many pictures in one pass; else whole batches")
    parser.add_argument("--child", nargs=6, help=argparse.SUPPRESS)
    wanted = parser.parse_args()
    if wanted.child:
        way, model, batch, edge, precision, size = wanted.child
        child(way, model, int(batch), int(edge), precision, int(size))
        return
    heads = ("model", "batch", "in parts of", "edge, px", "recomputed", "base_model_precision", "frozen weights, GiB",
             "loading, GiB", "before, GiB", "peak, GiB", "step takes, GiB", "forecast, GiB", "of the peak", "s")  # fmt: skip
    print(f"| {' | '.join(heads)} |\n" + "|---" * len(heads) + "|")
    cases = [case for case in (TINY + REAL if wanted.run else TINY) if wanted.only in case[0]]
    for case in (case for case in cases if wanted.batch in (None, case[1])):
        for way in wanted.ways:
            for precision in wanted.base_model_precision:
                cells = measured(way, *case, precision, wanted.micro_batch_size or case[1])
                print(f"| {' | '.join(cells)} |", flush=True)
    if not wanted.run:
        print("\nReal sizes were not measured: add --run.")


if __name__ == "__main__":
    main()
