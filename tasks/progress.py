"""Progress where a person looks: a rich bar on the terminal, a progress artifact in the Prefect UI."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.context import FlowRunContext
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from deepfloyd_core.types import Report

CONSOLE = Console(stderr=True)
UI_EVERY_S = 3.0  # one request to the server each


@contextmanager
def progress(label: str) -> Iterator[Report]:
    """Yield a Report that moves a bar and, inside a flow run, a progress artifact; nothing shows before it is called."""
    columns = (
        TextColumn("[bold]{task.description:<16}"), BarColumn(16), MofNCompleteColumn(),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True), TextColumn("{task.fields[line]}"),
    )  # fmt: skip
    bars = Progress(*columns, console=CONSOLE)
    bar = bars.add_task(label, total=None, line="")
    artifact_id: UUID | None = None
    last = 0.0

    def report(done: int, total: int, line: str) -> None:
        nonlocal artifact_id, last
        bars.start()
        bars.update(bar, completed=done, total=total, line=line)
        if FlowRunContext.get() is None:
            return
        if artifact_id is None:
            artifact_id = cast(UUID, create_progress_artifact(0.0, description=label))
        if done >= total or time.monotonic() - last > UI_EVERY_S:
            last = time.monotonic()
            update_progress_artifact(artifact_id, 100.0 * done / max(total, 1), description=f"{label}: {line}")

    try:
        yield report
    finally:
        if bars.live.is_started:  # stopping one that never started prints an empty line
            bars.stop()
