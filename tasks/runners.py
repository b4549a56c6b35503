"""Where shards are made: on Prefect's own task runners, on this machine or on a Ray or Dask cluster, by `task_runner`.

A runner lives while jobs run, so a reused stage starts no cluster. This module does no scheduling. It only adds
retries: a dead worker costs its jobs another try, not the run. Ray and Dask do most of that themselves, a process pool
does not. On two busy cores, starting costs a stage nothing (threads) or some 15 to 25 s (the others import Prefect in
every worker).
"""

import logging
import multiprocessing
import multiprocessing.connection
import os
import threading
from collections.abc import Sequence
from concurrent.futures import BrokenExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any, Generic, TypeVar

from prefect import Task
from prefect.futures import as_completed
from prefect.task_runners import ProcessPoolTaskRunner, TaskRunner, ThreadPoolTaskRunner

from deepfloyd_core.config.run import RunConfig
from deepfloyd_core.errors import JobError
from deepfloyd_core.types import Report
from tasks.outbox import send_events, take_records

log = logging.getLogger(__name__)

R = TypeVar("R")
MAX_TASK_RUNS = 500  # of a stage: Prefect's history loses some beyond 1,000, and a run has two stages
TRIES = 3  # of a job whose worker died


@dataclass(frozen=True)
class Job(Generic[R]):
    """One call of a Prefect task. Parameters and result must pickle, and should be small."""

    task: Task[..., R]
    parameters: dict[str, Any]
    size: int  # in the unit of the progress


def run_jobs(config: RunConfig, jobs: Sequence[Job[R]], report: Report, unit: str, *, on_gpus: bool = False) -> list[R]:
    """The results of all jobs, in their order. A job whose worker died is run again on new workers. on_gpus: each job needs
    a GPU, if a Ray cluster has any; Dask knows none.

    Raises what a job raises, as soon as it does, and JobError for a job that loses its worker TRIES times.
    """
    results: dict[int, R] = {}
    tasks = [
        job.task if config.task_runner == "threads" else _in_a_process(job.task, config.task_runner) for job in jobs
    ]
    done, total = 0, sum(job.size for job in jobs)
    lost: BaseException | None = None
    for _ in range(TRIES):
        todo = [number for number in range(len(jobs)) if number not in results]
        if not todo:
            break
        if lost:
            log.warning("%d task runs lost their worker (%s); retrying on new ones", len(todo), type(lost).__name__)
        with _task_runner(config) as runner, _one_gpu_each(config) if on_gpus else nullcontext():
            numbers = {runner.submit(tasks[number], jobs[number].parameters): number for number in todo}
            for future in as_completed(list(numbers)):
                try:
                    results[numbers[future]] = future.result()
                except _lost_worker(config) as error:
                    lost = error
                    continue
                done += jobs[numbers[future]].size
                report(done, total, unit)
    if len(results) < len(jobs):
        raise JobError(
            f"{len(jobs) - len(results)} task runs lost their worker {TRIES} times ({type(lost).__name__}). A full "
            "memory is the usual cause: lower workers or shard_mib. Finished work is kept for the next run."
        )
    return [results[number] for number in range(len(jobs))]


def _task_runner(config: RunConfig) -> TaskRunner[Any]:
    if config.task_runner == "threads":
        return ThreadPoolTaskRunner(max_workers=config.workers)
    if config.task_runner == "processes":
        return ProcessPoolTaskRunner(max_workers=config.workers)
    address, options = config.task_runner_address, dict[str, Any]()
    if config.task_runner == "ray":
        from prefect_ray import RayTaskRunner as ClusterTaskRunner

        options = {"address": address, "init_kwargs": {"log_to_driver": False, "logging_level": logging.ERROR}}
        if address is None:
            # "local": without it Ray joins whichever cluster was last started on this machine.
            options["address"] = "local"
            options["init_kwargs"] |= {"num_cpus": config.workers, "include_dashboard": False}
    else:
        from prefect_dask import DaskTaskRunner as ClusterTaskRunner

        options = {"address": address}
        if address is None:
            # No limit of memory: Dask's own, a share of the machine's, kills workers; a shard's need is set by shard_mib.
            options["cluster_class"] = "distributed.LocalCluster"
            options["cluster_kwargs"] = {"n_workers": config.workers, "threads_per_worker": 1, "memory_limit": None,
                                         "dashboard_address": None}  # fmt: skip
    runner: TaskRunner[Any] = ClusterTaskRunner(**options)
    return runner


def _one_gpu_each(config: RunConfig) -> AbstractContextManager[Any]:
    """In this block a Ray cluster with GPUs gives each task one of its own, and shows it no other."""
    if config.task_runner != "ray":
        return nullcontext()
    import ray
    from prefect_ray.context import remote_options

    return remote_options(num_gpus=1) if ray.cluster_resources().get("GPU") else nullcontext()


def _in_a_process(task: Task[..., R], task_runner: str) -> Task[..., R]:
    """The task, changed in two ways: its worker reports its end to the server before the flow sees it and may kill the
    worker; and the worker ends with the flow, however that dies.
    """
    begun: list[Any] = [_end_with_flow] if task_runner == "processes" else [_end_with_flow, _take_records]
    return task.with_options(on_running=begun, on_completion=[_send_events], on_failure=[_send_events])


def _take_records(task: Any, run: Any, state: Any) -> None:
    take_records()  # a pool's worker gives them to the flow's process


def _send_events(task: Any, run: Any, state: Any) -> None:
    send_events()


def _end_with_flow(task: Any, run: Any, state: Any) -> None:
    _watch_parent(os.getpid())


@cache
def _watch_parent(process_id: int) -> None:
    """Ends a pool's worker with its parent; it would wait for its next task for ever. Ray ends its own workers."""
    if parent := multiprocessing.parent_process():
        threading.Thread(target=_exit_after, args=(parent.sentinel,), name="end-with-flow", daemon=True).start()


def _exit_after(parent: int) -> None:
    multiprocessing.connection.wait([parent])
    os._exit(1)


def _lost_worker(config: RunConfig) -> tuple[type[BaseException], ...]:
    """The exceptions of a future whose worker failed, not its job: a job's own errors come back as its state."""
    if config.task_runner == "ray":
        from ray.exceptions import RayError

        return (RayError,)
    if config.task_runner == "dask":
        from distributed import CancelledError, KilledWorker

        return (KilledWorker, CancelledError)
    return (BrokenExecutor,)
