"""How much a model computes, and how long a device takes for it. No torch.

Three sums decide it: products, which a processor does fast; bytes that pass through memory, most of a small model's time;
and operations, each with its share of Python. `calibration` measures what each costs on a device. So a forecast of a step
holds for models of a million and of a billion parameters (benchmarks/plan_times.py).
"""

from collections.abc import Mapping

from deepfloyd_core.config.stage_run import Precision
from deepfloyd_core.store.manifest import Summary


class Work(Summary):
    """Sums over some operations."""

    flops: float = 0.0  # floating-point operations of convolutions, matrix products and attention
    bytes: float = 0.0  # of all tensors that an operation reads or writes
    calls: float = 0.0  # operations, views too

    def __add__(self, other: "Work") -> "Work":
        return Work(flops=self.flops + other.flops, bytes=self.bytes + other.bytes, calls=self.calls + other.calls)

    def times(self, count: float) -> "Work":
        """As often."""
        return Work(flops=self.flops * count, bytes=self.bytes * count, calls=self.calls * count)


def of_batch(one: Work, two: Work, batch: float) -> Work:
    """The work of a batch, from that of one and of two pictures: a larger one has as many operations. batch: also
    fractions, where pictures have another area than these.
    """
    return one + (two + one.times(-1)).times(batch - 1)


class Speed(Summary):
    """What a device does in a second."""

    flops: float  # of products
    bytes: float  # that operations without products read or write
    call_s: float  # seconds of an operation, whatever its size


Speeds = Mapping[Precision, Speed]


def seconds(work: Work, speed: Speed, on_cpu: bool) -> float:
    """How long some work takes. A GPU computes while the processor calls its next operations."""
    computed, called = work.flops / speed.flops + work.bytes / speed.bytes, work.calls * speed.call_s
    return computed + called if on_cpu else max(computed, called)
