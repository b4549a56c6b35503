"""`auto_fit`: before anything is trained, what makes a run fit this machine is set, and said."""

import logging

from deepfloyd_core.config.run import Run
from deepfloyd_core.errors import JobError
from deepfloyd_core.models.device import device_of
from deepfloyd_core.models.torch_facts import ask_torch
from deepfloyd_core.planning.fit import fit_after_index
from deepfloyd_core.store.artifacts import Artifact

log = logging.getLogger(__name__)


def fitted(run: Run, index: Artifact) -> Run:
    """The run, with `auto_fit` so that it fits. What does not is left to the job, whose error names the memory."""
    if not run.config.auto_fit:
        return run
    try:
        device = device_of(ask_torch(), run.config.device)
    except JobError as error:
        log.warning("auto_fit: %s", error)
        return run
    found = fit_after_index(run, index, device)
    for line in found.applied:
        log.info("auto_fit: %s", line)
    for line in found.proposed:
        log.warning("auto_fit: %s", line)
    return found.run
