"""Pre-training of the tiny cascade: `python -m deepfloyd_core.tiny.make.pretrain stage1 --work build/tiny`.

The only data is the drawn world: each batch is drawn when it is needed (0.3 ms a picture of 64 px). The UNets work at
any resolution, so most steps run small (Stage I at 32 px, Stage II on 64 px windows of 256 px pictures) and only the
last ones at full size: 4 to 8 times cheaper. The T5 is trained with Stage I at 32 px, then frozen. Each stage uses one
thread, so that both run at the same time on two cores. The state is saved every 200 steps; the same command continues
from it.
"""

import argparse
import copy
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import T5Tokenizer

from deepfloyd_core.tiny.make import models
from deepfloyd_core.tiny.make.objective import CAPTIONS, DROPPED, Phase, draw_batch, draw_windows, epsilon_loss
from deepfloyd_core.training.optimizers import optimizer_state, restore_optimizer

log = logging.getLogger("tiny")
STATE = {1: "stage1.safetensors", 2: "stage2.safetensors"}
SHIPPED = Path(__file__).parents[1]  # the folders i/ and ii/ lie beside this module


STAGE1_PHASES: tuple[Phase, ...] = (Phase(32, 24, 900, 2e-3), Phase(64, 8, 500, 8e-4), Phase(64, 12, 900, 1.2e-3))
STAGE1_PHASES += (Phase(64, 12, 1000, 1.2e-3, strange=0.35), Phase(64, 12, 900, 1.2e-3, strange=0.5))
STAGE2_PHASES: tuple[Phase, ...] = (Phase(64, 12, 800, 2e-3), Phase(128, 4, 500, 8e-4), Phase(256, 2, 300, 5e-4))
# Then mostly low noise levels: a fine low-res says what to paint, and only so can a small model learn to copy it exactly.
STAGE2_PHASES += (
    Phase(128, 4, 1200, 1.5e-3, noise_power=3.0),
    Phase(128, 4, 900, 1.5e-3, noise_power=3.0, blind=0.5),
    Phase(256, 2, 250, 6e-4, noise_power=3.0, blind=0.5),
    Phase(128, 4, 1000, 1.5e-3, noise_power=3.0, blind=0.5, late=0.15),
    Phase(256, 2, 250, 6e-4, noise_power=3.0, blind=0.5, late=0.15),
    # Trained on the 12 captions alone it paints grounds and colours from memory, 5 dB beside the low-res it was given.
    Phase(128, 4, 1400, 1.5e-3, noise_power=3.0, blind=0.25, late=0.3, strange=0.7),
    Phase(256, 2, 300, 6e-4, noise_power=3.0, blind=0.25, late=0.3, strange=0.4),
    Phase(128, 4, 700, 1.2e-3, noise_power=3.0, blind=0.15, late=0.15, rolled=0.6, strange=0.4),
    Phase(256, 2, 150, 5e-4, noise_power=3.0, blind=0.15, late=0.15, rolled=0.6, strange=0.4),
    Phase(128, 4, 1500, 1.5e-3, noise_power=3.0, blind=0.1, late=0.1, rolled=0.7, strange=0.4),
    Phase(256, 2, 100, 4e-4, noise_power=3.0, blind=0.1, late=0.1, rolled=0.7, strange=0.4),
    Phase(128, 4, 1600, 1.5e-3, noise_power=3.0, blind=0.1, late=0.1, rolled=0.8, strange=0.5),
    Phase(256, 2, 120, 4e-4, noise_power=3.0, blind=0.1, late=0.1, rolled=0.8, strange=0.5),
)
SAVE_EVERY = 200
EMA = 0.998
SEED = 20


def phase_of(step: int, phases: tuple[Phase, ...]) -> tuple[Phase, int]:
    """The phase a step belongs to and the step's number within it."""
    for phase in phases:
        if step < phase.steps:
            return phase, step
        step -= phase.steps
    raise IndexError("past the last phase")


def learning_rate(phase: Phase, step: int) -> float:
    """50 steps of warm-up, then a cosine to 2 %."""
    cosine = 0.51 + 0.49 * math.cos(math.pi * step / phase.steps)
    return phase.learning_rate * cosine * min(1.0, (step + 1) / 50)


@dataclass
class Run:
    """One stage's training state: modules, their moving averages, optimiser, step, seconds spent."""

    modules: torch.nn.ModuleDict
    averages: torch.nn.ModuleDict
    optimiser: torch.optim.Optimizer
    path: Path
    step: int = 0
    seconds: float = 0.0

    @classmethod
    def start(cls, path: Path, **modules: torch.nn.Module) -> "Run":
        """Begin, or continue from the file at `path`."""
        trained = torch.nn.ModuleDict(modules)
        optimiser = torch.optim.AdamW(trained.parameters(), lr=1e-3, weight_decay=1e-3, fused=True)
        run = cls(trained, copy.deepcopy(trained).requires_grad_(False), optimiser, path)
        if path.exists():
            run._restore()
        return run

    def _restore(self) -> None:
        tensors = load_file(self.path)
        _fill(self.modules, _below(tensors, "modules."))
        _fill(self.averages, _below(tensors, "averages."))
        numbers: dict[str, Any] = {"params": {}, "groups": [{}]}  # AdamW has none beyond its settings
        restore_optimizer(self.optimiser, self._named, _below(tensors, "optimiser."), numbers)
        self.step, self.seconds = int(tensors["step"]), float(tensors["seconds"])

    @property
    def _named(self) -> dict[str, torch.nn.Parameter]:
        return dict(self.modules.named_parameters())

    def update(self, loss: torch.Tensor, rate: float) -> None:
        """One AdamW step, then the moving average."""
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
        self.optimiser.step()
        self.step += 1
        decay = min(EMA, (self.step + 1) / (self.step + 20))
        with torch.no_grad():
            for mean, now in zip(self.averages.parameters(), self.modules.parameters(), strict=True):
                mean.lerp_(now, 1 - decay)

    def save(self) -> None:
        """Write the state beside its final place, then rename: a killed run leaves the last whole file."""
        tensors = {"step": torch.tensor(self.step), "seconds": torch.tensor(self.seconds, dtype=torch.float64)}
        tensors |= {f"modules.{name}": tensor.detach() for name, tensor in self.modules.named_parameters()}
        tensors |= {f"averages.{name}": tensor for name, tensor in self.averages.named_parameters()}
        state, _ = optimizer_state(self.optimiser, self._named)
        tensors |= {f"optimiser.{name}": tensor for name, tensor in state.items()}
        save_file(tensors, self.path.with_suffix(".part"))
        self.path.with_suffix(".part").replace(self.path)


def _below(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _fill(module: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Load parameters by name; of tied ones (T5's table) there is one, and the modules have no buffers."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(tensors[name])


def train(run: Run, phases: tuple[Phase, ...], loss_of: Any) -> None:
    """Train to the end of the last phase. `loss_of(phase, rng)` draws a batch and returns its loss."""
    total = sum(phase.steps for phase in phases)
    recent: list[float] = []
    while run.step < total:
        began = time.perf_counter()
        phase, step = phase_of(run.step, phases)
        torch.manual_seed(SEED * 1_000_003 + run.step)
        loss = loss_of(phase, np.random.default_rng((SEED, run.step)))
        run.update(loss, learning_rate(phase, step))
        recent.append(float(loss.detach()))
        run.seconds += time.perf_counter() - began
        if run.step % SAVE_EVERY == 0 or run.step == total:
            run.save()
        if run.step % 50 == 0:
            log.info("step %d/%d %d px loss %.4f %.0f s", run.step, total, phase.side_px, np.mean(recent), run.seconds)
            recent.clear()


def train_stage1(work: Path) -> None:
    """Stage I; one caption in ten is dropped. The T5 trains along in the first phase, then its average is frozen."""
    tokenizer = T5Tokenizer.from_pretrained(work / "tokenizer")
    run = Run.start(work / STATE[1], unet=models.stage1_unet(), text=models.text_encoder())

    def loss_of(phase: Phase, rng: np.random.Generator) -> torch.Tensor:
        if run.step == STAGE1_PHASES[0].steps:
            run.modules["text"].load_state_dict(run.averages["text"].state_dict())
        pixels, numbers = draw_batch(rng, phase.batch, phase.side_px, phase.strange, any_ground=False)
        numbers[torch.from_numpy(rng.random(phase.batch) < 0.1)] = DROPPED
        with torch.set_grad_enabled(phase is STAGE1_PHASES[0]):
            rows = models.embed(tokenizer, run.modules["text"], CAPTIONS)  # 13 captions once, whatever the batch
        return epsilon_loss(run.modules["unet"], pixels, rows[numbers], phase)

    train(run, STAGE1_PHASES, loss_of)


def train_stage2(work: Path) -> None:
    """Stage II: the first windows on the rows of the untrained T5, so that it can start with Stage I."""
    tokenizer = T5Tokenizer.from_pretrained(work / "tokenizer")
    run = Run.start(work / STATE[2], unet=models.stage2_unet())
    rows_of: dict[bool, torch.Tensor] = {}

    def loss_of(phase: Phase, rng: np.random.Generator) -> torch.Tensor:
        early = phase in STAGE2_PHASES[:2]
        if early not in rows_of:
            with torch.no_grad():
                text = models.text_encoder() if early else finished_text(work)
                rows_of[early] = models.embed(tokenizer, text, CAPTIONS)
        pixels, low, numbers = draw_windows(rng, phase)
        numbers[torch.from_numpy(rng.random(phase.batch) < 0.1)] = DROPPED
        return epsilon_loss(run.modules["unet"], pixels, rows_of[early][numbers], phase, low)

    train(run, STAGE2_PHASES, loss_of)


def load_average(path: Path, name: str, module: torch.nn.Module) -> torch.nn.Module:
    """A module with its moving average from a state file; as initialised where there is no file yet."""
    if path.exists():
        _fill(module, _below(load_file(path), f"averages.{name}."))
    return module.eval().requires_grad_(False)


def finished_text(work: Path) -> torch.nn.Module:
    """The frozen T5; waits for it where Stage I is still in its first phase."""
    while True:
        found = int(load_file(work / STATE[1])["step"]) if (work / STATE[1]).exists() else 0
        if found > STAGE1_PHASES[0].steps:
            return load_text(work)
        log.info("stage 2 waits for stage 1 to freeze its T5 (at step %d)", found)
        time.sleep(30)


def load_text(work: Path) -> torch.nn.Module:
    """The T5 of the latest Stage I state."""
    return load_average(work / STATE[1], "text", models.text_encoder())


def export(work: Path, out: Path) -> None:
    """Write both pipelines as stock folders `out/i` and `out/ii`: UNets in fp16 (2.9 MB each), the T5 in fp32."""
    tokenizer = T5Tokenizer.from_pretrained(work / "tokenizer")
    for stage, fresh in (("i", models.stage1_unet()), ("ii", models.stage2_unet())):
        state = work / STATE[len(stage)]
        pipe = models.pipeline(stage, load_average(state, "unet", fresh).half(), load_text(work), tokenizer)
        pipe.save_pretrained(out / stage)
        (out / stage / "tokenizer" / "spiece.model").write_bytes((work / "tokenizer" / "spiece.model").read_bytes())
        for path in (out / stage).rglob("*.safetensors"):
            path.chmod(0o644)  # safetensors writes 0600


def run_step(steps: Mapping[str, Callable[[Path], None]], export: Callable[[Path, Path], None]) -> None:
    """Run the step that the command line names, in the folder of state files, or `export` from there."""
    parser = argparse.ArgumentParser(description="Run one step; the README beside this module has their order.")
    parser.add_argument("what", choices=[*steps, "export"])
    parser.add_argument("--work", type=Path, required=True, help="state files; build/tiny for one")
    parser.add_argument("--out", type=Path, default=SHIPPED, help="where export writes its folders")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    if args.what == "export":
        export(args.work, args.out)
    else:
        steps[args.what](args.work)


def main() -> None:
    """Run one step of the pre-training; see the README beside this module for the order."""
    run_step(
        {
            "tokenizer": lambda work: models.train_tokenizer(work / "tokenizer"),
            "stage1": train_stage1,
            "stage2": train_stage2,
        },
        export,
    )


if __name__ == "__main__":
    main()
