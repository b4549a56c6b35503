"""Generated pictures: prompts through the cascade, with a version's LoRAs or with none."""

from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from deepfloyd_core.config.flavours import Stage
from deepfloyd_core.config.run import Run
from deepfloyd_core.files import sha256_file
from deepfloyd_core.models.folders import resolve
from deepfloyd_core.preflight.order import version_bundle
from deepfloyd_core.processes.jobs import run_job
from deepfloyd_core.sampling.identity import generate_request
from deepfloyd_core.store.artifacts import Artifact, materialise
from tasks.progress import progress
from tasks.publish import publish_pictures


@task(name="generated", cache_policy=NO_CACHE)
def generated(run: Run, pictures: list[tuple[str, int]], version: str, control: Path | None = None) -> Artifact:
    """pictures: (prompt, seed) each; version: `latest`, a number, or `base`; control: what a ControlNet is to follow."""
    size = run.config.sample_sizes_px[0]
    folders: dict[Stage, Path] = {}
    for stage in run.config.stages:
        folders[stage] = resolve(run.config.stage(stage).model, stage, text=stage == 1)
    bundle = version_bundle(run, version)
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
