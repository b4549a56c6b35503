"""The command `generate` and its deployment in the test's process: without Prefect, and without a process for the job."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
from command_here import ForkServerHere
from draws_here import draw_in_this_process

from deepfloyd_core.drawing.generated import draw
from flows import deployable
from flows import generate as module
from flows.commands import drawing


def without_prefect(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """The flow as a deployment calls it, in the project's folder, which is the current one; the command calls it as well."""
    draw_in_this_process(monkeypatch)
    layers = inspect.unwrap(module.generate.fn, stop=lambda layer: Path(inspect.getfile(layer)).stem == "deployable")

    def flow(deployed: bool, **parameters: Any) -> Any:
        with monkeypatch.context() as patched:
            patched.setattr(deployable, "_is_deployed", lambda: deployed)
            return layers(**parameters)

    @contextmanager
    def session(loaded: Any, name: str) -> Iterator[Callable[..., Any]]:
        assert name == "flows.generate:generate"
        yield lambda **more: flow(False, config=str(loaded.config), overrides=loaded.overrides, **more)

    monkeypatch.setattr(module, "generated", draw)
    monkeypatch.setattr(module, "rename_run", lambda *_: None)
    monkeypatch.setattr(module, "gpu_of", lambda *_: nullcontext())
    monkeypatch.setattr(drawing, "session", session)
    monkeypatch.setattr("deepfloyd_core.processes.ahead.worker_ahead", lambda *_: nullcontext())
    monkeypatch.setattr("deepfloyd_core.processes.jobs.ForkServer", ForkServerHere)
    return lambda **parameters: flow(True, **parameters)
