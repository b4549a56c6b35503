"""Generated pictures: prompts through the cascade, with a version's LoRAs or with none."""

from collections.abc import Mapping, Sequence
from functools import partial

from prefect import task
from prefect.cache_policies import NO_CACHE

from deepfloyd_core.config.run import Run
from deepfloyd_core.drawing.compared import compare
from deepfloyd_core.drawing.generated import draw
from deepfloyd_core.preflight.generate import GenerateOptions
from deepfloyd_core.preflight.versions import DrawnVersion
from deepfloyd_core.sampling.comparison import version_words
from deepfloyd_core.sampling.jobs import GeneratedSummary
from deepfloyd_core.sampling.pictures import SHEET, Picture, picture_file, picture_scale
from deepfloyd_core.store.artifacts import Artifact
from tasks.artifact_page import show_artifact
from tasks.job_parts import run_parts
from tasks.markdown import code
from tasks.markdown import pictures as titled_pictures
from tasks.outbox import create_markdown_artifact
from tasks.page_keys import workspace_key
from tasks.progress import progress

MOST_SHOWN = 4  # of the last stage


@task(name="generated", cache_policy=NO_CACHE)
def generated(run: Run, pictures: Sequence[Picture], version: DrawnVersion, options: GenerateOptions) -> Artifact:
    """Raises ConfigError when a picture that is drawn again was drawn with other models."""
    with progress("generate") as report:
        artifact = draw(run, pictures, version, options, report, partial(run_parts, run.config))
    summary = artifact.summary(GeneratedSummary)
    last = picture_scale(summary.stages[-1], run.config.first_stage)
    names = [picture_file(pictures, number, last) for number in range(min(summary.pictures, MOST_SHOWN))]
    shown = [(f"{one.prompt}: {name}", artifact.path / name) for one, name in zip(pictures, names, strict=False)]
    show_artifact(artifact, summary, *([("All", artifact.path / SHEET)] if summary.pictures > 1 else []), *shown)
    return artifact


def compare_versions(run: Run, pictures: Sequence[Picture], drawn: Mapping[str, Artifact]) -> None:
    """Make and show the sheet of what several versions have drawn, by their names."""
    file = compare(run, pictures, drawn).path / SHEET
    page = [*titled_pictures([("The same seeds below each other", file)]), f"- file: {code(file.absolute())}"]
    described = f"{', '.join(map(version_words, drawn))} of {run.workspace.name}, side by side"
    create_markdown_artifact("\n".join(page), key=workspace_key("compare", run.workspace), description=described)
