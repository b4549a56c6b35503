"""Flows that decide which version serves, to be deployed: the same as the commands of these names."""

from collections.abc import Callable
from pathlib import Path

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Completed

from deepfloyd_core.bundle import history as versions
from deepfloyd_core.bundle.publish import planned_publication
from deepfloyd_core.bundle.publish import publish as published
from deepfloyd_core.bundle.version_page import write_changed_reports
from deepfloyd_core.store import registry
from deepfloyd_core.store.counts import many
from deepfloyd_core.store.events import standing
from deepfloyd_core.store.lookup import opened_workspace
from deepfloyd_core.store.versions import find_version
from flows.deployable import deployable
from flows.parameters import Number, OneVersion
from flows.runs.run_lease import rename_run
from tasks import VERSION
from tasks.events import versions_told
from tasks.progress import progress
from tasks.ui_pages import show_history
from tasks.version_page import show_serving_version


@flow(name="history", version=VERSION)
@deployable
def history(workspace: str) -> list[versions.HistoryRow]:
    """The versions of a workspace, as a table and as a drawing of their figures.

    Args:
        workspace: The folder that `workspace` of a run file names, from the project's folder.
    """
    folder = _workspace(workspace)
    rows = versions.history(folder)
    show_history(folder, rows)
    return rows


@flow(name="promote", version=VERSION)
@deployable
def promote(workspace: str, number: Number, reason: str = "") -> "State[str]":
    """Make a version serve, blocked or not.

    Args:
        workspace: The folder that `workspace` of a run file names, from the project's folder.
        number: The version.
        reason: For the history; may be empty.
    """
    return _decided(_workspace(workspace), lambda path: registry.promote(path, number, "flow promote", reason))


@flow(name="rollback", version=VERSION)
@deployable
def rollback(workspace: str, reason: str = registry.ROLLED_BACK) -> "State[str]":
    """Block the version that serves, so that the one before it serves again.

    Args:
        workspace: The folder that `workspace` of a run file names, from the project's folder.
        reason: For the history.
    """
    return _decided(_workspace(workspace), lambda path: registry.rollback(path, "flow rollback", reason))


@flow(name="block", version=VERSION)
@deployable
def block(workspace: str, number: Number, reason: str) -> "State[str]":
    """Block a version: it does not serve, and its bundle is not published again until it is promoted.

    Args:
        workspace: The folder that `workspace` of a run file names, from the project's folder.
        number: The version.
        reason: For the history.
    """
    return _decided(_workspace(workspace), lambda path: registry.block(path, number, reason, "flow block"))


@flow(name="publish", version=VERSION)
@deployable
def publish(workspace: str, target: str, version: OneVersion = "latest", public: bool = False) -> "State[str]":
    """Copy a version's files to a folder, to S3 or to the Hugging Face Hub; what is there already is not sent again.

    Args:
        workspace: The folder that `workspace` of a run file names, from the project's folder.
        target: A folder; or s3://BUCKET/PREFIX or hf://OWNER/NAME, which has to begin with a place in the worker's
            DEEPFLOYD_TARGETS.
        version: A version number, `champion` or `latest`.
        public: A new repository of the Hub is public; else it is private.
    """
    path = _workspace(workspace)
    plan = planned_publication(path, find_version(path, str(version)), target, public)
    with progress("publish") as report:
        address = published(plan, report)
    sentence = f"{plan.title}: {many(len(plan.sent), 'file')} sent to {address}"
    return Completed(message=sentence, data=sentence)


def _workspace(text: str) -> Path:
    path = opened_workspace(text)
    rename_run(path)
    return path


def _decided(workspace: Path, decide: Callable[[Path], str]) -> "State[str]":
    """Decide, and bring the reports and the page of the workspace's version up to date."""
    earlier = standing(workspace)
    with versions_told(workspace):
        sentence = decide(workspace)
    write_changed_reports(workspace, earlier)
    show_serving_version(workspace)
    return Completed(message=sentence, data=sentence)
