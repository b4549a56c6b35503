"""Jobs that make parts of an artifact, where the run's task runner has them made: by processes of this machine, or as
Prefect tasks on a Ray or Dask cluster.

The request of a part lies in the artifact's folder, which all machines of a cluster share; a task gets its place alone. Its
worker runs it as the flow would: in a process that it starts and outlives. Finished files are kept, so a dead worker costs
what its part was making. The flow reads the progress of each part from the same folder.
"""

import socket
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache, partial
from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from deepfloyd_core.config.run import RunConfig
from deepfloyd_core.config.run_machine import Machine
from deepfloyd_core.errors import JobError
from deepfloyd_core.models.gpus import gpu_ids
from deepfloyd_core.processes.fork_server import ForkServer
from deepfloyd_core.processes.gpu_slot import free_gpu, slot_of_block
from deepfloyd_core.processes.job_processes import JobFiles, ProgressFile
from deepfloyd_core.processes.jobs import JobRequest, S, job_starter, run_job, run_written, write_request
from deepfloyd_core.processes.jobs import run_parts as run_parts_here
from deepfloyd_core.store.artifacts import WorkDir
from deepfloyd_core.store.following import following
from deepfloyd_core.types import Report, no_report
from tasks import VERSION
from tasks.outbox import call_subflow, server_awaited
from tasks.runners import Job, run_jobs

LOOK_EVERY_S = 0.5
WATCH_EVERY_S = 2.0


@task(cache_policy=NO_CACHE)
def job_part(kind: type[JobRequest[Any]], files: JobFiles, machine: Machine) -> None:
    """Run a job whose request lies in a folder. What it makes is there as well.

    Raises JobError where this machine lacks the folder.
    """
    if not files.request.exists():
        raise JobError(
            f"{socket.gethostname()}, a machine of the cluster, has no {files.request}. Put the workspace on a file system "
            "that all machines of the cluster have under the same path."
        )
    is_wanted = _wanted_by_dask() if machine.task_runner == "dask" else None
    ids = _gpu_ids() if machine.device != "cpu" else []
    with (
        job_starter([kind.entry.split(":")[0]]) as starter,
        following(partial(_close_if_unwanted, starter, is_wanted), WATCH_EVERY_S) if is_wanted else nullcontext(),
        free_gpu(ids) if ids else nullcontext((0, None)) as (gpu, lock),
    ):
        run_written(kind, [files], [] if lock is None else [lock], no_report, gpu)


def _wanted_by_dask() -> Callable[[], bool]:
    """Whether the flow still waits for this task: Dask releases the tasks of one that is gone, and lets them run."""
    from distributed import get_worker

    worker = get_worker()
    key, tasks = worker.get_current_task(), worker.state.tasks
    return lambda: key in tasks and tasks[key].state != "cancelled"


def _close_if_unwanted(starter: ForkServer, is_wanted: Callable[[], bool]) -> None:
    """End the jobs that nobody waits for. Their GPU would not be free for hours."""
    if not is_wanted():
        starter.close()


@cache
def _gpu_ids() -> list[str]:
    """Of a worker: Ray shows it those that are its own; Dask only counts, so all that its machine has."""
    return gpu_ids()


def run_parts(
    config: RunConfig, request: JobRequest[S], parts: Sequence[JobRequest[Any]], work: WorkDir, report: Report
) -> S:
    """Run jobs that make parts of an artifact, then the job that needs all parts."""
    if not config.on_cluster or not parts:
        return run_parts_here(request, parts, work, report)
    if config.task_runner_address is None and (slot := slot_of_block()):
        slot.take()  # the cluster's GPUs are this machine's
    files = [write_request(part, work.path.absolute(), f".{number}") for number, part in enumerate(parts)]
    with following(_teller(files, report), LOOK_EVERY_S):
        call_subflow(_job_parts, config, type(parts[0]), files)
    return run_job(request, work, report)


# A flow of its own, because Prefect sends a task's flow to its worker: those of `flows` hold what does not pickle.
@flow(name="job_parts", version=VERSION, flow_run_name="{kind.job}_parts", validate_parameters=False)
@server_awaited
def _job_parts(config: RunConfig, kind: type[JobRequest[Any]], files: Sequence[JobFiles]) -> None:
    """The tasks of all parts."""
    machine = Machine(**{name: getattr(config, name) for name in Machine.model_fields})
    jobs = [
        Job(job_part.with_options(name=one.name), {"kind": kind, "files": one, "machine": machine}, 1) for one in files
    ]
    run_jobs(config, jobs, no_report, "parts", on_gpus=config.device != "cpu")


def _teller(files: Sequence[JobFiles], report: Report) -> Callable[[], None]:
    """A function that reports what the processes of all parts have written since the last call."""
    followed, shown = [ProgressFile(one.progress) for one in files], [(0, 0, "")] * len(files)

    def tell() -> None:
        news = [one.news() for one in followed]
        if any(news):
            shown[:] = [new or old for new, old in zip(news, shown, strict=True)]
            done, total, lines = zip(*shown, strict=True)
            report(sum(done), sum(total), f"{next(filter(None, lines))} in each of {len(files)} parts")

    return tell
