"""Progress for people: a rich bar on the terminal, a progress artifact in the Prefect UI."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.context import FlowRunContext
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from deepfloyd_core.store.counts import duration
from deepfloyd_core.types import Report
from tasks.outbox import show_newest
from tasks.terminal import console

CONSOLE = console(stderr=True)
UI_EVERY_S = 3.0  # one request to the server each
LOG_EVERY_S = 30.0  # a line in the flow run's log, and where no bars are shown
SPEED_OF_S = 600.0  # the time left follows from the speed in the last ones: one step of a sampler can take a minute
log = logging.getLogger(__name__)


class LogLines(logging.Handler):
    """Prints log records above the bars, each as one line, however long: a path is copied in one piece."""

    def emit(self, record: logging.LogRecord) -> None:
        """Warnings in yellow. The lines of `progress` only where its bars are not shown."""
        if record.name == __name__ and CONSOLE.is_terminal:
            return
        text = f"{time.strftime('%H:%M:%S', time.localtime(record.created))} {record.getMessage()}"
        style = "yellow" if record.levelno >= logging.WARNING else None
        CONSOLE.print(text, style=style)


@contextmanager
def progress(label: str) -> Iterator[Report]:
    """Yield a Report that moves a bar and, inside a flow run, a progress artifact; nothing is shown before the first
    call. A report of another total, or of less than before, begins another part: its time left is its own.
    """
    bar_itself = (BarColumn(16),) if CONSOLE.width >= 100 else ()  # the line of a training would be cut short
    columns = (
        TextColumn("{task.description:<15}", style="bold", markup=False), *bar_itself, MofNCompleteColumn(),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True), TextColumn("{task.fields[line]}", markup=False),
    )  # fmt: skip
    bars = Progress(*columns, console=CONSOLE, disable=not CONSOLE.is_terminal, speed_estimate_period=SPEED_OF_S)
    bar = bars.add_task(label, total=None, line="")
    artifact_id: UUID | None = None
    last = logged = 0.0

    def update(percent: float, said: str) -> None:
        nonlocal artifact_id
        if artifact_id is None:
            artifact_id = cast(UUID, create_progress_artifact(0.0, description=label))
        update_progress_artifact(artifact_id, percent, description=said)

    def report(done: int, total: int, line: str) -> None:
        nonlocal last, logged
        bars.start()
        if total != bars.tasks[0].total or done < bars.tasks[0].completed:
            bars.reset(bar, completed=done, total=total, line=line)
        else:
            bars.update(bar, completed=done, line=line)
        if time.monotonic() - logged > LOG_EVERY_S:
            logged = time.monotonic()
            log.info("%s", f"{label} {done}/{total}  {line}  {_left(bars.tasks[0].time_remaining)}".rstrip())
        if FlowRunContext.get() is None:
            return
        if done >= total or time.monotonic() - last > UI_EVERY_S:
            last = time.monotonic()
            said = f"{label}: {done}/{total}  {line}  {_left(bars.tasks[0].time_remaining)}".rstrip()
            show_newest(update, update, 100.0 * done / max(total, 1), said)

    try:
        yield report
    finally:
        if bars.live.is_started:  # stopping one that never started prints an empty line
            bars.stop()


def _left(seconds: float | None) -> str:
    return f"{duration(round(seconds))} left" if seconds and round(seconds) else ""
