"""Micro-batches: a batch goes through the UNet in parts, whose gradients add up to those of the whole.

The batch is prepared as ever: its crops, draws and texts do not depend on the parts. The loss is a mean over samples and
nothing in a UNet mixes samples, so the sum of the parts' losses, each by its share of the batch, is the loss of the batch up
to the rounding of sums. Dropout is the exception: torch draws it for all samples of a pass. The part that a forward pass
holds in memory is what makes a step large, so parts take less; each is one more pass of small products.

A training may be continued with another size. Its later steps then round otherwise, so the sizes are kept, by steps, beside
its checkpoints, and go into its manifest.
"""

import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from deepfloyd_core.config.stage import StageConfig
from deepfloyd_core.errors import ConfigError
from deepfloyd_core.files import read_note, write_note
from deepfloyd_core.training.forward import Prepared, TrainingContext, batch_loss

_SIZES = ".micro_batches.json"


def add_gradients(context: TrainingContext, prepared: Prepared) -> float:
    """Add the gradients of a batch to those of its optimizer step. Returns its part of the step's loss."""
    whole, loss = len(prepared.fed.x), 0.0
    for part in micro_batches(prepared, context.config.pass_size):
        own = batch_loss(context, part) * (len(part.fed.x) / whole) / context.config.gradient_accumulation_steps
        own.backward()
        loss += own.item()
    return loss


def micro_batches(prepared: Prepared, most: int) -> list[Prepared]:
    """A batch in parts of at most so many samples, as even as can be: the number of passes is what costs time."""
    whole = len(prepared.fed.x)
    count = -(-whole // most)
    if count == 1:
        return [prepared]
    edges = [whole * number // count for number in range(count + 1)]
    return [_part(prepared, slice(*both)) for both in pairwise(edges)]


def check_separable(unet: torch.nn.Module, config: StageConfig) -> None:
    """Raise ConfigError when batches are to be cut and a model has dropout itself; of adapters it is refused earlier."""
    if config.pass_size == config.train_batch_size:
        return
    for name, module in unet.named_modules():
        if isinstance(module, torch.nn.Dropout) and module.p:
            raise ConfigError(
                f"stage{config.flavour.stage}.micro_batch_size is {config.micro_batch_size}, and the model has a dropout of "
                f"{module.p} ({name}), which is drawn for whole batches. Remove the key; gradient_checkpointing takes less "
                "memory too."
            )


def keep_size(out: Path, step: int, config: StageConfig) -> dict[int, int]:
    """Keep that the steps from `step` on are computed with a size of micro-batches; of what an earlier process has kept the
    later steps are forgotten, for they are done again. Returns the sizes by the first step that has each, empty where no
    batch was ever cut.
    """
    known = {first: size for first, size in _read(out).items() if first < step}
    if step < config.steps and config.pass_size != [config.train_batch_size, *known.values()][-1]:
        known[step] = config.pass_size
    if known or (out / _SIZES).exists():
        write_note(out / _SIZES, json.dumps(known).encode())
    return known


def _read(out: Path) -> Mapping[int, int]:
    note = read_note(out / _SIZES)
    return {} if note is None else {int(step): int(size) for step, size in json.loads(bytes(note)).items()}


def _part(value: Any, samples: slice) -> Any:
    """Some samples of a value whose tensors and sequences have one entry for each sample."""
    if isinstance(value, torch.Tensor | list | tuple):
        return value[samples]
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: _part(getattr(value, field.name), samples) for field in fields(value)})
    return value
