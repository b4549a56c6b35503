"""The process that forks jobs, named without the modules that jobs need: it can start before anything else is imported."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from deepfloyd_core.processes.fork_server import ForkServer

WORKER = "deepfloyd_core.processes.job_worker"
# What it imports before its first job: of runs that only draw, and of all.
DRAWING = ("deepfloyd_core.sampling.generate", "deepfloyd_core.sampling.upscale")
ENTRIES = (
    "deepfloyd_core.text.encode", "deepfloyd_core.text.projection", "deepfloyd_core.sampling.remakes",
    "deepfloyd_core.training.trainer", "deepfloyd_core.sampling.cascade", *DRAWING, "pyarrow.dataset", "matplotlib.figure",
)  # fmt: skip


@contextmanager
def worker_ahead(modules: Sequence[str]) -> Iterator[ForkServer]:
    """The process, which imports modules while this one does something else. For `jobs.job_starter`."""
    worker = ForkServer(WORKER, " ".join(modules))
    worker.open()
    try:
        yield worker
    finally:
        worker.close()
