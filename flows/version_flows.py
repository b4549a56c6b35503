"""Flows that decide which version serves, to be deployed: the same as the commands of these names."""

from pathlib import Path

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Completed

from deepfloyd_core.bundle import history as versions
from deepfloyd_core.store import registry
from flows.arguments import need_workspace
from flows.deployable import deployable
from tasks import VERSION
from tasks.ui_pages import show_history


@flow(name="history", version=VERSION)
@deployable
def history(workspace: str) -> list[versions.HistoryRow]:
    """The versions of a workspace, as a table."""
    rows = versions.history(_workspace(workspace))
    show_history(workspace, rows)
    return rows


@flow(name="promote", version=VERSION)
@deployable
def promote(workspace: str, number: int, reason: str = "") -> "State[str]":
    """Make a version serve, blocked or not."""
    return _told(registry.promote(_workspace(workspace), number, "flow promote", reason))


@flow(name="rollback", version=VERSION)
@deployable
def rollback(workspace: str, reason: str = registry.ROLLED_BACK) -> "State[str]":
    """Block the version that serves, so that the one before it serves again."""
    return _told(registry.rollback(_workspace(workspace), "flow rollback", reason))


@flow(name="block", version=VERSION)
@deployable
def block(workspace: str, number: int, reason: str) -> "State[str]":
    """Block a version: it does not serve, and its bundle is not published again until it is promoted."""
    return _told(registry.block(_workspace(workspace), number, reason, "flow block"))


def _workspace(text: str) -> Path:
    path = Path(text)
    need_workspace(path)
    return path


def _told(sentence: str) -> "State[str]":
    return Completed(message=sentence, data=sentence)
