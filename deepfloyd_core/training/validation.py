"""Validation during a training: losses on fixed draws, and samples of the stock pipeline with fixed seeds.

Stage I samples the validation prompts, or, with a ControlNet, from held-out conditioning pictures; an upscaler upscales
held-out pictures. The losses of a step are kept in a dot file until the training is finished, so that a killed run
keeps those before its checkpoint.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from diffusers import UNet2DConditionModel
from PIL import Image

from deepfloyd_core.config.stage import StageConfig
from deepfloyd_core.config.stages import STAGES, Stage
from deepfloyd_core.diffusion.loss import Text, to_bytes
from deepfloyd_core.errors import ArtifactError
from deepfloyd_core.files import atomic_path, read_note, write_note
from deepfloyd_core.hashing import caption_id
from deepfloyd_core.models.same_output import frozen
from deepfloyd_core.models.unet import autocast, stock_pipeline, trained_scheduler
from deepfloyd_core.pictures.sheets import save_picture, titled_rows
from deepfloyd_core.sampling.cascade import Sample, save_png
from deepfloyd_core.sampling.parts import counted
from deepfloyd_core.sampling.sampler import Sampler, sample
from deepfloyd_core.sampling.specs import SampleSpec
from deepfloyd_core.training.eval_loss import (
    HELD_OUT,
    GridLoss,
    GridPicture,
    Predict,
    grid_losses,
    mean_loss,
)
from deepfloyd_core.training.forward import TrainingContext, predictor
from deepfloyd_core.training.jobs import VALIDATION_FILE, VALIDATION_SHEET
from deepfloyd_core.training.ranks import ALONE, Ranks
from deepfloyd_core.types import Report

PICTURES = "validation"
_LOSSES = ".validation"
_LINES, _COLUMNS = 16, 8  # of the sheet


@dataclass(frozen=True)
class Validation:
    """Validates a UNet as it is in memory."""

    stage: Stage
    settings: StageConfig
    negative_prompt: str
    folder: Path  # of the base model
    unet: UNet2DConditionModel
    texts: Callable[[list[str]], Text]  # of caption ids, as the UNet takes them
    predict: Predict
    bars: torch.Tensor  # alpha_bar of each timestep, float32 (T,)
    grid: list[GridPicture]
    wanted: list[SampleSpec]  # none: only losses are taken
    out: Path
    report: Report
    # Where the losses at step 0 are kept as well: of a parent, which the summary compares with.
    kept: Path | None = None
    ranks: Ranks = ALONE  # each takes a part, and gets all losses

    def of(self, context: TrainingContext) -> "Validation":
        """The same of another UNet."""
        return replace(self, unet=context.unet, predict=predictor(context))

    def losses(self, of: str) -> list[GridLoss]:
        """The losses on the grid, see `grid_losses`. of: whose, for people."""
        self.unet.eval()
        line, rank, size = f"held-out losses {of}", self.ranks.rank, self.ranks.size
        own = self.grid[rank::size]
        losses = grid_losses(
            own, self.predict, self.settings.validation_noise_level, self.bars,
            lambda done, total: self.report(done * size, total * size, line),
        )  # fmt: skip
        points = len(losses) // len(own) if own else 0
        by_picture = [losses[first : first + points] for first in range(0, len(losses), points)] if own else []
        of_ranks = self.ranks.gathered(by_picture)
        return [row for number in range(len(self.grid)) for row in of_ranks[number % size][number // size]]

    def taken(self, step: int) -> bool:
        """Whether `take` has finished for a step, also in a process before."""
        return read_note(_losses_file(self.out, step)) is not None

    def take(self, step: int) -> tuple[list[GridLoss], list[Path]]:
        """Store the losses and make the pictures of a step; returns the losses, and the files of the pictures.

        The UNet is left in eval mode.
        """
        losses = self.losses(f"at step {step}")
        paths = _save_pictures(self, step)
        self.ranks.wait()
        if not self.ranks.leads:
            return losses, paths
        for out in (*([self.kept] if self.kept and step == 0 else []), self.out):  # the last one tells that it is taken
            _losses_file(out, step).parent.mkdir(exist_ok=True)
            write_note(_losses_file(out, step), json.dumps([vars(row) for row in losses]).encode())
        _save_sheet(self.stage, self.wanted, self.out)
        return losses, paths


def read_losses(out: Path, step: int) -> list[GridLoss]:
    """The stored losses of a step. Raises ArtifactError where there are none, or they are damaged."""
    file = _losses_file(out, step)
    losses = _read_losses(file)
    if losses is None:
        raise ArtifactError(f"{file} is missing or damaged. The same command again measures its step once more.")
    return losses


def damaged_losses(out: Path) -> int | None:
    """The first step whose stored losses are damaged: the training goes on from before it and measures it again. None: all
    are whole.
    """
    files = sorted((out / _LOSSES).glob("[0-9]*.json"))
    return next((int(file.stem) for file in files if read_note(file) is None), None)


def published_losses(file: Path) -> dict[tuple[str, str, int], float]:
    """The held-out losses of a finished training, from its validation.parquet, by picture, conditions and t."""
    rows = [row for row in pq.read_table(file).to_pylist() if row["model"] == "trained" and row["part"] == HELD_OUT]
    last = max((row["step"] for row in rows), default=0)
    return {(row["image_id"], row["conditions"], row["t"]): row["loss"] for row in rows if row["step"] == last}


def _read_losses(file: Path) -> list[GridLoss] | None:
    note = read_note(file)
    return None if note is None else [GridLoss(**row) for row in json.loads(bytes(note))]


def _losses_file(out: Path, step: int) -> Path:
    return out / _LOSSES / f"{step:08d}.json"


def _save_pictures(plan: Validation, step: int) -> list[Path]:
    """Sample the validation pictures and save PNGs. In fp32 they equal those of the stock pipeline with the product,
    bit for bit.
    """
    settings, stage, unet, texts = plan.settings, plan.stage, plan.unet, plan.texts
    folder = plan.out / PICTURES / f"step-{step:08d}"
    scheduler = trained_scheduler(plan.folder, settings.train_variance)
    pipeline = stock_pipeline(plan.folder, stage, unet, scheduler)
    sampled = counted(plan.report, len(plan.wanted), f"samples at step {step}") if plan.wanted else lambda count: None
    sampler = Sampler(stage, settings, pipeline, scheduler, unet.device, sampled)
    paths: list[Path] = []
    without = [caption_id(plan.negative_prompt)]
    for number, part in enumerate(_batches(plan.wanted, settings.sampled_at_once)):
        files = [folder / f"{len(paths) + place:03d}.png" for place in range(len(part))]
        paths += files
        if number % plan.ranks.size != plan.ranks.rank:
            sampled(len(part))
            continue
        text, negative = texts([caption_id(item.prompt) for item in part]), texts(without * len(part))
        seeds, found = (
            [item.seed for item in part],
            [item.input_picture for item in part if item.input_picture is not None],
        )
        inputs = torch.cat(found) if found else None
        with (
            frozen(unet),
            _pooled(unet, text, negative, settings.validation_guidance),
            autocast(unet.device, settings.mixed_precision),
        ):
            made = sample(sampler, text.rows, negative.rows, seeds, part[0].size, inputs)
        for item, picture, file in zip(part, to_bytes(made).numpy(), files, strict=True):
            save_png(picture, Sample(item.prompt, item.seed, f"step {step}", {"stage": stage}), file)
    return paths


def write_validations(
    base: list[GridLoss], stage: Stage, wanted: list[SampleSpec], out: Path
) -> list[tuple[int, float]]:
    """Write validation.parquet: step, model (base, trained) and the fields of GridLoss; and the sheet of the pictures.

    base: the losses of the base model. Returns the held-out loss of every validated step that has one.
    """
    table = [{"step": 0, "model": "base", **vars(row)} for row in base]
    for step, losses in _validated(out):
        table += [{"step": step, "model": "trained", **vars(row)} for row in losses]
    with atomic_path(out / VALIDATION_FILE) as tmp:
        pq.write_table(pa.Table.from_pylist(table), tmp)
    _save_sheet(stage, wanted, out)
    return held_out_losses(out)


def held_out_losses(out: Path) -> list[tuple[int, float]]:
    """The held-out loss of every step that was validated so far and has one."""
    means = [(step, mean_loss(losses)) for step, losses in _validated(out)]
    return [(step, mean) for step, mean in means if mean is not None]


def _validated(out: Path) -> Iterator[tuple[int, list[GridLoss]]]:
    for file in sorted((out / _LOSSES).glob("[0-9]*.json")):
        if (losses := _read_losses(file)) is not None:
            yield int(file.stem), losses


def _save_sheet(stage: Stage, wanted: list[SampleSpec], out: Path) -> None:
    """Draw the pictures of all validated steps, if there are any."""
    if folders := sorted((out / PICTURES).glob("step-*")):
        save_picture(_sheet(folders, stage, wanted), out / VALIDATION_SHEET)


def _sheet(folders: list[Path], stage: Stage, wanted: list[SampleSpec]) -> Image.Image:
    """A line for each validated step, at most _LINES of them, the first and the last among them."""
    chosen = sorted({round(place) for place in np.linspace(0, len(folders) - 1, min(len(folders), _LINES))})
    rows = []
    for folder in (folders[place] for place in chosen):
        files = sorted(folder.glob("[0-9]*.png"))[:_COLUMNS]
        rows.append(
            (f"step {int(folder.name.removeprefix('step-'))}", [np.asarray(Image.open(file)) for file in files])
        )
    kind = STAGES[stage]
    truths = [item.truth for item in wanted[:_COLUMNS] if item.truth is not None]
    if truths:
        inputs = [item.input_picture for item in wanted[:_COLUMNS] if item.input_picture is not None]
        label, shown = ("low-res", inputs) if kind.is_upscaler else ("conditioning", [item * 2 - 1 for item in inputs])
        rows = [(label, [to_bytes(item)[0].numpy() for item in shown]), *rows, ("truth", truths)]
    return titled_rows(rows, kind.sheet_px, f"{kind.title} during training, same seeds")


def _batches(wanted: list[SampleSpec], most: int) -> Iterator[list[SampleSpec]]:
    """Pictures of one size at a time, in their order."""
    part: list[SampleSpec] = []
    for item in wanted:
        if part and (len(part) == most or item.size != part[0].size):
            yield part
            part = []
        part.append(item)
    if part:
        yield part


@contextmanager
def _pooled(unet: UNet2DConditionModel, text: Text, negative: Text, guidance: float) -> Iterator[None]:
    """Give a UNet without text modules the pooled texts, which the stock pipeline cannot pass."""
    if text.pooled is None or negative.pooled is None:
        yield
        return
    # The order of the stock pipelines: negatives first, and none without guidance.
    both = torch.cat([negative.pooled, text.pooled]) if guidance > 1 else text.pooled
    added = {"pooled": both.to(unet.device)}
    hook = unet.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "added_cond_kwargs": added}), with_kwargs=True
    )
    try:
        yield
    finally:
        hook.remove()
