"""Checks the options of `upscale` against a run, its versions and their models."""

from dataclasses import dataclass
from pathlib import Path

from deepfloyd_core.config.run import Run
from deepfloyd_core.config.stage3 import STAGE3, TABLE, TITLE
from deepfloyd_core.config.stages import UPSCALERS, Stage, tables
from deepfloyd_core.errors import ConfigError, DeepFloydError, attempt
from deepfloyd_core.preflight.drawn_from import BASE, asked_lora_faults, asked_loras, asked_version, lora_faults
from deepfloyd_core.preflight.versions import DrawnVersion, base_faults, drawn_version, is_missing
from deepfloyd_core.store.events import SERVING


@dataclass(frozen=True)
class UpscaleOptions:
    """The pictures that `upscale` is asked for."""

    pictures: Path  # a file or a folder
    version: str | None = None  # as of `drawn_version`; None: the one that serves, or with LoRAs the base model
    prompt: str = ""  # of pictures without a caption beside them
    seed: int = 0
    loras: tuple[str, ...] = ()  # such as version:3@0.7: all at once, in place of a version's
    stage: int = 2  # that upscales: 2, or Stage III

    @property
    def drawn_by(self) -> str:
        """The version that upscales."""
        return asked_version(self.version, self.loras)

    @property
    def versions(self) -> tuple[str, ...]:
        """The same, as `GenerateOptions` has it."""
        return (self.drawn_by,)


def own_picture_faults(options: UpscaleOptions) -> list[DeepFloydError]:
    """What can be said of the pictures and LoRAs without the run file."""
    # Not above: it takes pydantic's models of all jobs.
    from deepfloyd_core.sampling.own_pictures import picture_files

    faults: list[DeepFloydError] = []
    attempt(faults, picture_files, options.pictures)
    if options.stage == STAGE3 and options.loras:
        faults.append(ConfigError(f"{TITLE} is not trained, so it takes no LoRA. Leave out --lora."))
    if options.stage == STAGE3 and options.version not in (None, *SERVING, BASE):
        faults.append(ConfigError(f"{TITLE} is not trained, so it has no versions. Leave out --version."))
    return [*faults, *asked_lora_faults(options.loras, options.version)]


def upscaled_by(run: Run, options: UpscaleOptions) -> DrawnVersion:
    """The version that upscales. Raises as `drawn_version`."""
    return drawn_version(run, BASE if options.stage == STAGE3 else options.drawn_by)


def check_upscale(run: Run, options: UpscaleOptions, faults: list[DeepFloydError]) -> None:
    """All checks of the options that need no models, beside `own_picture_faults`."""
    if options.stage == STAGE3:
        if run.config.stage3 is None:
            faults.append(ConfigError(f"upscale --stage 3 needs {TITLE}: add a [{TABLE}] table with a model_flavour."))
        return
    if not run.config.upscalers:
        faults.append(ConfigError(f"upscale needs an upscaler: add a {tables(UPSCALERS)} table with a model_flavour."))
    if not is_missing(options.drawn_by):
        attempt(faults, drawn_version, run, options.drawn_by)


def upscale_model_faults(run: Run, options: UpscaleOptions, stage: Stage, folder: Path) -> list[DeepFloydError]:
    """Why a base model cannot upscale: a version or a LoRA that was trained on another one."""
    asked = attempt([], asked_loras, options.loras) or ()
    versions = [options.drawn_by, *(one.version for one in asked if one.version)]
    return [*lora_faults(run, asked, stage, folder, (stage,)), *base_faults(run, versions, stage, folder)]
