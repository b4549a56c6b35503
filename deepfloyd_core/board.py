"""TensorBoard files of a training, in `<workspace>/tensorboard/`; they hold times and so are no part of an artifact."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from deepfloyd_core.config import RunConfig
from deepfloyd_core.flavours import Stage
from deepfloyd_core.held_out import HELD_OUT, SEEN, mean_loss

FOLDER = "tensorboard"

# Shows numbers, and pictures from their files, of a step.
Board = Callable[[int, dict[str, float], Sequence[Path]], None]


@contextmanager
def open_board(config: RunConfig, stage: Stage, out: Path, first: int) -> Iterator[Board]:
    """The board of the artifact that is made in `out`; one that shows nothing unless `report_to` is tensorboard.

    first: the steps that a resumed run has done; what a killed process wrote of later ones is not shown.
    """
    if config.report_to == "none":
        yield lambda step, values, pictures: None
        return
    from torch.utils.tensorboard import SummaryWriter

    folder = out.parent.parent / FOLDER / f"{out.parent.name}-{out.name}"
    with SummaryWriter(str(folder), purge_step=first + 1) as writer:

        def show(step: int, values: dict[str, float], pictures: Sequence[Path]) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)
            for path in pictures:
                writer.add_image(f"validation/{path.stem}", np.asarray(Image.open(path)), step, dataformats="HWC")

        yield show


def show_validation(show: Board, step: int, losses: list[dict[str, Any]], pictures: Sequence[Path]) -> None:
    """What `Validation.take` gave."""
    show(step, {f"loss/{part}": mean_loss(losses, part) for part in (HELD_OUT, SEEN)}, pictures)
