"""Shows a training in TensorBoard or W&B, beside the flow run. Their files contain times, so they are not in an artifact.

Their libraries are imported only when they are used. accelerate's trackers are not used: they need its process state,
and its TensorBoard tracker cannot drop the steps after a checkpoint.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from deepfloyd_core.errors import JobError
from deepfloyd_core.store.artifacts import workspace_of
from deepfloyd_core.store.inventory import tensorboard_folder
from deepfloyd_core.training.checkpoints import StepMetrics
from deepfloyd_core.training.eval_loss import HELD_OUT, SEEN, GridLoss, mean_loss
from deepfloyd_core.types import Json

PROJECT = "deepfloyd"  # in W&B, unless WANDB_PROJECT names another
# For the last upload; the data stays on disk, and a lost network must not delay the artifact.
_FINISH_S = 300.0
_FLUSH_S = 1.0  # of data that W&B's own file may lose when a process is killed; 15 by default
_MEASURED = "loss/"  # begins the names of a validation's figures

# Shows numbers, and pictures from their files, of a step.
MetricLogger = Callable[[int, dict[str, float], Sequence[Path]], None]


@contextmanager
def open_loggers(
    trackers: Sequence[str], settings: Json, out: Path, done: Sequence[StepMetrics]
) -> Iterator[MetricLogger]:
    """The trackers of `report_to` as one, for the artifact that is made in `out`; without trackers it shows nothing.

    settings: what W&B lists of the run; done: the metrics of the steps that a resumed run has done. Raises JobError
    when W&B cannot be reached.
    """
    name, workspace = f"{out.parent.name}-{out.name}", workspace_of(out)
    with ExitStack() as stack:
        boards: list[MetricLogger] = []
        if "tensorboard" in trackers:
            folder = tensorboard_folder(workspace, f"{out.parent.name}/{out.name}")
            boards.append(stack.enter_context(_tensorboard(folder, len(done))))
        if "wandb" in trackers:
            boards.append(stack.enter_context(_wandb(workspace, name, settings, done)))

        def show(step: int, values: dict[str, float], pictures: Sequence[Path]) -> None:
            for board in boards:
                board(step, values, pictures)

        yield show


@contextmanager
def _tensorboard(folder: Path, first: int) -> Iterator[MetricLogger]:
    """TensorBoard; steps after `first` that a killed process wrote are not shown."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder), purge_step=first + 1) as writer:

        def show(step: int, values: dict[str, float], pictures: Sequence[Path]) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)
            for path in pictures:
                writer.add_image(_tag(path), np.asarray(Image.open(path)), step, dataformats="HWC")

        yield show


@contextmanager
def _wandb(workspace: Path, name: str, settings: Json, done: Sequence[StepMetrics]) -> Iterator[MetricLogger]:
    """A W&B run whose id is the artifact's name, so that a resumed training continues in it. settings: shown with the run.

    W&B accepts no step twice. Steps after the checkpoint that a killed process had shown stay, because they are done
    again with the same figures; a validation that it had not reached is shown at the first free step. Steps before the
    checkpoint that were still in its buffer are shown now; offline these are all steps, in a file of this process.
    """
    import wandb

    given = wandb.setup().settings.model_fields_set  # by its environment variables and files
    try:
        run = wandb.init(
            id=name, name=None if "run_name" in given else name, resume="allow", config=settings,
            project=None if "project" in given else PROJECT, dir=None if "root_dir" in given else str(workspace.absolute()),
            settings=wandb.Settings(
                console="off", disable_git=True, save_code=False, finish_timeout=_FINISH_S,
                x_transaction_log_flush_interval=_FLUSH_S,
            ),
        )  # fmt: skip
    except (wandb.errors.Error, TimeoutError) as error:
        why = " ".join(str(error).split()).rstrip(".")
        raise JobError(f"W&B cannot be reached: {why}. WANDB_MODE=offline keeps the metrics on this machine.") from None
    with run:
        free = run.step

        def show(step: int, values: dict[str, float], pictures: Sequence[Path]) -> None:
            figures = {name: value for name, value in values.items() if step >= free or name.startswith(_MEASURED)}
            shown = {_tag(path): wandb.Image(str(path)) for path in pictures}
            if figures or shown:
                run.log({**figures, **shown}, step=max(step, free))

        for row in done:
            show(row.step, shown_metrics(row), ())
        yield show


def _tag(picture: Path) -> str:
    return f"validation/{picture.stem}"


def shown_metrics(row: StepMetrics) -> dict[str, float]:
    """A step's metrics under their names."""
    return {"loss": row.loss, "lr": row.lr, "grad_norm": row.grad_norm}


def show_validation(show: MetricLogger, step: int, losses: list[GridLoss], pictures: Sequence[Path]) -> None:
    """Show the result of `Validation.take`."""
    means = {f"{_MEASURED}{part}": mean_loss(losses, part) for part in (HELD_OUT, SEEN)}
    show(step, {name: mean for name, mean in means.items() if mean is not None}, pictures)
