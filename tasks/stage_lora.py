"""The LoRA of a stage, trained in a process of its own."""

import logging
from contextlib import suppress

from PIL import Image
from prefect import task
from prefect.cache_policies import NO_CACHE

from deepfloyd_core.adapters.start_from import find_parent, shorter_note, shorter_training
from deepfloyd_core.config.run import Run
from deepfloyd_core.config.stages import STAGES, Stage
from deepfloyd_core.crops.rows import held_out_ids
from deepfloyd_core.models.folders import resolve
from deepfloyd_core.models.gpus import gpu_count
from deepfloyd_core.processes.jobs import run_together
from deepfloyd_core.store.artifacts import Artifact, Request, WorkDir, materialise
from deepfloyd_core.store.changes import label
from deepfloyd_core.store.counts import many
from deepfloyd_core.training.epochs import crops_of_sizes, with_steps
from deepfloyd_core.training.identity import lora_request
from deepfloyd_core.training.jobs import (
    LOSS_CURVE,
    VALIDATION_SHEET,
    TrainingInputs,
    TrainingSummary,
    TrainRequest,
    train_job,
)
from deepfloyd_core.training.previews import PREVIEWS
from deepfloyd_core.training.start import StartSummary, start_weights
from deepfloyd_core.training.turns import ranks_of
from tasks.artifact_page import TITLES, show_artifact, training_page
from tasks.growing_page import GrowingPage, watched
from tasks.page_keys import workspace_key
from tasks.progress import progress
from tasks.ui_pages import training_tables, warn_of_small_sizes

PICTURES = VALIDATION_SHEET, LOSS_CURVE  # the newest samples first
log = logging.getLogger(__name__)


@task(name="stage_lora", task_run_name="stage{stage}_lora", cache_policy=NO_CACHE)
def stage_lora(run: Run, stage: Stage, inputs: TrainingInputs[Artifact], prompts: list[str]) -> Artifact:
    """What loads in diffusers' stock pipeline. prompts: of the validations."""
    run = with_steps(run, stage, inputs.pixels, inputs.eval_set)
    folder = resolve(run.config.stage(stage).model, stage)
    parent = find_parent(run, stage, folder)
    weights = start_weights(inputs.start) if inputs.start else parent.pinned if parent else None
    job = train_job(run, stage, folder, inputs, prompts, weights)
    request = lora_request(run, stage, folder, inputs, prompts, parent.pinned.sha256 if parent else None)
    if not (run.workspace / request.name).exists() and (shorter := shorter_training(run.workspace, request)):
        log.warning("%s", shorter_note(stage, run.config.stage(stage).steps, shorter))
    sizes = crops_of_sizes(inputs.pixels, held_out_ids(inputs.eval_set))
    warn_of_small_sizes(request.kind, sizes, run.config.stage(stage).train_batch_size)
    return _trained(run, stage, request, job)


def _trained(run: Run, stage: Stage, request: Request, job: TrainRequest) -> Artifact:
    """Train. The page has previews while it trains and afterwards, though the artifact has none."""
    page, last = GrowingPage(workspace_key(f"stage{stage}-lora", run.workspace)), dict[str, Image.Image]()

    def build(work: WorkDir) -> TrainingSummary:
        files = [work.path / folder / name for name in PICTURES for folder in (PREVIEWS, "")]
        under_way = f"{label(request.kind)}, under way"
        watch = watched(report, files, lambda made: page.put(training_page(made), under_way))
        summary = run_together(job.of_ranks(_ranks(run, stage)), work, watch)
        for file in files[::-1]:
            with suppress(OSError):  # a page without it does no harm
                last[file.name] = Image.open(file).convert("RGB")
        return summary

    with progress(f"stage {STAGES[stage].roman} LoRA") as report:
        lora = materialise(run.workspace, request, build)
    summary = lora.summary(TrainingSummary)
    if summary.mixed_sums:
        log.warning("stage %d: its batches were computed %s. Their sums round differently", stage, summary.mixed_sums)
    if job.inputs.start:
        tell_start(stage, job.inputs.start.summary(StartSummary), summary)
    shown = [(TITLES[name], last.get(name, lora.path / name)) for name in PICTURES]
    show_artifact(lora, summary, *shown, below=training_tables(summary), page=page)
    return lora


def _ranks(run: Run, stage: Stage) -> int:
    """How many processes share the steps of a stage."""
    config, gpus = run.config, 0
    if config.num_processes == "auto" and config.device in ("auto", "cuda"):
        gpus = gpu_count()
    ranks = ranks_of(config, stage, gpus)
    if config.num_processes == "auto":
        log.info("stage %d: num_processes = auto is %d, with %s", stage, ranks, many(gpus, "GPU"))
    elif ranks > 1:
        log.info("stage %d: %d processes share each step", stage, ranks)
    return ranks


def tell_start(stage: Stage, start: StartSummary, summary: TrainingSummary) -> None:
    """Log whether a warm training began with the published losses of the version that it starts from."""
    begins, difference = f"stage {stage} starts from version {start.version}", summary.start_difference
    if difference is None:
        log.info("%s; no held-out picture of both tells whether step 0 is that model", begins)
    elif difference == 0:
        log.info("%s: at step 0 its held-out losses are those of that version, to the bit", begins)
    else:
        log.warning(
            "%s, and at step 0 its held-out losses differ from those of that version by up to %.2g. Another machine, "
            "precision or package version explains a small difference", begins, difference,
        )  # fmt: skip
