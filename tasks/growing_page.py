"""A page of the UI that changes while its run goes on: of a training its loss curve and its newest samples.

An update of Prefect's replaces the page's text in place, so the run has one page, and its history does not grow.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from uuid import UUID

from prefect.artifacts import create_markdown_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactUpdate

from deepfloyd_core.types import Report
from tasks.outbox import show_newest

LOOK_EVERY_S = 3.0


class GrowingPage:
    """A markdown artifact of the current task: made by the first `put`, changed by the others."""

    def __init__(self, key: str) -> None:
        self._key = key
        self._id: UUID | None = None

    def put(self, markdown: str, description: str) -> None:
        """Show a text in place of the one before. A text that still waits for the server is dropped."""
        show_newest(self, self._send, markdown, description)

    def _send(self, markdown: str, description: str) -> None:
        if self._id is None:
            self._id = create_markdown_artifact(markdown, key=self._key, description=description)  # type: ignore[assignment]
            return
        with get_client(sync_client=True) as client:
            client.update_artifact(self._id, ArtifactUpdate(data=markdown, description=description))


def watched(report: Report, files: Sequence[Path], changed: Callable[[tuple[Path, ...]], None]) -> Report:
    """The report, which also calls `changed` when one of the files was written since; with those that exist."""
    seen, looked = dict[Path, int](), 0.0

    def look(done: int, total: int, line: str) -> None:
        nonlocal seen, looked
        report(done, total, line)
        if time.monotonic() - looked < LOOK_EVERY_S:
            return
        looked = time.monotonic()
        found = {file: file.stat().st_mtime_ns for file in files if file.exists()}
        if found != seen:
            seen = found
            changed(tuple(found))

    return look
