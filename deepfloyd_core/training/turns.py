"""Which part of a step a rank computes: some of its batches, or a part of each."""

from dataclasses import dataclass
from functools import reduce
from itertools import chain
from operator import add
from typing import TypeVar

from deepfloyd_core.config.run import RunConfig
from deepfloyd_core.config.stage import StageConfig
from deepfloyd_core.config.stage_run import ranks_fault
from deepfloyd_core.config.stages import Stage

T = TypeVar("T")


@dataclass(frozen=True)
class Turns:
    """The turns of a rank in each step: forward passes, one after the other, by whole batches of the run."""

    rank: int
    ranks: int
    per_step: int
    passes: int  # batches of a step
    pass_size: int  # the most samples that are computed at once
    cuts: bool  # each rank has a part of each batch

    def number(self, turn: int) -> int:
        """The batch of the run that a turn computes, or a part of; turns are counted over the run."""
        step, place = divmod(turn, self.per_step)
        return step * self.passes + (place if self.cuts else place * self.ranks + self.rank)

    def parts(self, parts: list[T]) -> list[T]:
        """Those of a batch's micro-batches that are this rank's; none where a short batch has fewer than there are ranks."""
        return parts[self.rank :: self.ranks] if self.cuts else parts

    def loss(self, by_rank: list[list[float]]) -> float:
        """The loss of a step from those of every rank's turns, summed in the order of one process."""
        by_turn = list(zip(*by_rank, strict=True))
        return reduce(add, (reduce(add, each, 0.0) for each in by_turn) if self.cuts else chain(*by_turn), 0.0)


def ranks_of(config: RunConfig, stage: Stage, gpus: int) -> int:
    """How many processes share the steps of a stage. gpus: on this machine, 0 or 1 without one: `auto` takes as many as
    they and the batches allow.
    """
    if config.num_processes != "auto":
        return config.num_processes
    counts = range(max(1, gpus), 0, -1)  # one process always can
    return next(count for count in counts if not ranks_fault(config.stage(stage), count, config.exact_ranks))


def of_a_rank(config: StageConfig, ranks: int) -> StageConfig:
    """The settings of a training that computes what each rank does, as far as memory and time go."""
    turns = turns_of(config, 0, ranks)
    if not turns.cuts:
        return config.model_copy(update={"gradient_accumulation_steps": turns.per_step})
    part = -(-config.train_batch_size // ranks)
    return config.model_copy(update={"train_batch_size": part, "micro_batch_size": min(part, turns.pass_size)})


def turns_of(config: StageConfig, rank: int = 0, ranks: int = 1) -> Turns:
    """The turns of a rank. `ranks` divides the batches of a step or the samples of a batch, see `ranks_fault`."""
    passes = config.gradient_accumulation_steps
    cuts = passes % ranks > 0
    size = min(config.pass_size, -(-config.train_batch_size // ranks)) if cuts else config.pass_size
    return Turns(rank, ranks, passes if cuts else passes // ranks, passes, size, cuts)
