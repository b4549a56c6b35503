"""Stage I and Stage II pixels: one Prefect task for each Parquet shard, so that a retry or a crash costs one shard."""

from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.futures import PrefectFuture, as_completed
from prefect.task_runners import ThreadPoolTaskRunner

from deepfloyd_core.artifacts import Artifact, WorkDir, materialise
from deepfloyd_core.config import Run
from deepfloyd_core.flavours import Stage
from deepfloyd_core.pixels import (
    SHEET,
    ShardPlan,
    ShardResult,
    build_shard,
    finish_pixels,
    pixels_request,
    plan_shards,
)
from deepfloyd_core.types import Report
from tasks.progress import progress
from tasks.publish import publish_pictures


def _worth_a_retry(task: Any, run: Any, state: State[Any]) -> bool:
    """A full disk or a vanished mount may heal; a wrong picture does not."""
    return isinstance(state.result(raise_on_failure=False), OSError)


@task(cache_policy=NO_CACHE, retries=2, retry_delay_seconds=2, retry_condition_fn=_worth_a_retry)
def pixel_shard(shard: ShardPlan, out: Path, older: Artifact | None) -> ShardResult:
    """One Parquet file."""
    return build_shard(shard, out, older)


def stage_pixels(run: Run, index: Artifact, stage: Stage) -> Artifact:
    """The crops of one stage, as a subflow of shard tasks run on the configured number of workers."""
    runner: ThreadPoolTaskRunner[Any] = ThreadPoolTaskRunner(max_workers=run.config.workers)
    subflow = _stage_pixels.with_options(task_runner=runner)  # type: ignore[arg-type]
    return subflow(run, index, stage)


@flow(name="stage-pixels", flow_run_name="stage{stage}-pixels", validate_parameters=False)
def _stage_pixels(run: Run, index: Artifact, stage: Stage) -> Artifact:
    with progress(f"stage {'I' * stage} pixels") as report:
        pixels, _ = materialise(
            run.workspace, pixels_request(run, index, stage), lambda work: _build(run, index, stage, work, report)
        )
    publish_pictures(pixels, SHEET)
    return pixels


def _build(run: Run, index: Artifact, stage: Stage, work: WorkDir, report: Report) -> dict[str, Any]:
    layout = plan_shards(run, index, stage, work)
    futures: list[PrefectFuture[ShardResult]] = [
        pixel_shard.with_options(name=shard.name).submit(shard, work.path, layout.older) for shard in layout.made
    ]
    for done, _ in enumerate(as_completed(futures), 1):
        report(done, len(layout.made), "shards")
    return finish_pixels(layout, [future.result() for future in futures], work)
