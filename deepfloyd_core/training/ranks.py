"""The processes of a training, which share each step: torch.distributed's ranks.

A step is what the configuration says, whatever the number of ranks: the same samples with the same draws, of which each
rank computes a part, and the gradients are summed over the ranks. So every rank makes the same step, and only the first
one writes. A rank's part is some of the step's batches where `gradient_accumulation_steps` can be shared out; else it is a
part of each batch, cut as micro-batches are.

Sums of floats depend on their order. Two ranks that share two batches end with the bytes of one process, because a sum of
two has one order. For more, `is_ordered` sums in the order of one process, at 2 to 6 times an all-reduce's time.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from deepfloyd_core.errors import ConfigError, JobError, LostPeerError
from deepfloyd_core.hashing import digest

# For the first rank a validation may take hours while the others wait. A rank that dies is noticed by its connections.
_PATIENCE = timedelta(days=2)
_LOCAL = "loopback"  # the name of a backend
_BUCKET = 2**24  # numbers that are summed at once, which are copied for it


@dataclass(frozen=True)
class Ranks:
    """A process of a training and how many there are. `ALONE` does without torch.distributed."""

    rank: int = 0
    size: int = 1
    is_ordered: bool = False  # gradients are summed in the order of one process

    @property
    def leads(self) -> bool:
        """Whether this process writes files, and reports."""
        return self.rank == 0

    def gathered(self, value: Any) -> list[Any]:
        """A value of each rank, in their order. All ranks call it. Raises LostPeerError when one of them is gone."""
        if self.size == 1:
            return [value]
        found = [None] * self.size
        with lost_peers():
            dist.all_gather_object(found, value)
        return found

    def of_first(self, value: Any) -> Any:
        """The first rank's value, for what may look different a moment later."""
        return self.gathered(value)[0]

    def wait(self) -> None:
        """Go on when all ranks are here."""
        self.gathered(None)

    def check_alike(self, tensors: Sequence[torch.Tensor], what: str) -> None:
        """Raise JobError when ranks hold different tensors, which would train different models from then on."""
        if self.size > 1 and len(set(self.gathered(_digest(tensors)))) > 1:
            raise JobError(f"{what} differs between the ranks of the training: their machines do not compute alike.")


ALONE = Ranks()


def threads_of_rank(asked: int | None, ranks: int) -> int | None:
    """Torch's threads in each rank: as asked for; else torch's own choice for one rank, and of several an equal part of
    it, for they compute at once.
    """
    return asked if asked or ranks == 1 else max(1, torch.get_num_threads() // ranks)


@contextmanager
def joined(rank: int, size: int, is_ordered: bool, device: torch.device, meeting: Path) -> Iterator[Ranks]:
    """In this block the ranks of a training are connected. meeting: a file that is not there before, which all can reach.

    Raises ConfigError where there are fewer GPUs than ranks: NCCL gives each one of its own.
    """
    if size == 1:
        yield ALONE
        return
    gpus = torch.cuda.device_count() if device.type == "cuda" else 1
    if device.type != "cpu" and gpus < size:
        raise ConfigError(
            f"num_processes is {size}, and each process needs a GPU of its own, of which this machine has {gpus}. Set it to "
            "auto, or device to cpu."
        )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        dist.Backend.register_backend(_LOCAL, _gloo_of_loopback, devices=["cpu"])
    backend, store = "nccl" if device.type == "cuda" else _LOCAL, dist.FileStore(str(meeting), size)
    with lost_peers():
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_PATIENCE)
    yield Ranks(rank, size, is_ordered)
    dist.destroy_process_group()  # not after an error: it would wait for ranks that are gone


def _gloo_of_loopback(store: dist.Store, rank: int, size: int, timeout: timedelta) -> dist.ProcessGroup:
    """gloo for this machine alone: by itself it listens where the network can reach it."""
    options = dist.ProcessGroupGloo._Options()
    options._devices, options._timeout = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")], timeout
    return dist.ProcessGroupGloo(store, rank, size, options)


class GradientSum:
    """Sums the gradients of a step over the ranks, after the turns in which each rank adds to its own."""

    def __init__(self, ranks: Ranks, params: Sequence[torch.nn.Parameter]) -> None:
        self._ranks, self._params = ranks, list(params)
        self._parts: list[torch.Tensor | None] = [None] * len(self._buckets())  # this rank's part of each ordered sum
        self._has = bytearray(len(self._params))  # whether each parameter has a gradient

    def add(self) -> None:
        """After a turn, also one in which this rank has had nothing to compute."""
        for place, param in enumerate(self._params):
            self._has[place] |= param.grad is not None
        if self._ranks.is_ordered:
            self._parts = [
                _add_ordered(part, _flat(bucket), self._ranks.size)
                for part, bucket in zip(self._parts, self._buckets(), strict=True)
            ]
            for param in self._params:
                param.grad = None

    @property
    def has(self) -> bytes:
        """Whether each parameter has a gradient of this rank, a byte each."""
        return bytes(self._has)

    def finish(self, has: Sequence[bytes]) -> None:
        """After the last turn: make each gradient the sum over turns and ranks. has: of every rank."""
        for part, bucket in zip(self._parts, self._buckets(), strict=True):
            with lost_peers():
                if part is None:
                    dist.all_reduce(whole := _flat(bucket))
                else:
                    whole = part.new_empty(part.numel() * self._ranks.size)
                    dist.all_gather(list(whole.chunk(self._ranks.size)), part)
            sizes = [param.numel() for param in bucket]
            for param, own in zip(bucket, whole[: sum(sizes)].split(sizes), strict=True):
                param.grad = own.view_as(param)
        for param, *ranks in zip(self._params, *has, strict=True):
            if not any(ranks):
                param.grad = None  # nobody's loss depends on it, and an optimizer passes over it

    def _buckets(self) -> list[list[torch.nn.Parameter]]:
        """Parameters that are summed together: neighbours of one type, as many as may be copied at once."""
        buckets: list[list[torch.nn.Parameter]] = []
        numbers = 0
        for param in self._params:
            if not buckets or buckets[-1][0].dtype != param.dtype or numbers + param.numel() > _BUCKET:
                buckets.append([])
                numbers = 0
            buckets[-1].append(param)
            numbers += param.numel()
        return buckets


def _flat(bucket: Sequence[torch.nn.Parameter]) -> torch.Tensor:
    """Their gradients in one tensor; zeros where there is none."""
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).detach().reshape(-1) for p in bucket])


def _add_ordered(total: torch.Tensor | None, own: torch.Tensor, size: int) -> torch.Tensor:
    """Add what every rank has to a total, one after the other. Each rank holds and sums an equal part of it."""
    length = -(-own.numel() // size)
    sent = torch.nn.functional.pad(own, (0, length * size - own.numel()))
    with lost_peers():
        dist.all_to_all_single(parts := torch.empty_like(sent), sent)
    for part in parts.view(size, length):
        total = part.clone() if total is None else total + part
    assert total is not None  # there are ranks
    return total


def _digest(tensors: Sequence[torch.Tensor]) -> str:
    return digest(*(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() for tensor in tensors))


@contextmanager
def lost_peers() -> Iterator[None]:
    """In this block what torch raises for a lost connection is a LostPeerError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # gloo has no class of its own
        raise LostPeerError(f"A rank of the training has lost another one: {error}") from error
