"""Disks: room for the workspace, the hub's cache and temporary files, and what the workspace's file system can do."""

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from errno import ENOSPC
from pathlib import Path
from shlex import quote
from tempfile import gettempdir

from deepfloyd_core.config.base import is_there
from deepfloyd_core.doctor.finding import Finding, told
from deepfloyd_core.errors import StorageError
from deepfloyd_core.preflight.machine import LITTLE_BYTES
from deepfloyd_core.store.counts import size
from deepfloyd_core.store.file_trials import nearest_folder, try_all

_LEAST_BYTES = 100_000_000  # with less free, nothing of use is made


@dataclass(frozen=True)
class Coming:
    """Bytes that a run will write."""

    what: str
    num_bytes: int
    is_certain: bool = True  # False: at most so many


@dataclass(frozen=True)
class Place:
    """A folder that will be written to."""

    name: str
    folder: Path
    remedy: str
    wanted: int  # bytes that should be free in any case
    coming: tuple[Coming, ...] = ()


def places_of(workspace: Path | None, downloads: int, embeds: Coming | None) -> list[Place]:
    """Where a run writes. workspace: None for the current directory. downloads: bytes of models. embeds: of captions."""
    from huggingface_hub.constants import HF_HUB_CACHE

    here = (workspace or Path.cwd()).absolute()
    room = 'in the run file: workspace = "/a/larger/disk"'
    if workspace is not None and is_there(workspace):
        room = f"deepfloyd gc {quote(str(workspace))} --delete"
    models = (Coming("models", downloads),) if downloads else ()
    return [
        Place("hub cache", Path(HF_HUB_CACHE), "export HF_HOME=/a/larger/disk", 0, models),
        Place("workspace" if workspace else "this folder", here, room, LITTLE_BYTES, (embeds,) if embeds else ()),
        Place("temporary files", Path(gettempdir()), "export TMPDIR=/a/larger/disk", _LEAST_BYTES),
    ]


def disk_findings(places: Iterable[Place]) -> list[Finding]:
    """For each disk how much is free, and whether that is enough for the places on it."""
    disks: dict[int, list[Place]] = {}
    for place in places:
        disks.setdefault(nearest_folder(place.folder).stat().st_dev, []).append(place)
    return [_disk_finding(on_disk) for on_disk in disks.values()]


def _disk_finding(places: list[Place]) -> Finding:
    free = shutil.disk_usage(nearest_folder(places[0].folder)).free
    coming = [each for place in places for each in place.coming]
    wanted = max(place.wanted for place in places)
    certain = min(wanted, _LEAST_BYTES) + sum(each.num_bytes for each in coming if each.is_certain)
    at_most = wanted + sum(each.num_bytes for each in coming)
    named = ", ".join(f"{place.name} {place.folder}" for place in places)
    text = "; ".join([f"{size(free)} free for {named}", *(_coming_told(each) for each in coming)])
    # Of several places the one that most is written to, as moving that helps most.
    remedy = max(places, key=lambda place: (sum(each.num_bytes for each in place.coming), place.wanted)).remedy
    if free < certain:
        return Finding("disk", "fault", text, remedy)
    if free < at_most:
        return Finding("disk", "note", f"{text}; {size(at_most)} should be free", remedy)
    return Finding("disk", "fine", text)


def _coming_told(coming: Coming) -> str:
    return f"{coming.what} will take {'' if coming.is_certain else 'at most '}{size(coming.num_bytes)}"


def file_system_findings(workspace: Path) -> list[Finding]:
    """What the file system of a workspace can do, tried there."""
    name = "file system"
    try:
        trials = try_all(workspace)
    except StorageError as error:
        is_full = isinstance(error.__cause__, OSError) and error.__cause__.errno == ENOSPC
        return [] if is_full else [told(name, error)]  # the disk's own finding says so
    if trials.refused:
        remedy = 'in the run file: workspace = "/a/local/disk"'
        return [Finding(name, "fault", fault, remedy) for fault in trials.refused]
    place = nearest_folder(workspace)
    if trials.links:
        text = f"{place} has no hard links: files that versions share are copied, and take more room"
        return [Finding(name, "note", text)]
    return [Finding(name, "fine", f"{place}: hard links, locks, renames and fsync work")]
