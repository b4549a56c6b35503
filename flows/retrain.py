"""Retrain on a schedule: nothing when data and settings are unchanged, otherwise a new version.

The identity of the planned bundle decides; it is known before anything is made. So data that returns to the state of an
earlier version publishes that version's bundle again, and trains nothing; and a bundle that was blocked is not made again.
"""

from pathlib import Path

from prefect import flow, get_run_logger
from prefect.client.schemas.objects import State

from deepfloyd_core.bundle.waiting import waiting
from deepfloyd_core.bundle.warm import retraining
from deepfloyd_core.config.run import Run
from deepfloyd_core.preflight.check import check_run, check_workers
from deepfloyd_core.store.artifacts import damaged_parts, find
from deepfloyd_core.store.leases import leased
from deepfloyd_core.store.registry import Outcome, settled
from flows.dag import make_pictures, mended
from flows.deployable import deployable
from flows.finetune import ended, make_bundle
from flows.parameters import Overrides, Steps, settings
from flows.runs.run_lease import rename_run, sole_run
from tasks import VERSION
from tasks.events import versions_told
from tasks.image_index import image_index
from tasks.lora_bundle import publish_version
from tasks.plan_page import show_plan


@flow(name="retrain", version=VERSION)
@deployable
@leased
def retrain(
    config: str, stage1_steps: Steps = None, stage2_steps: Steps = None, overrides: Overrides = None
) -> "State[Outcome]":
    """Index; when the bundle that would be made is the champion's or was blocked, complete with "no change"; otherwise
    publish it.

    Args:
        config: The run file, from the project's folder.
        stage1_steps: Steps of Stage I's training, in place of the run file's.
        stage2_steps: Steps of Stage II's training, in place of the run file's.
        overrides: Further keys of the run file, each as KEY=VALUE; KEY= removes one.
    """
    changed = settings(overrides, stage1__max_train_steps=stage1_steps, stage2__max_train_steps=stage2_steps)
    run = check_run(Path(config), changed, "lora_bundle", workers=False)
    with sole_run(run), versions_told(run.workspace):
        return _retrain(run)


def _retrain(run: Run) -> "State[Outcome]":
    index = image_index(run)
    plan = retraining(run, index)
    planned = plan.bundle
    bundle = find(run.workspace, planned) if planned else None
    is_lost = bundle is None or any(damaged_parts(bundle))
    outcome = settled(run.workspace, planned.fingerprint, waits=run.config.gate == "manual") if planned else None
    if outcome is None and (waits := waiting(run, index)):
        outcome = waits
    elif outcome is None or (outcome.state != "blocked" and is_lost):
        if bundle is None or is_lost:
            check_workers(run)
            if planned is None and run.config.retrain_mode == "warm":  # epochs are counted in crops
                mended(make_pictures)(run, index, run.config.stages)
                plan = retraining(run, index)
            show_plan(run, index, plan.starts)
            outcome = make_bundle(run, index, plan.starts, plan.words)
        else:
            outcome = publish_version(run, bundle, index, plan.words)
        rename_run(run.workspace, outcome.version.number)
    end = ended(run, outcome)
    get_run_logger().info("%s", end.message)
    return end
