"""Verifies a workspace: every file has the bytes that were written, and everything that its versions need exists.

A version needs its record, its bundle and, from inputs to inputs, all artifacts that it was made from. An artifact that
no version needs may be missing. Costs a read of everything (1.7 GB/s).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from deepfloyd_core.crops.eval_record import damaged_records
from deepfloyd_core.store.artifacts import Artifact, all_artifacts, verify_artifact
from deepfloyd_core.store.lineage import Lineage, all_below, inputs_of
from deepfloyd_core.store.versions import Version, readable_versions

_UNPUBLISHED = (
    "belongs to no version: its record was lost, or its run ended just before it published. `deepfloyd run` with its "
    "settings and pictures publishes it; otherwise remove it"
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
    notes: tuple[str, ...]  # no faults: artifacts of which no version is made, and that lack what they were made from

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
    missing = [f"{workspace / name}{needed_by(name)}" for name in every if name not in present]
    damaged = []
    for name, artifact in present.items():
        damaged += [f"{line.removesuffix('.')}{needed_by(name)}" for line in verify_artifact(artifact)]
    named = {f"lora_bundle/{version.bundle}" for version in published}
    records += [f"{artifact.path} {_UNPUBLISHED}" for name, artifact in present.items()
                if artifact.kind == "lora_bundle" and name not in named]  # fmt: skip
    records += damaged_records(workspace)
    notes = list(_notes(present, lineage, set(every)))
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


def _notes(present: dict[str, Artifact], lineage: Lineage, needed: set[str]) -> Iterator[str]:
    for name, artifact in present.items():
        gone = [] if name in needed else [one for one in lineage.get(name, ()) if one not in present]
        if gone:
            yield f"{artifact.path}: its inputs {', '.join(gone)} are missing; no version needs it"
