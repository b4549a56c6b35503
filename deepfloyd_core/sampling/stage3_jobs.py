"""Stage III as jobs take it, and what identifies it. No torch."""

from pathlib import Path

from deepfloyd_core.config.base import Spec
from deepfloyd_core.config.keys import read_by
from deepfloyd_core.config.run import RunConfig
from deepfloyd_core.config.stage3 import PARTS, STAGE3, TABLE, Stage3Config
from deepfloyd_core.models.folders import resolve
from deepfloyd_core.models.identity import model_fingerprint
from deepfloyd_core.types import Json

LANCZOS = "lanczos"  # what enlarges where the run file has no Stage III


class Stage3(Spec):
    """What makes pictures four times as large at the end: a model, or without one Lanczos' filter."""

    settings: Stage3Config | None = None
    model: Path | None = None  # its folder; with `settings`

    @property
    def identity(self) -> Json:
        """The settings that decide the bytes."""
        return {TABLE: LANCZOS if self.settings is None else read_by(self.settings, "generated")}

    @property
    def inputs(self) -> dict[str, str]:
        """The fingerprint of the model."""
        return {} if self.model is None else {f"{TABLE}_model": model_fingerprint(self.model, PARTS)}

    def recorded(self, negative_prompt: str) -> Json:
        """What its PNGs record, beside what they have of the stages before it."""
        if self.settings is None:
            return {"stage": STAGE3, "negative_prompt": negative_prompt, "enlarged_by": LANCZOS}
        return {
            "stage": STAGE3,
            "steps": self.settings.validation_num_inference_steps,
            "scheduler": None,  # the model's own
            "guidance": self.settings.validation_guidance,
            "negative_prompt": negative_prompt,
            "noise_level": self.settings.validation_noise_level,
            "model": self.settings.model_flavour,
        }


def stage3_of(config: RunConfig) -> Stage3:
    """The Stage III of a run, its model downloaded if it must be. Raises ModelError as `resolve` does."""
    if config.stage3 is None:
        return Stage3()
    return Stage3(settings=config.stage3, model=resolve(config.stage3.model, STAGE3))
