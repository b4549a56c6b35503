"""Lineage: the names of the artifacts that an artifact was made from, directly and indirectly.

It is read from the manifests. A version's record keeps a copy: when a manifest is lost, nothing else names the
artifacts that it was made from.
"""

import re
from collections.abc import Callable
from pathlib import Path

from deepfloyd_core.errors import ArtifactError
from deepfloyd_core.store.artifacts import Artifact

_ARTIFACT = re.compile(r"\w+/[0-9a-f]{16}")  # an input that is one

Lineage = dict[str, list[str]]  # by an artifact's name those of its inputs


def inputs_of(artifact: Artifact) -> list[str] | None:
    """The names of the artifacts that an artifact was made from; None when its manifest cannot be read."""
    try:
        return sorted({value for value in artifact.inputs.values() if _ARTIFACT.fullmatch(value)})
    except (ArtifactError, OSError):
        return None


def lineage_of(workspace: Path, name: str) -> Lineage:
    """The inputs of an artifact, of its inputs, and so on, without those whose manifests cannot be read."""
    known: Lineage = {}

    def read(name: str) -> list[str]:
        kind, fingerprint = name.split("/")
        inputs = inputs_of(Artifact(kind, fingerprint, workspace / name))
        if inputs is not None:
            known[name] = inputs
        return inputs or []

    _walk(name, read)
    return known


def all_below(name: str, lineage: Lineage) -> set[str]:
    """An artifact's name, those of its inputs, of theirs, and so on."""
    return _walk(name, lambda each: lineage.get(each, []))


def _walk(name: str, inputs: Callable[[str], list[str]]) -> set[str]:
    """All names reachable from one name; each name is asked for its inputs once."""
    below, left = set[str](), [name]
    while left:
        name = left.pop()
        if name not in below:
            below.add(name)
            left += inputs(name)
    return below
