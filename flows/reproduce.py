"""Make the bundle of a version again, in the scratch workspace of `deepfloyd reproduce`. It is not published."""

from pathlib import Path

from prefect import flow

from deepfloyd_core.bundle.recipe import check_scratch, scratch_starts
from deepfloyd_core.preflight.check import check_run
from deepfloyd_core.store.artifacts import Artifact
from deepfloyd_core.store.leases import leased
from flows.deployable import deployable
from flows.finetune import unpublished_bundle
from flows.parameters import Overrides, settings
from flows.runs.run_lease import sole_run
from tasks import VERSION
from tasks.image_index import image_index


@flow(name="reproduce", version=VERSION)
@deployable
@leased
def reproduce(config: str, overrides: Overrides = None) -> Artifact:
    """Make the bundle that a run file gives.

    Args:
        config: The run file of the scratch folder.
        overrides: None are needed.
    """
    run = check_run(Path(config), settings(overrides), "lora_bundle")
    with sole_run(run):
        index = image_index(run)
        check_scratch(Path(config).parent, index)
        return unpublished_bundle(run, index, scratch_starts(run))
