"""Verdicts on pictures as Prefect tasks on a Ray or Dask cluster: some blocks of the scan each.

The scan lies in the index's folder while it is made, and the judged blocks as well: a dead worker costs the block in work.
"""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from deepfloyd_core.arrow import mapped_table
from deepfloyd_core.config.run import Run
from deepfloyd_core.files import atomic_path
from deepfloyd_core.index.index import Block, JudgeBlocks, judge_block, judges
from deepfloyd_core.store.artifacts import WorkDir
from deepfloyd_core.store.following import following
from deepfloyd_core.types import Report, no_report
from tasks import VERSION
from tasks.outbox import call_subflow, server_awaited
from tasks.runners import MAX_TASK_RUNS, Job, run_jobs

SCAN_FILE = ".scan.arrow"
LOOK_EVERY_S = 5.0


@task(cache_policy=NO_CACHE)
def judged_blocks(run: Run, scan: Path, blocks: Sequence[Block]) -> None:
    """Judge some blocks, in one child process: each worker of the cluster has one."""
    scanned = mapped_table(scan)
    with judges(run, 1) as children:
        for block in blocks:
            judge_block(run, scanned[block.start : block.start + block.count], block, children)


def cluster_judges(run: Run, scanned: pa.Table, work: WorkDir, report: Report) -> JudgeBlocks | None:
    """Has blocks judged on the run's cluster; None: it has none."""
    if not run.config.on_cluster:
        return None

    def judge_all(blocks: Sequence[Block]) -> None:
        if not blocks:
            return

        def tell() -> None:
            judged = sum(block.count for block in blocks if block.part.exists())
            report(judged, sum(block.count for block in blocks), "pictures judged")

        scan = work.path.absolute() / SCAN_FILE
        with atomic_path(scan) as tmp, pa.ipc.new_file(tmp, scanned.schema) as writer:
            writer.write_table(scanned)
        with following(tell, LOOK_EVERY_S):
            call_subflow(_judged_blocks, run, scan, blocks)

    return judge_all


# A flow of its own, as for parts of jobs.
@flow(name="judged_blocks", version=VERSION, flow_run_name="judged_blocks", validate_parameters=False)
@server_awaited
def _judged_blocks(run: Run, scan: Path, blocks: Sequence[Block]) -> None:
    """The tasks of all blocks."""
    size = max(1, -(-len(blocks) // MAX_TASK_RUNS))
    groups = [blocks[start : start + size] for start in range(0, len(blocks), size)]
    jobs = [
        Job(judged_blocks.with_options(name=f"pictures {group[0].start + 1}+"),
            {"run": run, "scan": scan, "blocks": group}, sum(block.count for block in group))
        for group in groups
    ]  # fmt: skip
    run_jobs(run.config, jobs, no_report, "pictures judged")
