"""Progress where a person looks: a rich bar on the terminal, a progress artifact in the Prefect UI."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.context import FlowRunContext
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from deepfloyd_core.types import Report

CONSOLE = Console(stderr=True)
UI_EVERY_S = 3.0  # one request to the server each


@contextmanager
def progress(label: str) -> Iterator[Report]:
    """Yield a Report that moves a bar and, inside a flow run, the artifact of the same name."""
    columns = (
        TextColumn("[bold]{task.description:<16}"), BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn(),
        TimeRemainingColumn(), TextColumn("{task.fields[line]}"),
    )  # fmt: skip
    artifact_id = create_progress_artifact(0.0, description=label) if FlowRunContext.get() else None
    last = 0.0
    with Progress(*columns, console=CONSOLE) as bars:
        bar = bars.add_task(label, total=None, line="")

        def report(done: int, total: int, line: str) -> None:
            nonlocal last
            bars.update(bar, completed=done, total=total, line=line)
            finished = done >= total
            if artifact_id is not None and (finished or time.monotonic() - last > UI_EVERY_S):
                last = time.monotonic()
                update_progress_artifact(artifact_id, 100.0 * done / max(total, 1), description=f"{label}: {line}")

        yield report
