"""Generated pictures: prompts through the cascade, with a version's LoRAs or with none."""

from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from deepfloyd_core.config.run import Run
from deepfloyd_core.config.stages import Stage
from deepfloyd_core.models.folders import resolve
from deepfloyd_core.preflight.generate import version_bundle
from deepfloyd_core.processes.jobs import run_job
from deepfloyd_core.sampling.identity import generate_request
from deepfloyd_core.sampling.jobs import GeneratedSummary, generate_job
from deepfloyd_core.store.artifacts import Artifact, materialise
from deepfloyd_core.store.pinned import pinned
from tasks.artifact_page import show_artifact
from tasks.progress import progress

MOST_SHOWN = 4  # the last stage's


@task(name="generated", cache_policy=NO_CACHE)
def generated(run: Run, pictures: list[tuple[str, int]], version: str, control: Path | None = None) -> Artifact:
    """pictures: (prompt, seed) each; version: `latest`, a number, or `base`; control: a ControlNet's picture."""
    folders: dict[Stage, Path] = {}
    for stage in run.config.stages:
        folders[stage] = resolve(run.config.stage(stage).model, stage, text=stage == run.config.first_stage)
    bundle = version_bundle(run, version)
    hint = None if control is None else pinned(control)
    job = generate_job(run, pictures, version, folders, bundle, hint)
    with progress("generate") as report:
        artifact = materialise(
            run.workspace,
            generate_request(run, pictures, version, folders, bundle, hint.sha256 if hint else None),
            lambda work: run_job(job, work, report),
        )
    summary = artifact.summary(GeneratedSummary)
    shown = list(zip(summary.prompts, summary.pictures, strict=True))[-MOST_SHOWN:]
    show_artifact(artifact, summary, *((f"{prompt}: {name}", artifact.path / name) for prompt, name in shown))
    return artifact
