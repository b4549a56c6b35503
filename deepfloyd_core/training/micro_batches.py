"""Micro-batches: a batch goes through the UNet in parts, whose gradients add up to those of the whole.

The batch is prepared as ever: its crops, draws and texts do not depend on the parts. The loss is a mean over samples and
nothing in a UNet mixes samples, so the sum of the parts' losses, each by its share of the batch, is the loss of the batch up
to the rounding of sums. Dropout is the exception: torch draws it for all samples of a pass. The part that a forward pass
holds in memory is what makes a step large, so parts take less; each is one more pass of small products.

A training may be continued with another size, or on another number of ranks. Its later steps then round otherwise, so both
are kept, by steps, beside its checkpoints, and go into its manifest.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from deepfloyd_core.config.stage import StageConfig
from deepfloyd_core.errors import ConfigError
from deepfloyd_core.files import read_note, write_note
from deepfloyd_core.training.forward import Prepared, TrainingContext, batch_loss
from deepfloyd_core.training.turns import turns_of

_SIZES, _RANKS = ".micro_batches.json", ".ranks.json"


def add_gradients(context: TrainingContext, prepared: Prepared) -> float:
    """Add the gradients of a batch to those of its optimizer step. Returns its part of the step's loss."""
    whole, loss = len(prepared.fed.x), 0.0
    every = micro_batches(prepared, context.turns.pass_size)
    parts = [(part, len(part.fed.x) / whole) for part in context.turns.parts(every)]
    if (
        context.shards is not None
    ):  # whose passes all ranks make together: what one has more the others make for nothing
        parts += [(every[0], 0.0)] * (max(context.ranks.gathered(len(parts))) - len(parts))
    for part, share in parts:
        own = batch_loss(context, part) * share / context.config.gradient_accumulation_steps
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


def check_separable(unet: torch.nn.Module, config: StageConfig, ranks: int = 1) -> None:
    """Raise ConfigError when batches are to be cut and a model has dropout itself; of adapters it is refused earlier."""
    by_ranks = turns_of(config, 0, ranks).cuts
    if config.pass_size == config.train_batch_size and not by_ranks:
        return
    table = f"stage{config.flavour.stage}"
    how = (
        f"{ranks} processes share each batch" if by_ranks else f"{table}.micro_batch_size is {config.micro_batch_size}"
    )
    then = f"Set {table}.gradient_accumulation_steps to a multiple of {ranks}" if by_ranks else "Remove the key"
    for name, module in unet.named_modules():
        if isinstance(module, torch.nn.Dropout) and module.p:
            raise ConfigError(
                f"{how}, and the model has a dropout of {module.p} ({name}), which is drawn for whole batches. {then}; "
                "gradient_checkpointing takes less memory too."
            )


@dataclass(frozen=True)
class KeptSizes:
    """What the rounding of sums depends on, by the first step, counted from 0, that has it; before the first one batches are
    whole, and one process computes.
    """

    micro_batches: dict[int, int] = field(default_factory=dict)
    ranks: dict[int, int] = field(default_factory=dict)


def keep_sizes(out: Path, step: int, context: TrainingContext) -> KeptSizes:
    """Keep with which sizes the steps from `step` on are computed; of what an earlier process has kept the later steps are
    forgotten, for they are done again. Returns the sizes of all steps.
    """
    config = context.config
    sizes = [(_SIZES, config.train_batch_size, config.pass_size), (_RANKS, 1, context.ranks.size)]
    return KeptSizes(*(_keep(out / name, config.steps, step, usual, value) for name, usual, value in sizes))


def _keep(file: Path, steps: int, step: int, usual: int, value: int) -> dict[int, int]:
    known = {first: kept for first, kept in _read(file).items() if first < step}
    if step < steps and value != [usual, *known.values()][-1]:
        known[step] = value
    if known or file.exists():
        write_note(file, json.dumps(known).encode())
    return known


def _read(file: Path) -> Mapping[int, int]:
    note = read_note(file)
    return {} if note is None else {int(step): int(size) for step, size in json.loads(bytes(note)).items()}


def _part(value: Any, samples: slice) -> Any:
    """Some samples of a value whose tensors and sequences have one entry for each sample."""
    if isinstance(value, torch.Tensor | list | tuple):
        return value[samples]
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{each.name: _part(getattr(value, each.name), samples) for each in fields(value)})
    return value
