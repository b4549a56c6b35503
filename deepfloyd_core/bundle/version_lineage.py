"""The lineage of a version as steps, for drawings: data, index, crops and text, LoRAs, samples, bundle."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from deepfloyd_core.bundle.in_words import recorded_counts
from deepfloyd_core.errors import ArtifactError
from deepfloyd_core.store.changes import label
from deepfloyd_core.store.counts import many, size
from deepfloyd_core.store.lineage import all_below
from deepfloyd_core.store.lookup import Known, known_artifact
from deepfloyd_core.store.manifest import Manifest
from deepfloyd_core.store.versions import Version

Parts = Mapping[str, Known | None]  # by an artifact's name; None: it is lost or damaged
# The title of each step after the data, and the ends of the kinds that belong to it. What else there is is cut or encoded.
_CROPS = "Crops and text"
_STEPS: Mapping[str, tuple[str, ...]] = {
    "Index": ("image_index",), _CROPS: (), "Start": ("_start",), "Training": ("_lora", "_low_res"),
    "Samples": ("cascade_samples",), "Bundle": ("lora_bundle",),
}  # fmt: skip


@dataclass(frozen=True)
class Node:
    """Something that a version was made from."""

    title: str
    fingerprint: str
    counts: str  # what it holds; empty: it says nothing to a person
    seconds: float | None  # that its making took; None: it is not known
    state: str  # what became of it; empty: it exists


@dataclass(frozen=True)
class Step:
    """Artifacts that are made one after another from those of the step before."""

    title: str
    nodes: tuple[Node, ...]


def parts_of(workspace: Path, version: Version) -> Parts:
    """Everything that a version was made from, and its bundle."""
    bundle = f"lora_bundle/{version.bundle}"
    names = all_below(bundle, version.lineage) | {f"image_index/{version.image_index}"}
    parts: dict[str, Known | None] = dict.fromkeys(sorted(names))
    for name in parts:
        with suppress(ArtifactError, OSError):
            parts[name] = known_artifact(workspace, name)
    return parts


def lineage_steps(version: Version, parts: Parts) -> tuple[Step, ...]:
    """The steps that a version was made in."""
    steps: dict[str, list[Node]] = {title: [] for title in _STEPS}
    for name, part in parts.items():
        steps[_step(name.partition("/")[0])].append(_node(name, part))
    data = Step("Data", (Node("pictures and captions", version.data, "", None, ""),))
    return (data, *(Step(title, tuple(nodes)) for title, nodes in steps.items() if nodes))


def _step(kind: str) -> str:
    return next((title for title, ends in _STEPS.items() if ends and kind.endswith(ends)), _CROPS)


def _node(name: str, part: Known | None) -> Node:
    kind, fingerprint = name.split("/")
    if part is None:
        return Node(label(kind), fingerprint, "", None, "lost or damaged")
    if not isinstance(part.record, Manifest):
        return Node(label(kind), fingerprint, "", None, "unfinished")
    counts, state = recorded_counts(part.record), f"collected {part.collected.day}" if part.collected else ""
    if kind == "lora_bundle":
        files = part.record.files
        counts = f"{many(len(files), 'file')}, {size(sum(file.bytes for file in files))}"
    return Node(label(kind), fingerprint, counts, part.record.provenance.seconds, state)
