"""Generated pictures: prompts through the cascade, with a version's weights, several LoRAs or the base models. No torch."""

import logging
from collections.abc import Sequence
from pathlib import Path

from deepfloyd_core.adapters.mixed import mixed_loras
from deepfloyd_core.config.run import Run
from deepfloyd_core.config.stage3 import STAGE3, TABLE
from deepfloyd_core.config.stages import STAGES, Stage
from deepfloyd_core.models.folders import resolve
from deepfloyd_core.preflight.generate import GenerateOptions, drawn_stages, pictures_of, prompt_rows
from deepfloyd_core.preflight.versions import DrawnVersion
from deepfloyd_core.processes.jobs import RunParts, run_parts
from deepfloyd_core.sampling.drawn_picture import DrawnPicture
from deepfloyd_core.sampling.identity import generate_request
from deepfloyd_core.sampling.jobs import DrawnFrom, StartPicture, generate_job, generate_parts
from deepfloyd_core.sampling.pictures import Picture, picture_file, picture_scale, told, unused_words
from deepfloyd_core.sampling.stage3_jobs import Stage3, stage3_of
from deepfloyd_core.sampling.texts_jobs import run_with_texts
from deepfloyd_core.store.artifacts import Artifact, materialise
from deepfloyd_core.store.pinned import pinned
from deepfloyd_core.types import Report, no_report

log = logging.getLogger(__name__)


def listed_pictures(run: Run, options: GenerateOptions) -> tuple[Picture, ...]:
    """The pictures that each version will draw, counted and listed in the log. Raises as `pictures_of`."""
    pictures = pictures_of(run, options)
    for line in told(pictures, drawn_stages(run.config, options.stages)):
        log.info("%s", line)
    return pictures


def draw(
    run: Run, pictures: Sequence[Picture], version: DrawnVersion, options: GenerateOptions,
    report: Report = no_report, run_all: RunParts = run_parts,
) -> Artifact:  # fmt: skip
    """Draw pictures, or take them where the same ones were drawn before. run_all: runs the parts of the job.

    Raises ConfigError when a picture that is drawn again was drawn with other models.
    """
    for unused in unused_words(prompt_rows(options)):
        log.warning("%s", unused)
    folders: dict[Stage, Path] = {}
    stages = drawn_stages(run.config, options.stages)
    for stage in (stage for stage in run.config.stages if stage in stages):
        folders[stage] = resolve(run.config.stage(stage).model, stage, text=stage == run.config.first_stage)
    again, given = options.again, drawn_from(run, options, folders)
    stage3 = (Stage3() if options.by_lanczos else stage3_of(run.config)) if STAGE3 in stages else None
    if stage3 is not None and stage3.model is None and not options.by_lanczos:
        log.warning("The run file has no [%s] table, so Lanczos' filter enlarges the pictures at the end.", TABLE)
    request = generate_request(run, pictures, version.name, folders, version.bundle, given, stage3)
    if again is not None:
        again.check(request)
    job = generate_job(run, pictures, version.name, folders, request, version.bundle, given, stage3)
    parts = generate_parts(job)
    artifact = materialise(run.workspace, request, lambda work: run_with_texts(job, work, report, parts, run_all))
    if again is not None:
        _compare(again, artifact, picture_file(pictures, 0, picture_scale(again.stage, run.config.first_stage)))
    return artifact


def drawn_from(run: Run, options: GenerateOptions, folders: dict[Stage, Path]) -> DrawnFrom:
    """What pictures are drawn from beside texts, with the bytes that its files have now. folders: of the base models."""
    start = None
    if options.image is not None:
        mask = pinned(options.mask) if options.mask else None
        start = StartPicture(image=pinned(options.image), strength=options.noise_strength, mask=mask)
    loras = mixed_loras(run, options.asked_loras, folders)
    for lora in loras:
        log.info("%s draws with %s", STAGES[lora.stage].title, lora.told)
    control = pinned(options.control) if options.control else None
    return DrawnFrom(control=control, start=start, loras=loras, style=options.style)


def _compare(again: DrawnPicture, artifact: Artifact, name: str) -> None:
    """Say whether a picture has the bytes of the file that its record makes, and whether that was drawn now."""
    file = artifact.path / name
    if again.path.samefile(file):
        log.info("%s is what this request has drawn: there is nothing to draw again, and to compare it with", file)
        return
    equal = again.path.read_bytes() == file.read_bytes()
    drawn = "was drawn again"
    if artifact.reused:
        drawn = f"was not drawn again, but compared with {file}, which the same record has drawn before"
    if equal:
        log.info("%s %s: every byte is equal", again.path, drawn)
    else:
        log.warning("%s %s: it has other bytes. Another machine or library rounds otherwise", again.path, drawn)
