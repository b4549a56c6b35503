"""Generated pictures: prompts through the cascade, with a version's LoRAs or with none."""

from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from deepfloyd_core.adapters.files import CONTROL_FILE, product_name
from deepfloyd_core.config.flavours import Stage
from deepfloyd_core.config.run import Run
from deepfloyd_core.errors import ConfigError
from deepfloyd_core.files import sha256_file
from deepfloyd_core.models.folders import resolve
from deepfloyd_core.pictures.decode import read_fitted
from deepfloyd_core.preflight.unet_sizes import check_sample_sizes
from deepfloyd_core.processes.jobs import run_job
from deepfloyd_core.sampling.identity import check_base, generate_request
from deepfloyd_core.store.artifacts import Artifact, materialise
from deepfloyd_core.store.versions import bundle_of, find_version, stage_folder
from tasks.progress import progress
from tasks.publish import publish_pictures


@task(name="generated", cache_policy=NO_CACHE)
def generated(run: Run, pictures: list[tuple[str, int]], version: str, control: Path | None = None) -> Artifact:
    """pictures: (prompt, seed) each; version: `latest`, a number, or `base`; control: what a ControlNet is to follow."""
    if run.config.stage1 is None:
        raise ConfigError("generate starts from Stage I: add a [stage1] table with a model_flavour.")
    size, *others = run.config.sample_sizes_px
    if others:
        raise ConfigError(
            f"validation_resolution is {run.config.validation_resolution!r}; generate makes one size: give it with --size."
        )
    folders: dict[Stage, Path] = {}
    for stage in run.config.stages:
        folders[stage] = resolve(run.config.stage(stage).model, stage, text=stage == 1)
    bundle = None if version == "base" else bundle_of(run.workspace, find_version(run.workspace, version))
    for stage, folder in folders.items():
        check_sample_sizes(run, stage, folder)
        if bundle is not None:
            check_base(bundle, stage, folder)
    _check_control(bundle, version, control)
    if control is not None:
        read_fitted(control, size)  # so that a file that is no picture ends the run here
    sha256 = None if control is None else sha256_file(control)
    options = {
        "control": None if control is None else [str(control.absolute()), sha256],
        "pictures": pictures,
        "version": version,
        "size": list(size),
        "encoder": str(folders[1]),
        "models": {str(stage): str(folder) for stage, folder in folders.items()},
    }
    inputs = {} if bundle is None else {"lora_bundle": bundle}
    with progress("generate") as report:
        made = materialise(
            run.workspace,
            generate_request(run, pictures, version, folders, bundle, sha256),
            lambda work: run_job("generate", run.config, inputs, options, work, report),
        )
    publish_pictures(made, *made.summary["pictures"][-4:])
    return made


def _check_control(bundle: Artifact | None, version: str, control: Path | None) -> None:
    """Raises ConfigError unless there is a picture to follow exactly where there is a ControlNet to follow it."""
    follows = bundle is not None and product_name(stage_folder(bundle.path, 1)) == CONTROL_FILE
    if follows and control is None:
        raise ConfigError(f"Version {version!r} is a ControlNet: name the picture that it is to follow with --control.")
    if control is not None and not follows:
        raise ConfigError(f"Version {version!r} is no ControlNet and follows no picture. Remove --control.")
