"""Remove what a workspace keeps of old versions, abandoned work and old generated pictures, on a schedule."""

from typing import Annotated

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Completed
from pydantic import Field

from deepfloyd_core.config import retention
from deepfloyd_core.store.gc_tables import outcome_words
from deepfloyd_core.store.lookup import opened_workspace
from flows.deployable import deployable
from flows.runs.run_lease import rename_run
from tasks import VERSION
from tasks.removed_artifacts import removed_artifacts


@flow(name="gc", version=VERSION)
@deployable
def gc(
    workspace: str,
    delete: bool = False,
    keep_versions: Annotated[int, Field(ge=1, le=retention.MOST_VERSIONS)] = retention.DEFAULT.keep_versions,
    keep_days: Annotated[float, Field(ge=0, le=retention.MOST_DAYS)] = retention.DEFAULT.keep_days,
) -> "State[int]":
    """Show what no run needs any more, and remove it if `delete` is on. The run's Artifacts tab lists it, with the bytes.

    Args:
        workspace: Directory of the artifacts, as `workspace` of the run file names it.
        delete: Remove it. Off: only show what would go.
        keep_versions: How many of the last versions of each run file stay, with everything they were made from.
        keep_days: How many days anything else stays after its last change.
    """
    path = opened_workspace(workspace)
    rename_run(path)
    policy = retention.Policy(keep_versions=keep_versions, keep_days=keep_days)
    collection = removed_artifacts(path, policy, delete)
    return Completed(message=" ".join(outcome_words(collection, delete)), data=collection.plan.frees)
