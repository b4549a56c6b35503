"""What this machine lacks for a run, of what a run would notice late: in milliseconds, without a child process or network.

`deepfloyd doctor` looks further. Nothing is refused here that a run can do without: a workspace that is complete and can
only be read passes.
"""

import shutil
from importlib.util import find_spec
from pathlib import Path

from deepfloyd_core.errors import ConfigError, DeepFloydError, attempt
from deepfloyd_core.store.counts import size
from deepfloyd_core.store.file_trials import nearest_folder, try_locks
from deepfloyd_core.store.locks import is_read_only

JOBS_NEED = ("torch", "diffusers", "transformers", "peft", "safetensors")  # each job imports them
LITTLE_BYTES = 1_000_000_000  # of free disk: checkpoints, shards and embeds of most runs take more


def machine_faults(workspace: Path, has_jobs: bool) -> list[DeepFloydError]:
    """Why no run can be made in a workspace here: no room for a byte, no locks, no folder; with jobs, no torch."""
    faults: list[DeepFloydError] = []
    if missing := [name for name in JOBS_NEED if has_jobs and find_spec(name) is None]:
        install = "pip install --force-reinstall deepfloyd-pipeline"
        faults.append(ConfigError(f"{' and '.join(missing)} cannot be imported. Install it again: {install}"))
    if not is_read_only(workspace):
        attempt(faults, try_locks, workspace)
    return faults


def machine_notes(workspace: Path) -> list[str]:
    """What may end a run in this workspace later: little free disk."""
    free = shutil.disk_usage(nearest_folder(workspace)).free
    if free >= LITTLE_BYTES:
        return []
    return [f"{workspace} is on a disk with {size(free)} free, which a run may fill; `deepfloyd doctor` tells more"]
