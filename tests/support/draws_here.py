"""Drawing through `deepfloyd_core.api` in the test's process, as a script does but without a process for each job."""

from typing import Any

import pytest

from deepfloyd_core.processes.jobs import Job, imported
from deepfloyd_core.sampling.texts_jobs import TextsRequest
from deepfloyd_core.store.artifacts import WorkDir
from deepfloyd_core.types import Report, no_report


def draw_in_this_process(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Returns the requests of the jobs that are done from now on, without those that encode texts."""
    requests: list[Any] = []

    def done_here(request: Any, work: WorkDir, report: Report = no_report) -> Any:
        if not isinstance(request, TextsRequest):
            requests.append(request)
        return imported(request.entry)(Job(request, work.path, report))

    for module in ("drawing.upscaled", "sampling.texts_jobs"):
        monkeypatch.setattr(f"deepfloyd_core.{module}.run_job", done_here)
    return requests
