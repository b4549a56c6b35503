"""A measure: one row of the table in `registry.py`. No torch: reports also read that table."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np
    import torch

    from deepfloyd_core.measures.comparison import Compared

# A method of upscaling and the noise level of its low-res pictures; None: a method without a model, which has none.
Enlargement = tuple[str, int | None]
Against = Literal["truth", "sample"]


@dataclass(frozen=True)
class Outputs:
    """The outputs of each method for the same low-res pictures. Pictures: uint8 (H, W, 3), in the order of the ground
    truths.
    """

    pictures: Mapping[Enlargement, Sequence["np.ndarray"]]
    truths: Sequence["np.ndarray"]


@dataclass(frozen=True)
class Figures:
    """The figures from a network, by the name of the measure: one for each picture, or one for all. None: too few
    pictures.
    """

    of_pictures: Mapping[str, Mapping[Enlargement, Sequence[float]]]
    of_sets: Mapping[str, Mapping[Enlargement, float | None]]


MeasureFn = Callable[[Outputs], Figures]


@dataclass(frozen=True)
class Network:
    """A network that measures pictures with the user's own weights; none are shipped or fetched."""

    key: str  # of the run file, with the path of the weights
    check: Callable[[Path], None]  # raises ConfigError unless the weights are there; loads nothing
    fingerprint: Callable[[Path], str]  # of the weights' bytes: an input of the samples that it measures
    load: Callable[[Path, "torch.device"], MeasureFn]


@dataclass(frozen=True)
class Measure:
    """One figure of upscaled pictures: its name and meaning, and either how it is computed or which network gives it."""

    name: str  # in summaries, and of its column in eval.parquet
    words: str
    unit: str = ""
    better: Literal["more", "less"] | None = None
    reading: str = ""  # where neither more nor less is better: how to read it
    head: str = ""  # of its column on the terminal, where the name does not do
    against: Against = "truth"  # of a held-out picture, or Stage I's sample, which has no ground truth
    of: Literal["picture", "set"] = "picture"  # a set's figure has no column
    share: tuple[str, str] | None = None  # columns of numerator and denominator; the mean is the ratio of their sums
    gains: bool = False  # summaries say by how much the last method is better than each other one
    compute: Callable[["Compared"], float | tuple[float, float]] | None = (
        None  # of one picture; a share's part and whole
    )
    network: Network | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for a measure that no code would compute."""
        if (self.compute is None) == (self.network is None):
            raise ValueError(f"The measure {self.name!r} needs either compute or a network.")
        if self.of == "set" and self.network is None:
            raise ValueError(f"The measure {self.name!r} is of a set; compute measures one picture. Give it a network.")
        if self.against == "sample" and self.network is not None:
            raise ValueError(f"The measure {self.name!r} is against samples; networks measure held-out pictures only.")

    @property
    def columns(self) -> tuple[str, ...]:
        """Its columns in eval.parquet."""
        return () if self.of == "set" else self.share or (self.name,)

    @property
    def meaning(self) -> str:
        """Its meaning in words, its unit, and which direction is better."""
        better = self.reading or f"{self.better} is better"
        return ", ".join(part for part in (self.words, self.unit, better) if part)

    @property
    def label(self) -> str:
        """Its name on the terminal."""
        return self.head or self.name.replace("_", " ")
