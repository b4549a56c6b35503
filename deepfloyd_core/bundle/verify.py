"""Verifies a workspace: every file has the bytes that were written, and everything that its versions need exists.

A version needs its record, its bundle and, from inputs to inputs, all artifacts that it was made from. An artifact that
no version needs may be missing, and so may one that `gc` collected. Costs a read of everything (1.7 GB/s).
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from deepfloyd_core.crops.eval_record import damaged_records
from deepfloyd_core.store.artifacts import Artifact, all_artifacts, verify_artifact
from deepfloyd_core.store.collected import Collected, collected, collected_records
from deepfloyd_core.store.counts import ranges
from deepfloyd_core.store.lineage import Lineage, all_below, inputs_of
from deepfloyd_core.store.manifest import MANIFEST
from deepfloyd_core.store.versions import Version, readable_versions

_UNPUBLISHED = (
    "belongs to no version: its record was lost, or its run ended just before it published. `deepfloyd run` with its "
    "settings and pictures publishes it; otherwise `deepfloyd gc` removes it"
)
_UNKNOWN = "; its inputs are not known, so more may be missing"


@dataclass(frozen=True)
class Verified:
    """The outcome; a line for each thing."""

    artifacts: int
    versions: int
    missing: tuple[str, ...]
    damaged: tuple[str, ...]
    records: tuple[str, ...]  # of versions or held-out pictures, missing or damaged; bundles without one
    notes: tuple[str, ...]  # no faults: versions that `gc` collected; artifacts of no version that lack their inputs

    @property
    def faults(self) -> int:
        """How many things are wrong."""
        return len(self.missing) + len(self.damaged) + len(self.records)


def verify_workspace(workspace: Path) -> Verified:
    """Hash every artifact again, read every version, and follow the inputs of each."""
    present = {artifact.name: artifact for artifact in all_artifacts(workspace)}
    published, records = readable_versions(workspace)
    lineage = _lineage(present, published)
    needed = {version.number: _needed(version, lineage) for version in published}

    def needed_by(name: str) -> str:
        numbers = [str(number) for number, names in needed.items() if name in names]
        by = f"; needed by version{'s' if len(numbers) > 1 else ''} {', '.join(numbers)}"
        return by + ("" if name in lineage else _UNKNOWN) if numbers else ""

    every = sorted(set().union(*needed.values()))
    damaged = []
    for name, artifact in present.items():
        damaged += [f"{line.removesuffix('.')}{needed_by(name)}" for line in _damage(workspace, artifact)]
    lost = [name for name in every if not _exists(workspace, name)]
    gone = {name: record for name in lost if (record := _collected(workspace, name))}
    missing = [f"{workspace / name}{needed_by(name)}" for name in lost if name not in gone]
    named = {f"lora_bundle/{version.bundle}" for version in published}
    records += [f"{artifact.path} {_UNPUBLISHED}" for name, artifact in present.items()
                if artifact.kind == "lora_bundle" and name not in named]  # fmt: skip
    records += damaged_records(workspace) + collected_records(workspace).damaged
    notes = [*_notes(workspace, present, lineage, set(every)), *_collected_notes(published, needed, gone)]
    return Verified(len(present), len(published), tuple(missing), tuple(damaged), tuple(records), tuple(notes))


def _lineage(present: dict[str, Artifact], published: list[Version]) -> Lineage:
    """The inputs of all artifacts: from the records of versions, which outlive them, and from the manifests that can be
    read.
    """
    lineage: Lineage = {}
    for version in published:
        lineage |= version.lineage
    read = {name: inputs_of(artifact) for name, artifact in present.items()}
    return lineage | {name: inputs for name, inputs in read.items() if inputs is not None}


def _needed(version: Version, lineage: Lineage) -> set[str]:
    """The names of everything that a version was made from; includes its bundle and its index even if both are missing."""
    return all_below(f"lora_bundle/{version.bundle}", lineage) | all_below(
        f"image_index/{version.image_index}", lineage
    )


def _exists(workspace: Path, name: str) -> bool:
    return (workspace / name / MANIFEST).exists()


def _collected(workspace: Path, name: str) -> Collected | None:
    with suppress(OSError):  # `collected_records` tells it
        return collected(workspace, name)
    return None


def _damage(workspace: Path, artifact: Artifact) -> list[str]:
    """The faults of an artifact; none if it was collected while it was hashed."""
    lines = verify_artifact(artifact)
    return [] if lines and _collected(workspace, artifact.name) else lines


def _notes(workspace: Path, present: dict[str, Artifact], lineage: Lineage, needed: set[str]) -> Iterator[str]:
    for name, artifact in present.items():
        inputs = [] if name in needed else lineage.get(name, ())
        gone = [one for one in inputs if one not in present and not _collected(workspace, one)]
        if gone:
            yield f"{artifact.path}: its inputs {', '.join(gone)} are missing; no version needs it"


def _collected_notes(
    published: list[Version], needed: dict[int, set[str]], gone: dict[str, Collected]
) -> Iterator[str]:
    """Which versions `gc` has taken artifacts from, by the day of the last one: with their bundles, or without."""
    unusable, usable = dict[str, list[int]](), dict[str, list[int]]()
    for version in published:
        if days := [gone[name].day for name in needed[version.number] if name in gone]:
            kept = unusable if f"lora_bundle/{version.bundle}" in gone else usable
            kept.setdefault(max(days), []).append(version.number)
    for day, numbers in unusable.items():
        yield f"{_versions(numbers)}: collected on {day} by `deepfloyd gc`, cannot be used"
    for day, numbers in usable.items():
        yield f"{_versions(numbers)}: usable; something that it was made from was collected on {day} by `deepfloyd gc`"


def _versions(numbers: list[int]) -> str:
    return f"version{'s' if len(numbers) > 1 else ''} {ranges(numbers)}"
