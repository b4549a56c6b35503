"""What the run file and the data file ask of each other, checked before anything is loaded."""

from deepfloyd_core.datafile import ImageDataset
from deepfloyd_core.errors import ConfigError
from deepfloyd_core.flavours import Flavour, Stage
from deepfloyd_core.mixing import first_gap, share_of


def check_datasets(flavour: Flavour, datasets: tuple[ImageDataset, ...], stage: Stage, steps: int) -> list[str]:
    """Raise ConfigError for a resolution that a stage's model cannot be trained at, or a step without a data set.

    Returns a note for each data set that the stage never comes to.
    """
    used: list[ImageDataset] = []
    for dataset in datasets:
        factor = dataset.factor(stage)
        if factor is None:
            continue
        used.append(dataset)
        edge = dataset.edge_px * factor
        said = f"{dataset.id}: resolution is {dataset.resolution:g}, {edge:g} px at stage {stage}; {flavour.name}"
        if dataset.resolution_type == "pixel" and edge % flavour.alignment_px:
            raise ConfigError(f"{said} needs a multiple of {flavour.alignment_px}. Set resolution = 64.")
        if edge > 2 * flavour.size_px:
            raise ConfigError(f"{said} makes {flavour.size_px} px. Set resolution = 64.")
    if not used:
        raise ConfigError(f"No data set feeds stage {stage}: {flavour.name} is trained at {flavour.size_px} px.")
    gap = first_gap(tuple(share_of(dataset) for dataset in used), steps)
    if gap is not None:
        raise ConfigError(
            f"No data set is drawn from in step {gap + 1} of stage {stage}: {', '.join(ds.id for ds in used)} all start "
            "later or have ended. Set start_step = 0 or remove end_step on one of them."
        )
    return [
        f"{dataset.id}: start_step is {dataset.start_step}, and stage {stage} has {steps} steps: it is never drawn from"
        for dataset in used
        if dataset.start_step >= steps
    ]
