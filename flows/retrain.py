"""Retrain on a schedule: nothing when the data is as it was, otherwise a new version beside the old ones."""

from pathlib import Path

from prefect import flow, get_run_logger
from prefect.client.schemas.objects import State
from prefect.states import Completed

from deepfloyd_core.bundle import Version, versions
from deepfloyd_core.config import load_run
from deepfloyd_core.image_index import index_request
from deepfloyd_core.scan import scan
from flows.finetune import make_bundle
from tasks.image_index import image_index
from tasks.outbox import server_awaited
from tasks.runners import reach_workers
from tasks.stage_lora import check_models

NO_CHANGE = "no change"


@flow(name="retrain")
@server_awaited
def retrain(config: str, overrides: list[str] | None = None) -> "State[Version | None]":
    """Scan; when the newest version was made from the same data, complete with "no change"; otherwise fine-tune."""
    run = load_run(Path(config), tuple(overrides or ()))
    published = versions(run.workspace)
    index_fingerprint = index_request(run, scan(run)).fingerprint
    if published and published[-1].image_index == index_fingerprint:
        get_run_logger().info("no change since version %d", published[-1].number)
        return Completed(message=NO_CHANGE, data=None)
    check_models(run, run.config.stages)
    reach_workers(run)
    version = make_bundle(run, image_index(run))
    return Completed(message=f"published version {version.number}", data=version)
