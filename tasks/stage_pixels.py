"""Stage I and Stage II pixels: Prefect tasks of one Parquet shard each, so that a retry or a crash costs one shard."""

from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State

from deepfloyd_core.config.run import Run
from deepfloyd_core.config.stages import STAGES, Stage
from deepfloyd_core.crops.identity import pixels_request
from deepfloyd_core.crops.pixels import (
    PARTS,
    Layout,
    ShardPlan,
    ShardResult,
    build_shard,
    finish_pixels,
    in_groups,
    plan_shards,
)
from deepfloyd_core.crops.summary import CropsSummary
from deepfloyd_core.store.artifacts import Artifact, WorkDir, materialise
from deepfloyd_core.types import Report
from tasks import VERSION
from tasks.outbox import call_subflow, server_awaited
from tasks.progress import progress
from tasks.runners import MAX_TASK_RUNS, Job, run_jobs
from tasks.ui_pages import show_crops


def _worth_a_retry(task: Any, run: Any, state: State[Any]) -> bool:
    """A full disk or a missing mount may recover; a wrong picture does not. `run_jobs` handles a dead worker."""
    return isinstance(state.result(raise_on_failure=False), OSError)


@task(cache_policy=NO_CACHE, retries=2, retry_delay_seconds=2, retry_condition_fn=_worth_a_retry)
def pixel_shards(shards: tuple[ShardPlan, ...], out: Path, older: Artifact | None) -> list[ShardResult]:
    """Some Parquet files; a retry keeps those that are finished."""
    return [build_shard(shard, out, older) for shard in shards]


def stage_pixels(run: Run, index: Artifact, stage: Stage) -> Artifact:
    """The crops of one stage, as a subflow of shard tasks run on the configured workers. Its page is the caller's: the UI
    shows on a run's tab no artifacts of its subflows.
    """
    pixels = call_subflow(_stage_pixels, run, index, stage)
    show_crops(pixels)
    return pixels


@flow(name="stage_pixels", version=VERSION, flow_run_name="stage{stage}_pixels", validate_parameters=False)
@server_awaited
def _stage_pixels(run: Run, index: Artifact, stage: Stage) -> Artifact:
    """The crops of one stage."""
    with progress(f"stage {STAGES[stage].roman} pixels") as report:
        return materialise(
            run.workspace,
            pixels_request(run, index, stage),
            lambda work: make_shards(run, plan_shards(run, index, stage, work), work, report),
            PARTS,
        )


def make_shards(
    run: Run, layout: Layout, work: WorkDir, report: Report, beside: Artifact | None = None
) -> CropsSummary:
    """Make a layout's shards on the configured workers and finish the artifact as `finish_pixels` does."""
    common = {"out": work.path, "older": layout.older}
    jobs = [
        Job(pixel_shards.with_options(name=_name(group)), {"shards": group, **common}, len(group))
        for group in in_groups(layout.made, MAX_TASK_RUNS)
    ]
    results = run_jobs(run.config, jobs, report, "shards")
    return finish_pixels(layout, [result for group in results for result in group], work, beside)


def _name(group: tuple[ShardPlan, ...]) -> str:
    """The first one's file, and how many follow it in the artifact."""
    return group[0].name if len(group) == 1 else f"{group[0].name}+{len(group) - 1}"
