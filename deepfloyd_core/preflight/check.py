"""Checks everything before anything is made: one entry, and all faults of a round in one message. No torch.

There are three rounds; the next begins only when the last one had no fault. First, what lies on this machine: the run
file, the data file, model folders, weights to start from, a version to sample. Second, services: a cluster, W&B. Third,
models that must still be downloaded or written, one after the other up to the first fault: so no gigabytes are
downloaded for a run that cannot begin. A fault that only repeats another one is left out: for example, a UNet is not
reported when its folder is missing.
"""

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from deepfloyd_core.config.cluster import reach
from deepfloyd_core.config.run import Run, RunConfig
from deepfloyd_core.config.stage3 import STAGE3
from deepfloyd_core.config.stages import STAGES, Stage
from deepfloyd_core.errors import ConfigError, DeepFloydError, attempt, raise_together
from deepfloyd_core.models.folders import folder_here, resolve
from deepfloyd_core.preflight.drawn_again import lora_again_faults
from deepfloyd_core.preflight.drawn_from import asked_loras
from deepfloyd_core.preflight.generate import (
    GenerateOptions,
    check_generate,
    drawn_stages,
    generate_model_faults,
    prompt_faults,
    trained_stages,
)
from deepfloyd_core.preflight.load import read_run
from deepfloyd_core.preflight.machine import machine_faults, machine_notes
from deepfloyd_core.preflight.schedulers import check_scheduler, check_stage3_scheduler
from deepfloyd_core.preflight.unet_sizes import check_unet, stage3_faults, training_size_faults
from deepfloyd_core.preflight.upscale import UpscaleOptions, check_upscale, own_picture_faults, upscale_model_faults
from deepfloyd_core.preflight.versions import fetch_from_hub
from deepfloyd_core.preflight.wandb_login import check_wandb
from deepfloyd_core.store.events import standing

if TYPE_CHECKING:
    from deepfloyd_core.adapters.start_from import Parent

log = logging.getLogger(__name__)
# The stages whose models have passed, each with the weights that it starts from.
Checked: TypeAlias = "dict[Stage, tuple[Path, Parent | None]]"

# What a flow makes, with all that it needs for that. A stage: its LoRA. The options: those of `generate` and `upscale`.
Goal = Literal["crops", "text_embeds", "lora_bundle"] | Stage | GenerateOptions | UpscaleOptions
_DRAWS = (GenerateOptions, UpscaleOptions)


def check_run(path: Path, overrides: tuple[str, ...], goal: Goal, elsewhere: bool = True, workers: bool = True) -> Run:
    """Read a run file and, to train, its data file, and check everything that the goal needs. `overrides`: as of `load_run`.

    elsewhere: False stops after the first round. workers: False leaves the cluster out. Raises a DeepFloydError that
    reports all faults of a round.
    """
    faults: list[DeepFloydError] = []
    checked: Checked = {}
    run = attempt(faults, first_round, path, overrides, goal, faults, checked)
    if run is not None:
        faults += machine_faults(run.workspace, has_jobs=goal != "crops")
        run = replace(run, notes=(*run.notes, *machine_notes(run.workspace)))
    raise_together(faults)
    assert run is not None  # without one there are faults
    if elsewhere:
        ask_services(run, goal, workers)
        _fetch_models(run, goal, checked)
    return run


def trained_with(run_config: RunConfig, stage: Stage) -> tuple[Stage, ...]:
    """A stage, after those that must be trained before it. Raises ConfigError when the run has no such stage."""
    config, source = run_config.stage(stage), STAGES[stage].upscales
    before = trained_with(run_config, source) if source is not None and config.remakes_low_res else ()
    return (*before, stage)


def check_workers(run: Run) -> None:
    """Raise ConfigError when shards are to be made on a cluster that does not answer: better now than after the index."""
    if run.config.task_runner_address is not None:
        reach(run.config.task_runner, run.config.task_runner_address)


def first_round(
    path: Path, overrides: tuple[str, ...], goal: Goal, faults: list[DeepFloydError], checked: Checked
) -> Run | None:
    """Check what lies on this machine. Returns the run, also one with faults; None: the run file makes no run.

    The faults are added to `faults`, and the stages whose models have passed to `checked`.
    """
    if isinstance(goal, GenerateOptions):
        faults += prompt_faults(goal)
    if isinstance(goal, UpscaleOptions):
        faults += own_picture_faults(goal)
    run = read_run(path, overrides, faults, data=not isinstance(goal, _DRAWS))
    if run is None or goal == "crops":
        return run
    if goal == "lora_bundle":
        attempt(faults, lambda: standing(run.workspace).champion)  # what a new version is compared with
    if isinstance(goal, GenerateOptions):
        check_generate(run, goal, faults)
        if run.config.text_to_image is None:
            return run
    if isinstance(goal, UpscaleOptions):
        check_upscale(run, goal, faults)
    stages = attempt(faults, _stages, run.config, goal) or ()
    if draws_stage3(run.config, goal):
        assert run.config.stage3 is not None
        found = attempt(faults, folder_here, run.config.stage3.model, STAGE3)
        faults += _stage3_faults(found) if found else []
        if not stages:
            return run
    encoder = run.config.first_stage  # whose text encoder is used
    for stage in run.config.stages:
        if stage in (encoder, *stages):
            folder = _folder_here(run.config.stage(stage).model, stage, stage == encoder, faults)
            if folder is not None and stage in stages:
                checked[stage] = folder, _check_model(run, goal, stage, folder, faults)
    if isinstance(goal, GenerateOptions) and checked.keys() == set(stages):
        faults += lora_again_faults(run, goal, {stage: folder for stage, (folder, _) in checked.items()})
    return run


def draws_stage3(config: RunConfig, goal: Goal) -> bool:
    """Whether the goal needs the model of Stage III."""
    if config.stage3 is None:
        return False
    if isinstance(goal, GenerateOptions):
        return not goal.by_lanczos and STAGE3 in (attempt([], drawn_stages, config, goal.stages) or ())
    return isinstance(goal, UpscaleOptions) and goal.stage == STAGE3


def _stages(config: RunConfig, goal: Goal) -> tuple[Stage, ...]:
    """The stages whose UNets are trained or sampled. Raises ConfigError for one that the run does not have."""
    if isinstance(goal, UpscaleOptions):
        return () if goal.stage == STAGE3 else config.upscalers
    if isinstance(goal, GenerateOptions):
        return trained_stages(config, goal.stages)
    if goal == "lora_bundle":
        return config.stages
    if goal == "crops" or goal == "text_embeds":
        return ()
    return trained_with(config, goal)


def _folder_here(model: str, stage: Stage, text: bool, faults: list[DeepFloydError]) -> Path | None:
    """A model's folder, if it is on this machine. Without its text encoder, where only that is missing."""
    return attempt(faults, folder_here, model, stage, text) or attempt([], folder_here, model, stage)


def _check_model(run: Run, goal: Goal, stage: Stage, folder: Path, faults: list[DeepFloydError]) -> "Parent | None":
    """Check the UNet in a folder, and its scheduler. Returns the weights that it starts from instead of its own."""
    attempt(faults, check_scheduler, stage, folder)
    if not attempt(faults, check_unet, stage, folder):
        return None
    if isinstance(goal, GenerateOptions):
        faults += generate_model_faults(run, goal, stage, folder)
        return None
    if isinstance(goal, UpscaleOptions):
        faults += upscale_model_faults(run, goal, stage, folder)
        return None
    faults += map(ConfigError, training_size_faults(run, stage, folder))
    if run.config.stage(stage).init_lora is None:
        return None
    # Not above: it takes safetensors and NumPy, 0.1 s more until a wrong key is answered.
    from deepfloyd_core.adapters.start_from import find_parent

    return attempt(faults, find_parent, run, stage, folder)


def _stage3_faults(folder: Path) -> list[DeepFloydError]:
    """Why the model in a folder is none of Stage III."""
    faults = stage3_faults(folder)
    attempt(faults, check_stage3_scheduler, folder)
    return faults


def ask_services(run: Run, goal: Goal, workers: bool) -> None:
    """Raise for a cluster that does not answer, and for W&B without a key."""
    faults: list[DeepFloydError] = []
    if workers and goal != "text_embeds" and not isinstance(goal, _DRAWS):
        attempt(faults, check_workers, run)
    if "wandb" in run.config.trackers and _trains(goal):
        attempt(faults, check_wandb)
    raise_together(faults)


def _trains(goal: Goal) -> bool:
    return goal == "lora_bundle" or isinstance(goal, int)


def _fetch_models(run: Run, goal: Goal, checked: Checked) -> None:
    """Download or write models that are missing or newer on the hub, and check each that was not checked before.

    Raises for the first model with faults.
    """
    faults: list[DeepFloydError] = []
    if isinstance(goal, _DRAWS) and fetch_from_hub(goal.versions, asked_loras(goal.loras)):
        if isinstance(goal, GenerateOptions):
            check_generate(run, goal, faults)
        else:
            check_upscale(run, goal, faults)
        raise_together(faults)
        checked.clear()  # without what is here now
    for stage in _stages(run.config, goal):
        encodes = isinstance(goal, _DRAWS) and stage == run.config.first_stage
        folder = resolve(run.config.stage(stage).model, stage, text=encodes)
        if stage not in checked or checked[stage][0] != folder:
            checked[stage] = folder, _check_model(run, goal, stage, folder, faults)
            raise_together(faults)
        _, parent = checked[stage]
        if parent is not None and parent.note:
            log.info("%s", parent.note)
    if draws_stage3(run.config, goal):
        assert run.config.stage3 is not None
        raise_together(_stage3_faults(resolve(run.config.stage3.model, STAGE3)))
