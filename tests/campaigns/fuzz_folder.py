"""A data set to damage: its folder, its run, and its index without other processes."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from data_world import DataWorld

from deepfloyd_core.config.data_sets import ImageDataset
from deepfloyd_core.config.run import Run
from deepfloyd_core.processes.pool import Children, Limits, Lost

T = TypeVar("T")
R = TypeVar("R")


class Here(Children):
    """Judges pictures in this process, which has limits of its own."""

    def __init__(self) -> None:
        super().__init__(1, Limits())

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R | Lost]:
        """As the real one, without what it guards against."""
        yield from map(function, items)


def new_world(folder: Path) -> DataWorld:
    """An empty world of pictures in a folder."""
    (folder / "pictures").mkdir(parents=True)
    return DataWorld(folder, Here())


def data_run(folder: Path, entry: dict[str, Any]) -> tuple[Run, ImageDataset]:
    """The run of Stage I on a new world, and its data set."""
    # So that a picture that says it is large is refused, and does not take seconds.
    run = new_world(folder).load(entry, stages=(1,), max_rejected_share=1.0, decode_memory_mib=256)
    return run, run.datasets[0]
