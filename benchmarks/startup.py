"""How long commands take that have little to do: `python benchmarks/startup.py`, some 4 minutes on two idle cores.

Both are of the tiny cascade. `no change`: a retrain of a version that is current. `one picture`: one of both stages with the
base models, of another seed each time. Cold: each command starts a Prefect server of its own, and stops it. Joined: while
`deepfloyd ui` runs. Wall seconds; CPU seconds are of all processes that a cold command waits for.

Sampling: CPU seconds of this process over the same pictures, by our job's loop and by diffusers' own pipelines, in turns.
"""

import argparse
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

from small_run import SmallRun, make_small_run
from unattended import Ui

from deepfloyd_core.models.folders import resolve
from deepfloyd_core.models.unet import load_scheduler, load_unet, stock_pipeline
from deepfloyd_core.preflight.load import load_run
from deepfloyd_core.sampling.jobs import SampledStage
from deepfloyd_core.sampling.sampler import make_sampler, sample_from_text, sample_upscaled

FAST = ("--set", "stage1.max_train_steps=2", "--set", "stage2.max_train_steps=2")


def seconds(run: SmallRun, home: Path, *arguments: str) -> tuple[float, float]:
    """Wall and CPU seconds of a command."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        run.command(*arguments), env=os.environ | {"PREFECT_HOME": str(home)}, cwd=run.folder, capture_output=True
    )
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@contextmanager
def ui(home: Path, project: Path) -> Iterator[None]:
    """`deepfloyd ui` runs in this block."""
    project.mkdir()
    (project / "prefect.yaml").write_text("name: startup\ndeployments: []\n")
    running = Ui(project, home)
    running.start()
    try:
        yield
    finally:
        running.stop(signal.SIGINT)


def commands(folder: Path, times: int) -> None:
    """Print the seconds of commands."""
    run, home = make_small_run(folder / "run"), folder / "home"
    home.mkdir(mode=0o700)
    seconds(run, home, "run", str(run.config), *FAST)  # publishes what is current then
    seeds = iter(range(10_000))

    def picture() -> tuple[float, float]:
        return seconds(
            run, home, "generate", str(run.config), "--prompt", "a red circle", "--version", "base", "--seeds",
            str(next(seeds)),
        )  # fmt: skip

    def nothing() -> tuple[float, float]:
        return seconds(run, home, "retrain", str(run.config), *FAST)

    print("| command | server | wall s | CPU s |\n|---|---|--:|--:|")
    for server in ("cold", "joined"):
        with ui(home, folder / "project") if server == "joined" else _nothing():
            for name, command in (("one picture", picture), ("no change", nothing)):
                found = [command() for _ in range(times)]
                wall, cpu = (statistics.median(column) for column in zip(*found, strict=True))
                print(f"| {name} | {server} | {wall:.1f} | {cpu:.1f} |", flush=True)


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def sampling(folder: Path, pictures: int) -> None:
    """Print the CPU seconds of both loops."""
    run = load_run(make_small_run(folder / "sampling", 1).config, ("stage1.validation_num_inference_steps=10",
                   "stage2.validation_num_inference_steps=10", "stage2.validation_guidance=3.0"))  # fmt: skip
    text = torch.randn(1, 77, 64, generator=torch.Generator().manual_seed(0)) * 0.2
    ours: list[Any] = []
    stock: list[Any] = []
    for stage in run.config.stages:
        settings = run.config.stage(stage)
        folder_of = resolve(settings.model, stage)
        one = SampledStage(stage=stage, settings=settings, model=folder_of)
        ours.append(make_sampler(one, None, run.config, lambda _: None))
        stock.append(stock_pipeline(folder_of, stage, load_unet(folder_of, torch.float32), load_scheduler(folder_of)))

    def by_us(seed: int) -> None:
        small = sample_from_text(ours[0], text, -text, [seed], (64, 64))
        sample_upscaled(ours[1], text, -text, [seed], small)

    def by_diffusers(seed: int) -> None:
        common = {
            "prompt_embeds": text,
            "negative_prompt_embeds": -text,
            "num_inference_steps": 10,
            "guidance_scale": 3.0,
        }
        small = stock[0](**common, generator=torch.Generator().manual_seed(seed), output_type="pt").images
        stock[1](**common, image=small, width=256, height=256, noise_level=100, output_type="pt",
                 generator=torch.Generator().manual_seed(seed))  # fmt: skip

    spent: dict[str, float] = {"ours": 0.0, "diffusers": 0.0}
    loops: dict[str, Callable[[int], None]] = {"ours": by_us, "diffusers": by_diffusers}
    for seed in range(-1, pictures):  # the first turn is not counted
        for name, loop in loops.items():
            began = time.process_time()
            loop(max(seed, 0))
            spent[name] += (time.process_time() - began) * (seed >= 0)
    each = ", ".join(f"{name} {total / pictures:.2f}" for name, total in spent.items())
    print(f"\nsampling, CPU s a picture: {each}; ratio {spent['ours'] / spent['diffusers']:.3f}")


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=5, help="that each command is called; medians are told")
    parser.add_argument("--pictures", type=int, default=8, help="that are sampled by each loop")
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        commands(Path(folder), wanted.times)
        sampling(Path(folder), wanted.pictures)


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    main()
