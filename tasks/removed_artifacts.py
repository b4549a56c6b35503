"""What `gc` removes from a workspace, or would remove."""

from datetime import UTC, datetime
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from deepfloyd_core.config.retention import Policy
from deepfloyd_core.store.gc import Collection, collect, would_collect
from tasks.progress import progress
from tasks.ui_pages import show_collection


@task(name="removed_artifacts", cache_policy=NO_CACHE)
def removed_artifacts(workspace: Path, policy: Policy, delete: bool) -> Collection:
    """The plan, done if `delete`. The UI shows it as tables."""
    now = datetime.now(UTC)
    if delete:
        with progress("gc") as report:
            collection = collect(workspace, policy, now, report)
    else:
        collection = would_collect(workspace, policy, now)
    show_collection(workspace, collection, delete)
    return collection
