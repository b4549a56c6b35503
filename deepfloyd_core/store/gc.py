"""Removes what `retention` does not keep, while runs go on.

The plan is made, and every artifact renamed away, under the lock of versions, so that no version is published or
promoted in between; this takes seconds. Then the files are removed, which can take minutes and stops nobody. An artifact
is renamed under its own lock, while no run can take a lease. So a run either finds it, and keeps it until the run ends,
or does not find it. A killed `gc` leaves renamed directories, which the next one removes.
"""

import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Literal

from deepfloyd_core.config.retention import Policy
from deepfloyd_core.errors import ArtifactError, StorageError
from deepfloyd_core.store.bucket_gc import drop_unnamed
from deepfloyd_core.store.bucket_turn import bucket_turn
from deepfloyd_core.store.collected import gone_folder, write_record
from deepfloyd_core.store.events import FOLDER as VERSIONS
from deepfloyd_core.store.events import LostEvent, standing
from deepfloyd_core.store.file_faults import storage_error
from deepfloyd_core.store.inventory import Stored, last_change, take_inventory, tensorboard_folder
from deepfloyd_core.store.leases import drop_ended_leases, no_new_leases, running_leases
from deepfloyd_core.store.locks import artifact_lock, locked, locked_if_free
from deepfloyd_core.store.manifest import MANIFEST, read_manifest
from deepfloyd_core.store.mirror import drop_record, mirror_of
from deepfloyd_core.store.retention import GcPlan, Published, World, plan_gc
from deepfloyd_core.store.versions import (
    Version,
    published_at,
    recorded_versions,
    report_file,
    report_sizes,
)
from deepfloyd_core.types import Report, no_report

_LOCK = "gc"  # two take turns


@dataclass(frozen=True)
class Collection:
    """What `gc` would do, or did."""

    world: World  # before
    policy: Policy
    plan: GcPlan
    in_use: tuple[str, ...] = ()  # artifacts of the plan that a run took meanwhile, so they stayed


def would_collect(workspace: Path, policy: Policy, now: datetime) -> Collection:
    """The plan; writes nothing. Raises ArtifactError when it cannot be known what the versions need."""
    world = survey(workspace)
    return Collection(world, policy, plan_gc(world, policy, now.timestamp()))


def survey(workspace: Path) -> World:
    """The state of a workspace. Raises ArtifactError when the record of a version or of an event cannot be read, or when it
    is not known which version serves.
    """
    published, damaged = recorded_versions(workspace)
    if damaged:
        raise ArtifactError(
            f"{damaged[0]} Nothing is removed while it is not known what that version needs. If there is no backup, "
            "`deepfloyd run` with its settings publishes its bundle under the next number; then move the record out of its "
            "folder."
        )
    now = standing(workspace)
    if unread := [one.fault for one in now.pushed if isinstance(one, LostEvent) and one.is_unread]:
        raise ArtifactError(f"{unread[0]}. Nothing is removed while it is not known which versions have served.")
    places = {file: run_file_place(workspace, file) for file in {version.run_file for version in published} if file}
    return World(
        take_inventory(workspace),
        tuple(_published(workspace, version, places) for version in published),
        now.served,
        running_leases(workspace),
        report_sizes(workspace),
        tuple(str((workspace / file).resolve()) for file, place in sorted(places.items()) if place == "away"),
    )


def run_file_place(workspace: Path, run_file: str) -> Literal["there", "removed", "away"]:
    """Whether a run file, by its path from the workspace, is there, was removed, or cannot be looked at.

    Of a workspace in a bucket it counts as there: it may be on another machine.

    It was removed if its folder is there with something else in it. An empty or missing folder may be where a disk that is
    away is mounted: then its versions stay, for the work of weeks is more than the room of the last versions of one file.
    """
    file = workspace / run_file
    if mirror_of(workspace):
        return "there"
    try:
        if file.exists():
            return "there"
        return "removed" if any(file.parent.iterdir()) else "away"
    except OSError:
        return "away"


def collect(workspace: Path, policy: Policy, now: datetime, report: Report = no_report) -> Collection:
    """Remove what the policy does not keep. Returns what was removed.

    Raises ArtifactError as `would_collect`, StorageError when something cannot be removed (the rest is removed then), and
    BusyError where a run of any machine is at work in a workspace that is in a bucket.
    """
    errors: list[StorageError] = []
    with locked(workspace, _LOCK), bucket_turn(workspace, "deepfloyd gc", wait=False):
        before = would_collect(workspace, policy, now)
        gone = [leftover.path for leftover, _ in before.plan.leftovers]
        _remove_all(workspace, gone, _of_versions(before.world), now, errors, no_report)
        with locked(workspace, VERSIONS):
            planned = would_collect(workspace, policy, now)
            _remove_reports(workspace, planned.plan.reports, errors)
            renamed = [going for going in planned.plan.goes if _rename_away(workspace, going.artifact, errors)]
        gone = [gone_folder(workspace, going.artifact.name) for going in renamed]
        _remove_all(workspace, gone, _of_versions(planned.world), now, errors, report)
        drop_unnamed(workspace, policy.keep_days)
        drop_ended_leases(workspace)
    if errors:
        raise errors[0]
    in_use = [going.artifact.name for going in planned.plan.goes if going not in renamed]
    plan = replace(planned.plan, goes=tuple(renamed), leftovers=before.plan.leftovers)
    return Collection(planned.world, policy, plan, tuple(in_use))


def _published(workspace: Path, version: Version, places: Mapping[str, str]) -> Published:
    known = "" if places.get(version.run_file) == "removed" else version.run_file
    return Published(
        version.number, f"lora_bundle/{version.bundle}", f"image_index/{version.image_index}", version.lineage,
        published_at(workspace, version.number), known,
    )  # fmt: skip


def _of_versions(world: World) -> set[str]:
    """The artifacts of which a record is kept."""
    names = {name for version in world.versions for name in version.lineage}
    return names | {name for version in world.versions for name in (version.bundle, version.image_index)}


def _remove_reports(workspace: Path, numbers: Iterable[int], errors: list[StorageError]) -> None:
    for number in numbers:
        try:
            report_file(workspace, number).unlink(missing_ok=True)
        except OSError as error:
            errors.append(storage_error(error, "removed", report_file(workspace, number)))


def _rename_away(workspace: Path, artifact: Stored, errors: list[StorageError]) -> bool:
    """Rename an artifact's directory, unless a run uses it. Returns whether it is renamed."""
    folder, gone = workspace / artifact.name, gone_folder(workspace, artifact.name)
    try:
        with no_new_leases(workspace) as leases, locked_if_free(workspace, artifact_lock(artifact.name)) as free:
            if artifact.name in leases or not free or not _is_unchanged(folder, artifact):
                return False
            folder.rename(gone)
            with suppress(OSError):  # there is none; or it is on another disk, and stays for the next `gc`
                tensorboard_folder(workspace, artifact.name).rename(gone / ".tensorboard")
    except StorageError as error:
        errors.append(error)
        return False
    return True


def _is_unchanged(folder: Path, artifact: Stored) -> bool:
    """Whether an artifact is as the inventory says: no run has continued or removed it since."""
    if artifact.finished:
        return (folder / MANIFEST).exists()
    return folder.exists() and not (folder / MANIFEST).exists() and last_change(folder) == artifact.changed


def _remove_all(
    workspace: Path, folders: Iterable[Path], recorded: set[str], now: datetime, errors: list[StorageError],
    report: Report,
) -> None:  # fmt: skip
    """Remove directories. `recorded`: the artifacts whose manifests stay as records."""
    folders = list(folders)
    for number, folder in enumerate(folders, 1):
        try:
            _remove(workspace, folder, recorded, now)
        except StorageError as error:
            errors.append(error)
        except OSError as error:
            errors.append(storage_error(error, "removed", folder))
        report(number, len(folders), "directories removed")


def _remove(workspace: Path, folder: Path, recorded: set[str], now: datetime) -> None:
    """Remove a renamed directory; first all but its manifest, so that there is room for the record on a full disk."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != MANIFEST:
            path.unlink()
    with suppress(ArtifactError):  # there is no manifest, or a damaged one: no record
        manifest = read_manifest(folder)
        name = f"{manifest.kind}/{manifest.fingerprint}"
        with locked_if_free(workspace, artifact_lock(name)) as free:  # else a run builds it again
            if free and not (workspace / name / MANIFEST).exists():
                if name in recorded:
                    write_record(workspace, name, now, manifest)
                drop_record(workspace, workspace / name / MANIFEST)  # in the bucket
    shutil.rmtree(folder)
