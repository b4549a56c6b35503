"""The text of a stage: the embeds through its UNet's text modules, in a process of its own."""

from prefect import task
from prefect.cache_policies import NO_CACHE

from deepfloyd_core.config.run import Run
from deepfloyd_core.config.stages import STAGES, Stage
from deepfloyd_core.models.folders import resolve
from deepfloyd_core.processes.jobs import run_job
from deepfloyd_core.store.artifacts import Artifact, WorkDir, materialise
from deepfloyd_core.text.projection import (
    FILES,
    ProjectionSummary,
    older_text,
    project_job,
    text_is_frozen,
    text_request,
)
from tasks.artifact_page import show_artifact
from tasks.progress import progress


@task(name="stage_text", task_run_name="stage{stage}_text", cache_policy=NO_CACHE)
def stage_text(run: Run, stage: Stage, embeds: Artifact) -> Artifact:
    """What the stage's UNet makes of the embeds; the embeds themselves when training changes its text modules."""
    if not text_is_frozen(run.config.stage(stage)):
        return embeds
    folder = resolve(run.config.stage(stage).model, stage)
    request = text_request(run, stage, folder, embeds)

    def project(work: WorkDir) -> ProjectionSummary:
        older = older_text(run.workspace, request)
        return run_job(project_job(run, stage, folder, embeds, older), work, report)

    with progress(f"stage {STAGES[stage].roman} text") as report:
        text = materialise(run.workspace, request, project, FILES)
    show_artifact(text, text.summary(ProjectionSummary))
    return text
