"""Retrain on a schedule: nothing when data and settings are unchanged, otherwise a new version.

The identity of the planned bundle decides; it is known before anything is made. So data that returns to the state of an
earlier version publishes that version's bundle again, and trains nothing.
"""

from pathlib import Path

from prefect import flow, get_run_logger
from prefect.client.schemas.objects import State
from prefect.states import Completed

from deepfloyd_core.bundle.planned import planned_bundle
from deepfloyd_core.preflight.check import check_run, check_workers
from deepfloyd_core.store.artifacts import find, missing_parts
from deepfloyd_core.store.versions import Version, current, news_of
from flows.finetune import make_bundle
from tasks import VERSION
from tasks.image_index import image_index
from tasks.lora_bundle import publish_version
from tasks.outbox import server_awaited

NO_CHANGE = "no change"


@flow(name="retrain", version=VERSION)
@server_awaited
def retrain(config: str, overrides: list[str] | None = None) -> "State[Version | None]":
    """Index; when the current version is what would be made, complete with "no change"; otherwise publish what would be."""
    run = check_run(Path(config), tuple(overrides or ()), "lora_bundle", workers=False)
    before = current(run.workspace)
    index = image_index(run)
    planned = planned_bundle(run, index)
    bundle = find(run.workspace, planned) if planned else None
    if bundle is None or any(missing_parts(bundle)):
        check_workers(run)
        version = make_bundle(run, index)
    elif before and before.bundle == bundle.fingerprint:
        get_run_logger().info("no change since version %d", before.number)
        return Completed(message=NO_CHANGE, data=None)
    else:
        version = publish_version(run, bundle, index)
    return Completed(message=news_of(run.workspace, version, before), data=version)
