"""Disks: room for the workspace, the hub's cache and temporary files, and what the workspace's file system can do."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from tempfile import gettempdir

from deepfloyd_core.config.base import is_there
from deepfloyd_core.doctor.finding import Finding, told
from deepfloyd_core.errors import StorageError
from deepfloyd_core.preflight.machine import LITTLE_BYTES
from deepfloyd_core.store.counts import size
from deepfloyd_core.store.file_trials import nearest_folder, try_all


@dataclass(frozen=True)
class Place:
    """A folder that will be written to."""

    name: str
    folder: Path
    needed: int  # bytes that are known to come
    remedy: str


def places_of(workspace: Path | None, download: int) -> list[Place]:
    """Where a run writes. workspace: None for the current directory. download: bytes that the hub will send."""
    from huggingface_hub.constants import HF_HUB_CACHE

    here = (workspace or Path.cwd()).absolute()
    room = 'in the run file: workspace = "/a/larger/disk"'
    if workspace is not None and is_there(workspace):
        room = f"deepfloyd gc {quote(str(workspace))} --delete"
    return [
        Place("workspace", here, 0, room),
        Place("hub cache", Path(HF_HUB_CACHE), download, "export HF_HOME=/a/larger/disk"),
        Place("temporary files", Path(gettempdir()), 0, "export TMPDIR=/a/larger/disk"),
    ]


def disk_findings(places: list[Place]) -> list[Finding]:
    """Whether there is room at each place. Places on one disk share its room."""
    found = []
    for place in places:
        disk = nearest_folder(place.folder)
        free, device = shutil.disk_usage(disk).free, disk.stat().st_dev
        needed = sum(each.needed for each in places if nearest_folder(each.folder).stat().st_dev == device)
        text = f"{size(free)} free for {place.folder}"
        if needed and place.needed:
            text = f"{text}, {size(needed)} needed there for models that are not downloaded yet"
        is_little = free < LITTLE_BYTES + (needed if place.needed else 0)
        found.append(
            Finding(f"disk: {place.name}", "fault" if is_little else "fine", text, place.remedy if is_little else None)
        )
    return found


def file_system_findings(workspace: Path) -> list[Finding]:
    """What the file system of a workspace can do, tried there."""
    name = "file system"
    try:
        trials = try_all(workspace)
    except StorageError as error:
        return [told(name, error)]
    if trials.refused:
        return [
            Finding(name, "fault", fault, 'in the run file: workspace = "/a/local/disk"') for fault in trials.refused
        ]
    if trials.links:
        text = f"{nearest_folder(workspace)} has no hard links, so files that versions share are copied: they take more room"
        return [Finding(name, "note", text)]
    return [Finding(name, "fine", f"{nearest_folder(workspace)}: hard links, locks, renames and fsync work")]
