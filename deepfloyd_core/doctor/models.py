"""The models of a run: present with their size, to be written, to be downloaded, or out of reach."""

from dataclasses import dataclass

from deepfloyd_core.config.run import Run
from deepfloyd_core.config.stage3 import STAGE3, DrawnStage
from deepfloyd_core.doctor.finding import Finding, told
from deepfloyd_core.errors import ModelError
from deepfloyd_core.models.folders import folder_here, is_on_hub, size_on_hub
from deepfloyd_core.models.sizes import random_bytes
from deepfloyd_core.store.counts import size


@dataclass(frozen=True)
class ModelUse:
    """A model that a run loads."""

    stage: DrawnStage
    model: str  # a directory, a hub id, `random:...`
    text: bool  # its text encoder too
    trained: bool  # False: only `generate` and `upscale` load it

    @property
    def name(self) -> str:
        """Of its finding."""
        return f"stage{self.stage} model"


@dataclass(frozen=True)
class ModelState:
    """What is known of a model."""

    use: ModelUse
    finding: Finding | None  # None: it must be downloaded, and nobody has asked the hub yet
    coming: int = 0  # bytes that will be written into the cache
    from_hub: bool = False  # it must be downloaded


def models_of(run: Run) -> list[ModelUse]:
    """The models of the stages of a run."""
    config = run.config
    uses = [ModelUse(n, config.stage(n).model, n == config.first_stage, True) for n in config.stages]
    return [*uses, *([ModelUse(STAGE3, config.stage3.model, True, False)] if config.stage3 else [])]


def look_here(use: ModelUse) -> ModelState | None:
    """A model on this machine. None: it is damaged or no model at all, which the check of the run file has told."""
    try:
        folder = folder_here(use.model, use.stage, use.text)
        if folder is None and is_on_hub(use.model):
            return ModelState(use, None, from_hub=True)
    except ModelError as error:
        return None if use.trained else ModelState(use, told(use.name, error, "note"))
    if folder is None:
        count = random_bytes(use.model, use.text)
        text = f"{use.model}: {size(count)} of random weights will be written before it is used first"
        return ModelState(use, Finding(use.name, "fine", text), count)
    held = size(sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()))
    text = f"{held} in {folder}" if str(folder) == use.model else f"{use.model}: {held} in {folder}"
    return ModelState(use, Finding(use.name, "fine", text))


def ask_for(use: ModelUse) -> ModelState:
    """Ask the hub for a model that is not here: how large it is, or why it does not come."""
    try:
        count = size_on_hub(use.model, use.stage, use.text)
    except ModelError as error:
        return ModelState(use, told(use.name, error, "fault" if use.trained else "note"), from_hub=True)
    text = f"{use.model}: {size(count)} will be downloaded before it is used first"
    return ModelState(use, Finding(use.name, "fine", text), count, from_hub=True)
