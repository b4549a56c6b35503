"""The forecast of what sampling takes beside what it took: each model of real size in a process of its own, on a CPU.

    python benchmarks/sampling_memory.py --run [--only x4]

`random:` weights have the real architecture. Memory is what the process holds beyond what it held before the model was
loaded (sampled every 20 ms), over one step of one picture with guidance, from loading on. Memory of its own: the
weights' file, of bf16, is mapped only to be read, and converted to fp32.
"""

import argparse
import json
import subprocess
import sys
import threading
import time

import torch
from worlds import own_bytes

from deepfloyd_core.config.run_machine import Machine
from deepfloyd_core.config.stage import StageConfig
from deepfloyd_core.config.stage3 import STAGE3, Stage3Config
from deepfloyd_core.config.stages import STAGES
from deepfloyd_core.models.folders import resolve
from deepfloyd_core.sampling.forecasts import pictures_at_once, stage3_forecast
from deepfloyd_core.sampling.jobs import SampledStage
from deepfloyd_core.sampling.sampler import make_sampler, sample
from deepfloyd_core.sampling.stage3 import make_enlarger
from deepfloyd_core.sampling.stage3_jobs import Stage3

# Model, precision, and edge of what it makes, px.
CASES = (
    ("random:i-medium-400m", "no", 64), ("random:i-large-900m", "no", 64), ("random:i-large-900m", "no", 128),
    ("random:ii-medium-450m", "no", 256), ("random:ii-medium-450m", "no", 512), ("random:ii-large-1.2b", "no", 256),
    ("random:x4-upscaler", "no", 256), ("random:x4-upscaler", "no", 512), ("random:x4-upscaler", "no", 1024),
)  # fmt: skip
CPU = Machine(device="cpu", num_threads=2)


def child(model: str, precision: str, edge: int) -> None:
    """Forecast, then one step. Prints one JSON line."""
    torch.set_num_threads(2)
    if model == "random:x4-upscaler":
        settings = Stage3Config(model_flavour=model, mixed_precision=precision, validation_num_inference_steps=1)
        stage3 = Stage3(settings=settings, model=resolve(settings.model, STAGE3))
        forecast = stage3_forecast(stage3, [(edge // 4, edge // 4)], CPU)
        with _Peak() as peak:
            enlarge = make_enlarger(stage3, CPU, lambda _: None)
            enlarge(torch.zeros(1, 3, edge // 4, edge // 4), "x", "", 0)
    else:
        keys = {"model_flavour": model, "mixed_precision": precision, "validation_num_inference_steps": 1}
        config = StageConfig.model_validate(keys)
        stage = config.flavour.stage
        one = SampledStage(stage=stage, settings=config, model=resolve(config.model, stage))
        _, forecast = pictures_at_once(one, [(edge, edge)], CPU)
        text = torch.zeros(1, 77, 4096)
        given = torch.zeros(1, 3, edge // 4, edge // 4) if STAGES[stage].is_upscaler else None
        with _Peak() as peak:
            sample(make_sampler(one, None, CPU, lambda _: None), text, text, [0], (edge, edge), given)
    assert forecast is not None
    print(json.dumps({"weights": forecast.weights, "call": forecast.call, "took": peak.bytes}))


class _Peak:
    """The most that this process held inside the block, beyond what it held before."""

    def __enter__(self) -> "_Peak":
        self.bytes, self._done = 0, threading.Event()
        before = own_bytes()

        def watch() -> None:
            while not self._done.wait(0.02):
                self.bytes = max(self.bytes, own_bytes() - before)

        threading.Thread(target=watch, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()


def main() -> None:
    """Print a line for each case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", action="store_true", help="measure: 20 minutes, 9 GB of memory and 10 GB of disk")
    parser.add_argument("--only", default="", help="only models whose name has this")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    wanted = parser.parse_args()
    if wanted.child:
        child(wanted.child[0], wanted.child[1], int(wanted.child[2]))
        return
    heads = (
        "model",
        "precision",
        "edge, px",
        "weights, GB",
        "call, GB",
        "forecast, GB",
        "took, GB",
        "forecast of it",
        "s",
    )
    print(f"| {' | '.join(heads)} |\n|---|---|" + "--:|" * (len(heads) - 2))
    if not wanted.run:
        print("\nNothing was measured: add --run.")
        return
    for model, precision, edge in (case for case in CASES if wanted.only in case[0]):
        began = time.monotonic()
        command = [sys.executable, __file__, "--child", model, precision, str(edge)]
        found = json.loads(
            subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout.splitlines()[-1]
        )
        told = found["weights"] + found["call"]
        cells = [found["weights"], found["call"], told, found["took"]]
        shown = [f"{cell / 1e9:.2f}" for cell in cells]
        print(f"| {model} | {precision} | {edge} | {' | '.join(shown)} | {told / found['took']:.2f} | "
              f"{time.monotonic() - began:.0f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
