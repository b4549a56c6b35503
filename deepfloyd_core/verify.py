"""What `verify` promises: every byte that is in a workspace is as it was written, and what its versions need is all there.

A version needs its record, its bundle and, from inputs to inputs, all that it was made from. What no version needs may be
absent: nobody asks for it. Costs a read of everything (1.7 GB/s).
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from deepfloyd_core.artifacts import Artifact, all_artifacts, verify_artifact
from deepfloyd_core.errors import ArtifactError
from deepfloyd_core.versions import readable_versions

_UNPUBLISHED = (
    "belongs to no version: its record was lost, or its run ended just before it published. `deepfloyd run` with its "
    "settings and pictures publishes it; otherwise remove it"
)
_ARTIFACT = re.compile(r"\w+/[0-9a-f]{16}")  # an input that is one


@dataclass(frozen=True)
class Verified:
    """The outcome; a line for each thing."""

    artifacts: int
    versions: int
    missing: tuple[str, ...]
    damaged: tuple[str, ...]
    records: tuple[str, ...]  # of versions, missing or damaged; and bundles without one
    notes: tuple[str, ...]  # no faults: artifacts of which no version is made, and that lack what they were made from

    @property
    def faults(self) -> int:
        """How many things are wrong."""
        return len(self.missing) + len(self.damaged) + len(self.records)


def verify_workspace(workspace: Path) -> Verified:
    """Re-hash every artifact, read every version, and follow what each was made from."""
    present = {artifact.name: artifact for artifact in all_artifacts(workspace)}
    inputs = {name: _inputs(artifact) for name, artifact in present.items()}
    published, records = readable_versions(workspace)
    needed = {version.number: _all_below(f"lora_bundle/{version.bundle}", inputs) for version in published}

    def needed_by(name: str) -> str:
        numbers = [str(number) for number, names in needed.items() if name in names]
        return f"; needed by version{'s' if len(numbers) > 1 else ''} {', '.join(numbers)}" if numbers else ""

    every = sorted(set().union(*needed.values()))
    missing = [f"{workspace / name}{needed_by(name)}" for name in every if name not in present]
    damaged = []
    for name, artifact in present.items():
        damaged += [f"{line.removesuffix('.')}{needed_by(name)}" for line in verify_artifact(artifact)]
    named = {f"lora_bundle/{version.bundle}" for version in published}
    records += [f"{artifact.path} {_UNPUBLISHED}" for name, artifact in present.items()
                if artifact.kind == "lora_bundle" and name not in named]  # fmt: skip
    notes = list(_notes(present, inputs, set(every)))
    return Verified(len(present), len(published), tuple(missing), tuple(damaged), tuple(records), tuple(notes))


def _inputs(artifact: Artifact) -> tuple[str, ...]:
    """The names of the artifacts that one was made from; none when its manifest cannot be read."""
    try:
        return tuple(value for value in artifact.inputs.values() if _ARTIFACT.fullmatch(value))
    except (ArtifactError, OSError):
        return ()


def _all_below(name: str, inputs: dict[str, tuple[str, ...]]) -> set[str]:
    """An artifact's name, those of its inputs, of theirs, and so on."""
    found, left = set[str](), [name]
    while left:
        name = left.pop()
        if name not in found:
            found.add(name)
            left += inputs.get(name, ())
    return found


def _notes(present: dict[str, Artifact], inputs: dict[str, tuple[str, ...]], needed: set[str]) -> Iterator[str]:
    for name, artifact in present.items():
        gone = [] if name in needed else [one for one in inputs[name] if one not in present]
        if gone:
            yield f"{artifact.path}, which no version needs, was made from {', '.join(gone)}, and that is gone"
