"""Drawing through `deepfloyd_core.api` in the test's process, as a script does but without a process for each job."""

from typing import Any

import pytest

from deepfloyd_core.processes.jobs import Job, imported
from deepfloyd_core.store.artifacts import WorkDir
from deepfloyd_core.types import Report, no_report


def draw_in_this_process(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Returns the requests of the jobs that are done from now on."""
    requests: list[Any] = []

    def done_here(request: Any, work: WorkDir, report: Report = no_report) -> Any:
        requests.append(request)
        return imported(request.entry)(Job(request, work.path, report))

    for entry in ("generated", "upscaled"):
        monkeypatch.setattr(f"deepfloyd_core.drawing.{entry}.run_job", done_here)
    return requests
