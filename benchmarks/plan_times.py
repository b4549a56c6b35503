"""How near a plan's time and bytes come without an earlier run: forecast beside taken. Also `--run`, `--demo`, `--xxl`.

Every part calibrates as `deepfloyd plan` does, and then does the work, in one process on one thread. Seconds are of the
wall. The last column has the same ratio in CPU seconds, by a calibration in CPU seconds, which other load on the machine
hardly touches. Steps: a forward and a backward pass of a LoRA of rank 32, cases of `train_memory.py`. T5: of base size,
and with 9.5 GB of disk T5-XXL. The demo and a small run: each plan, then its run, by artifact, with bytes.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

from embeds import caption_chunks, make_run
from small_run import make_small_run
from train_memory import REAL, TINY, settings
from worlds import embed, one_set

from deepfloyd_core.adapters.lora import add_lora
from deepfloyd_core.models.calibration import measured_speeds
from deepfloyd_core.models.device import Device
from deepfloyd_core.models.folders import resolve
from deepfloyd_core.models.quantized import load_base
from deepfloyd_core.models.torch_device import computes_bf16
from deepfloyd_core.models.unet import order_channels_last
from deepfloyd_core.models.work import Work
from deepfloyd_core.planning.calibrated import JOB_S, fixed_s
from deepfloyd_core.planning.encoding import encoding_s
from deepfloyd_core.planning.plan import plan_run
from deepfloyd_core.planning.times import START
from deepfloyd_core.preflight.load import load_run
from deepfloyd_core.store.artifacts import all_artifacts
from deepfloyd_core.text.embeds import run_captions
from deepfloyd_core.training.costs import cost_request, default_cache, known_costs
from deepfloyd_core.training.measured_costs import step_costs
from deepfloyd_core.training.recompute import recompute_activations

ROOT, CPU = Path(__file__).parents[1], torch.device("cpu")
LEAST_S = 2.0  # of steps, at least two
CLOCKS = (time.perf_counter, time.process_time)


@dataclass(frozen=True)
class Compared:
    """Forecast and taken seconds, of the wall and of the CPU."""

    what: str
    forecast: tuple[float, float]
    took: tuple[float, float]

    def __str__(self) -> str:
        wall, cpu = (a / b for a, b in zip(self.forecast, self.took, strict=True))
        return f"| {self.what} | {self.forecast[0]:.2f} | {self.took[0]:.2f} | {wall:.2f} | {cpu:.2f} |"


def device(clock: Callable[[], float]) -> Device:
    """This machine, calibrated now."""
    speeds = measured_speeds(CPU, clock)
    return Device("a CPU", True, 0, 0, computes_bf16(CPU), speeds)


def timed(work: Callable[[], object], least_s: float, least: int) -> tuple[float, float]:
    """Seconds of a call, of the wall and of the CPU."""
    began, count = [clock() for clock in CLOCKS], 0
    while count < least or time.perf_counter() - began[0] < least_s:
        work()
        count += 1
    wall, cpu = ((clock() - start) / count for clock, start in zip(CLOCKS, began, strict=True))
    return wall, cpu


def steps(model: str, batch: int, edge: int, recomputes: bool) -> list[Compared]:
    """A training step, and a call without gradients."""
    config = settings(model, "no_change")
    stage, folder = config.flavour.stage, resolve(config.model, config.flavour.stage)
    unet = load_base(folder, True, torch.float32, "no_change", CPU)
    add_lora(unet, config, 0)
    if recomputes:
        recompute_activations(unet)
    order_channels_last(unet)
    x, t = torch.randn(batch, 3 * stage, edge, edge), torch.full((batch,), 500)
    text = torch.randn(batch, 77, unet.config.cross_attention_dim)
    pooled = torch.randn(batch, unet.time_embedding.linear_2.out_features)
    level = torch.full((batch,), 250) if stage == 2 else None

    def call() -> torch.Tensor:
        made: torch.Tensor = unet(x, t, text, class_labels=level, added_cond_kwargs={"pooled": pooled})[0]
        return made

    def step() -> None:
        call()[:, :3].square().mean().backward()

    request = cost_request(config, folder, (edge, edge))
    assert request is not None
    costs = known_costs(request, default_cache()) or step_costs(request)
    one = config.model_copy(update={"train_batch_size": batch, "gradient_checkpointing": recomputes})
    name = f"{model}, batch {batch}, {edge} px{', recomputed' if recomputes else ''}"
    unet.train()
    found = [compared(f"{name}: step", costs.step_work(one), step)]
    if not recomputes:
        unet.eval()
        found.append(compared(f"{name}: call", costs.call_work(batch), torch.no_grad()(call)))
    return found


def compared(what: str, work: Work, measured: Callable[[], object]) -> Compared:
    """Calibrated and measured one after the other. The first call is not timed."""
    measured()
    forecast = [device(clock).seconds(work, "no") for clock in CLOCKS]
    return Compared(what, (forecast[0], forecast[1]), timed(measured, LEAST_S, 2))


def encoder(name: str, dtype: str, count: int) -> list[Compared]:
    """T5 by the product's job, without the imports of its process."""
    captions = caption_chunks(count, 1)[0]
    with tempfile.TemporaryDirectory() as folder:
        if name == "T5 of base size":
            run, model = make_run(Path(folder), dtype, 16)
            # As the user's own model: so the plan finds its shape.
            stage = run.config.stage(1).model_copy(update={"pretrained_model_name_or_path": str(model)})
            run = replace(run, config=run.config.model_copy(update={"stage1": stage}))
            embed(run, model, ["warm up"])
        else:
            keys = {"model_flavour": "random:i-medium-400m"}
            run = one_set(Path(folder), 1, {}, device="cpu", num_threads=1, text_encoder_dtype=dtype, stage1=keys)
            model = resolve(run.config.stage(1).model, 1, text=True)
        texts = run_captions(run, captions)
        forecast = [encoding_s(run, texts, len(texts), each) + fixed_s(each, JOB_S) for each in map(device, CLOCKS)]
        took = timed(lambda: embed(run, model, captions), 0, 1)
    return [Compared(f"{name}, {dtype}, {len(texts)} texts", (forecast[0], forecast[1]), took)]


def demo() -> None:
    """Print plans beside their runs: of the demo, and of the small data set that tests train on."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(ROOT / "datasets", folder / "datasets")
        shutil.copy(ROOT / "flows" / "configs" / "demo.toml", folder)
        beside_its_run("demo", folder / "demo.toml", folder)
    with tempfile.TemporaryDirectory() as name:
        small = make_small_run(Path(name) / "small")
        beside_its_run("small run", small.config, small.folder)


def beside_its_run(what: str, file: Path, folder: Path) -> None:
    """Print a plan beside the run, by artifact. folder: where commands are given."""
    workspace = folder / "workspace-of-plan"
    overrides = (f"workspace={workspace}", "num_threads=1")
    os.chdir(folder)
    began = time.perf_counter()
    plan = plan_run(load_run(file, overrides))
    planned = time.perf_counter() - began
    command = [Path(sys.executable).with_name("deepfloyd"), "run", str(file)]
    command += [word for override in overrides for word in ("--set", override)]
    began = time.perf_counter()
    subprocess.run(command, check=True, env=os.environ | {"PREFECT_HOME": str(folder / "home")}, capture_output=True)
    took = time.perf_counter() - began
    assert plan.seconds is not None
    print(f"\nload {os.getloadavg()[0]:.1f}, the plan took {planned:.1f} s\n")
    print(
        f"| {what} | forecast, s | took, s | of it | forecast, kB | took, kB | of it |\n|---|--:|--:|--:|--:|--:|--:|"
    )
    every = 0
    for artifact in sorted(all_artifacts(workspace), key=lambda each: each.manifest.provenance.started):
        written = sum(file.bytes for file in artifact.manifest.files)
        every += written
        cells = line(plan.times[artifact.kind].seconds, artifact.manifest.provenance.seconds, ".1f")
        print(
            f"| {artifact.kind} | {cells} | {line(plan.disk.artifacts[artifact.kind] / 1e3, written / 1e3, ',.0f')} |"
        )
    print(f"| beside them | {plan.times[START].seconds:.1f} | | | | | |")
    written_kb = sum(plan.disk.artifacts.values()) / 1e3
    print(f"| all | {line(plan.seconds, took, '.0f')} | {line(written_kb, every / 1e3, ',.0f')} |", flush=True)


def line(forecast: float, took: float, form: str) -> str:
    """Three cells."""
    return f"{forecast:{form}} | {took:{form}} | {forecast / took:.2f}" if took else f"{forecast:{form}} | |"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", action="store_true", help="real sizes of UNets too: a quarter of an hour")
    parser.add_argument("--xxl", action="store_true", help="T5-XXL too: 9.5 GB of disk and 10 GiB of memory")
    parser.add_argument("--demo", action="store_true", help="the demo too: 3 to 6 minutes")
    parser.add_argument("--only", default="", help="only parts whose name has this")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    wanted = parser.parse_args()
    torch.set_num_threads(1)
    if wanted.child:
        function, arguments = json.loads(wanted.child)
        print(*globals()[function](*arguments), sep="\n", flush=True)
        return
    parts: list[tuple[str, list[object]]] = []
    for case in TINY + REAL if wanted.run else TINY:
        parts += [("steps", [*case, recomputes]) for recomputes in (False, True)]
    parts += [("encoder", ["T5 of base size", "fp32", 60]), ("encoder", ["T5 of base size", "bf16", 60])]
    parts += [("encoder", ["T5-XXL", "bf16", 8])] if wanted.xxl else []
    print(f"load {os.getloadavg()[0]:.1f}\n")
    print("| what | forecast, s | took, s | forecast of it | in CPU seconds |\n|---|--:|--:|--:|--:|", flush=True)
    for part in (part for part in parts if wanted.only in str(part)):
        subprocess.run([sys.executable, __file__, "--child", json.dumps(part)], check=True)
    if wanted.demo:
        demo()


if __name__ == "__main__":
    main()
