"""Generated pictures: prompts through the cascade, with a version's LoRAs or with none."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from deepfloyd_core.adapters.mixed import mixed_loras
from deepfloyd_core.config.run import Run
from deepfloyd_core.config.stages import STAGES, Stage
from deepfloyd_core.models.folders import resolve
from deepfloyd_core.preflight.generate import GenerateOptions, version_bundle
from deepfloyd_core.processes.jobs import run_job
from deepfloyd_core.sampling.comparison import save_comparison, version_words
from deepfloyd_core.sampling.drawn_picture import DrawnPicture
from deepfloyd_core.sampling.identity import generate_request
from deepfloyd_core.sampling.jobs import DrawnFrom, GeneratedSummary, StartPicture, generate_job
from deepfloyd_core.sampling.pictures import SHEET, Picture, picture_file, picture_scale, told
from deepfloyd_core.store.artifacts import Artifact, materialise
from deepfloyd_core.store.pinned import pinned
from tasks.artifact_page import show_artifact
from tasks.markdown import code
from tasks.markdown import pictures as titled_pictures
from tasks.outbox import create_markdown_artifact
from tasks.page_keys import workspace_key
from tasks.progress import progress

MOST_SHOWN = 4  # of the last stage
log = logging.getLogger(__name__)


@task(name="generated", cache_policy=NO_CACHE)
def generated(run: Run, pictures: Sequence[Picture], version: str, options: GenerateOptions) -> Artifact:
    """version: a number, or `base`. Raises ConfigError when a picture that is drawn again was drawn with other models."""
    log.info("%s", told(pictures))
    folders: dict[Stage, Path] = {}
    for stage in run.config.stages:
        folders[stage] = resolve(run.config.stage(stage).model, stage, text=stage == run.config.first_stage)
    bundle = version_bundle(run, version)
    again, drawn_from = options.again, _drawn_from(run, options, folders)
    request = generate_request(run, pictures, version, folders, bundle, drawn_from)
    if again is not None:
        again.check(request)
    job = generate_job(run, pictures, version, folders, request, bundle, drawn_from)
    with progress("generate") as report:
        artifact = materialise(run.workspace, request, lambda work: run_job(job, work, report))
    summary = artifact.summary(GeneratedSummary)
    last = picture_scale(run.config.stages[-1], run.config.first_stage)
    names = [picture_file(pictures, number, last) for number in range(min(summary.pictures, MOST_SHOWN))]
    shown = [(f"{one.prompt}: {name}", artifact.path / name) for one, name in zip(pictures, names, strict=False)]
    if again is not None:
        _compare(again, artifact.path / picture_file(pictures, 0, picture_scale(again.stage, run.config.first_stage)))
    show_artifact(artifact, summary, *([("All", artifact.path / SHEET)] if summary.pictures > 1 else []), *shown)
    return artifact


def _drawn_from(run: Run, options: GenerateOptions, folders: dict[Stage, Path]) -> DrawnFrom:
    """folders: of the base models."""
    start = None
    if options.image is not None:
        mask = pinned(options.mask) if options.mask else None
        start = StartPicture(image=pinned(options.image), strength=options.noise_strength, mask=mask)
    loras = mixed_loras(run, options.asked_loras, folders)
    for lora in loras:
        log.info("%s draws with %s", STAGES[lora.stage].title, lora.told)
    control = pinned(options.control) if options.control else None
    return DrawnFrom(control=control, start=start, loras=loras, style=options.style)


def compare_versions(run: Run, pictures: Sequence[Picture], drawn: Mapping[str, Artifact]) -> None:
    """Save and show a sheet of what several versions have drawn, by their numbers: for each prompt and size a row of each
    version, with the same seeds below each other, of the last stage.
    """
    file = run.workspace / f"compare_{'_'.join(drawn)}.png"
    folders = {version_words(version): one.path for version, one in drawn.items()}
    save_comparison(pictures, folders, picture_scale(run.config.stages[-1], run.config.first_stage), file)
    log.info("%s, side by side: %s", " and ".join(folders), file)
    page = [*titled_pictures([("The same seeds below each other", file)]), f"- file: {code(file.absolute())}"]
    described = f"{', '.join(folders)} of {run.workspace.name}, side by side"
    create_markdown_artifact("\n".join(page), key=workspace_key("compare", run.workspace), description=described)


def _compare(again: DrawnPicture, file: Path) -> None:
    if again.path.read_bytes() == file.read_bytes():
        log.info("%s was drawn again, every byte equal", again.path)
    else:
        log.warning("%s was drawn again, with other bytes: another machine or library rounds otherwise", again.path)
