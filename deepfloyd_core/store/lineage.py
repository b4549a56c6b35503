"""Lineage: the names of the artifacts that an artifact was made from, directly and indirectly.

It is read from the manifests. A version's record keeps a copy: when a manifest is lost, nothing else names the
artifacts that it was made from.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from deepfloyd_core.errors import ArtifactError
from deepfloyd_core.store.artifacts import Artifact
from deepfloyd_core.store.collected import collected

_ARTIFACT = re.compile(r"\w+/[0-9a-f]{16}")  # an input that is one

Lineage = dict[str, list[str]]  # by an artifact's name those of its inputs


def artifact_names(inputs: Mapping[str, str]) -> list[str]:
    """The inputs that are artifacts; others are files from elsewhere."""
    return sorted({value for value in inputs.values() if _ARTIFACT.fullmatch(value)})


def inputs_of(artifact: Artifact) -> list[str] | None:
    """The names of the artifacts that an artifact was made from; None when its manifest cannot be read."""
    try:
        return artifact_names(artifact.inputs)
    except (ArtifactError, OSError):
        return None


def lineage_of(workspace: Path, name: str) -> Lineage:
    """The inputs of an artifact, of its inputs, and so on, without those whose manifests are lost or damaged."""
    known: Lineage = {}

    def read(name: str) -> list[str]:
        kind, fingerprint = name.split("/")
        inputs = inputs_of(Artifact(kind, fingerprint, workspace / name))
        if inputs is None and (record := collected(workspace, name)):
            inputs = artifact_names(record.manifest.inputs)
        if inputs is not None:
            known[name] = inputs
        return inputs or []

    reached(name, read)
    return known


def all_below(name: str, lineage: Lineage) -> set[str]:
    """An artifact's name, those of its inputs, of theirs, and so on."""
    return reached(name, lambda each: lineage.get(each, []))


def reached(name: str, inputs: Callable[[str], list[str]]) -> set[str]:
    """All names reachable from one name; each name is asked for its inputs once."""
    below, left = set[str](), [name]
    while left:
        name = left.pop()
        if name not in below:
            below.add(name)
            left += inputs(name)
    return below
