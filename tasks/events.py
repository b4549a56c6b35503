"""Events of ours on the Prefect server, for automations: what happened to a version, and that the pictures changed.

The resource of each is the workspace, `deepfloyd.workspace.NAME`. Prefect keeps events that it cannot send.
"""

from pathlib import Path
from typing import Literal

from prefect.events import emit_event

from deepfloyd_core.store.registry import Outcome, news_of

Happened = Literal["candidate", "promoted", "blocked"]
_AS: dict[str, Happened] = {"champion": "promoted", "blocked": "blocked", "candidate": "candidate"}


def emit_outcome(workspace: Path, outcome: Outcome) -> None:
    """Emit what a run came to, if that is new."""
    if outcome.is_new:
        emit_version(workspace, _AS[outcome.state], outcome.version.number, news_of(workspace, outcome))


def emit_version(workspace: Path, happened: Happened, number: int, message: str) -> None:
    """Emit `deepfloyd.version.HAPPENED`, with the version's number, and a sentence for people."""
    _emit(workspace, f"deepfloyd.version.{happened}", {"version": number, "message": message})


def emit_data_changed(workspace: Path, lines: list[str]) -> None:
    """Emit `deepfloyd.data.changed`, with a line for each kind of change."""
    _emit(workspace, "deepfloyd.data.changed", {"message": "; ".join(lines)})


def _emit(workspace: Path, event: str, payload: dict[str, object]) -> None:
    resource = {
        "prefect.resource.id": f"deepfloyd.workspace.{workspace.name}",
        "prefect.resource.name": workspace.name,
        "deepfloyd.workspace": str(workspace.absolute()),
    }
    emit_event(event, resource, payload=payload)
