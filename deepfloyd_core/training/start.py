"""What a warm training of a stage starts from: a version's weights, the pictures that they know, their held-out losses.

It is an artifact of its own, of copies, so it stays with the versions that were trained from it when `gc` removes the
version that it is of, and these can be made again. No torch.
"""

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from deepfloyd_core.adapters.lora_file import weights_file
from deepfloyd_core.arrow import mapped_table, table_digest
from deepfloyd_core.config.stages import STAGES, Stage
from deepfloyd_core.files import atomic_path
from deepfloyd_core.store.artifacts import Artifact, Request, WorkDir, materialise
from deepfloyd_core.store.manifest import Summary
from deepfloyd_core.store.parts import copy_part
from deepfloyd_core.store.pinned import PinnedFile
from deepfloyd_core.training.jobs import VALIDATION_FILE

START_FORMAT = 1
_KNOWN_FILE = "known.arrow"


class StartSummary(Summary):
    """The summary of a start."""

    version: int  # the first one that has these weights
    pictures: int  # that the weights were trained on, or their ancestors


@dataclass(frozen=True)
class StartSource:
    """Where the parts of a start are."""

    bundle: Artifact
    folder: Path  # of the stage, in the bundle
    version: int
    known: pa.Table  # image_id of each picture that the weights know, by name, each once

    @property
    def parts(self) -> dict[Path, str]:
        """The files, each with its sha256: the weights first, then the losses."""
        files = (weights_file(self.folder, str(self.folder)), self.folder / VALIDATION_FILE)
        hashes = self.bundle.hashes
        return {file: hashes[str(file.relative_to(self.bundle.path))] for file in files}


def start_kind(stage: Stage) -> str:
    """The kind of artifact."""
    return f"{STAGES[stage].table}_start"


def make_start(workspace: Path, stage: Stage, source: StartSource) -> Artifact:
    """The start of a stage: costs a hash of its files. Raises ArtifactError when one is not as it was published."""
    weights, losses = source.parts.values()
    inputs = {"weights": weights, "losses": losses, "pictures": table_digest([source.known])}

    def build(work: WorkDir) -> StartSummary:
        for file, sha256 in source.parts.items():
            copy_part(file, sha256, work.path / file.name)
        with atomic_path(work.path / _KNOWN_FILE) as tmp, pa.ipc.new_file(tmp, source.known.schema) as writer:
            writer.write_table(source.known)
        return StartSummary(version=source.version, pictures=len(source.known))

    return materialise(workspace, Request(start_kind(stage), START_FORMAT, {}, inputs), build)


def start_weights(start: Artifact) -> PinnedFile:
    """The weights of a start."""
    file = weights_file(start.path, str(start.path))
    return PinnedFile(file.absolute(), start.hashes[file.name])


def known_pictures(start: Artifact | None) -> pa.Array | None:
    """The pictures that the weights of a start know; None: there is no start."""
    return None if start is None else mapped_table(start.path / _KNOWN_FILE)["image_id"].combine_chunks()
