"""Cascade samples: base against fine-tuned, and the upscaler measured on the held-out pictures."""

from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from deepfloyd_core.config.run import Run
from deepfloyd_core.config.stages import Stage
from deepfloyd_core.models.folders import resolve
from deepfloyd_core.sampling.identity import samples_request
from deepfloyd_core.sampling.jobs import SampleInputs, SamplesSummary, sample_job, sample_parts
from deepfloyd_core.store.artifacts import Artifact, materialise
from tasks.job_parts import run_parts
from tasks.progress import progress
from tasks.ui_pages import show_samples


@task(name="cascade_samples", cache_policy=NO_CACHE)
def cascade_samples(run: Run, prompts: list[str], inputs: SampleInputs[Artifact]) -> Artifact:
    """Samples of every prompt, and the upscaler's enlargements of held-out pictures."""
    folders: dict[Stage, Path] = {stage: resolve(run.config.stage(stage).model, stage) for stage in run.config.stages}
    job = sample_job(run, prompts, folders, inputs)
    with progress("cascade samples") as report:
        samples = materialise(
            run.workspace,
            samples_request(run, prompts, folders, inputs),
            lambda work: run_parts(run.config, job, sample_parts(job), work, report),
        )
    summary = samples.summary(SamplesSummary)
    show_samples(samples, summary, run.config.upscalers)
    return samples
