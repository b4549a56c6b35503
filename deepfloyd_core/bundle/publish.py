"""Publishes a version: its files to a folder, to object storage, or to the Hugging Face Hub. No torch.

A place gets exactly the files of one version, `SHA256SUMS`, which lists them, and a record of ours. What is there with the
same bytes is not sent again, what an earlier publication has left is removed, and a file that was not published is never
touched. A publication that was interrupted is gone on with.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from deepfloyd_core.bundle.publish_files import RECORD, SUMS, FilePlace, Known, PublishedFile
from deepfloyd_core.bundle.publish_hub import HUB, HubPlace
from deepfloyd_core.errors import ArtifactError, ConfigError
from deepfloyd_core.files import sha256_file
from deepfloyd_core.store.artifacts import verify_artifact
from deepfloyd_core.store.events import standing
from deepfloyd_core.store.manifest import MANIFEST
from deepfloyd_core.store.versions import Version, bundle_of
from deepfloyd_core.types import Report, no_report


class Place(Protocol):
    """Where a version is published."""

    name: str

    def known(self, files: Sequence[PublishedFile]) -> Known:
        """What is there. Raises ConfigError for a place that cannot be used, StorageError for one that does not answer."""

    def send(
        self, files: Sequence[PublishedFile], removed: Sequence[str], digests: Mapping[str, str], title: str,
        report: Report,
    ) -> str:  # fmt: skip
        """Send files, remove others, and write `SHA256SUMS` and the record. Returns the address. Raises as `known`.

        digests: sha256 of all files of the publication, by their names.
        """


@dataclass(frozen=True)
class Publication:
    """What has to be done to publish a version."""

    place: Place
    title: str
    files: tuple[PublishedFile, ...]
    known: Known

    @property
    def sent(self) -> tuple[PublishedFile, ...]:
        """The files that are not there yet, or with other bytes."""
        return tuple(file for file in self.files if file.name not in self.known.same)

    @property
    def removed(self) -> tuple[str, ...]:
        """What an earlier publication has left."""
        return tuple(sorted(self.known.ours - {file.name for file in self.files} - {SUMS, RECORD}))

    @property
    def digests(self) -> dict[str, str]:
        """The sha256 of each file, by its name."""
        return {file.name: file.sha256 for file in sorted(self.files, key=lambda file: file.name)}


def planned_publication(workspace: Path, version: Version, target: str, public: bool = False) -> Publication:
    """See what publishing a version to a target comes to; sends nothing. public: a new repository of the Hub is public.

    Raises ConfigError for a version that is blocked and for a target that cannot be used, ArtifactError for a bundle with a
    damaged file, StorageError for a target that does not answer.
    """
    if block := standing(workspace).blocked.get(version.number):
        raise ConfigError(
            f"Version {version.number} is blocked: {block.reason}. `deepfloyd promote` it first, or publish another."
        )
    bundle = bundle_of(workspace, version, is_used=False)
    if damage := verify_artifact(bundle):
        raise ArtifactError(f"Version {version.number} is not published: {damage[0]}")
    files = tuple(
        PublishedFile(entry.path, bundle.path / entry.path, entry.bytes, entry.sha256)
        for entry in bundle.manifest.files
        if not any(part.startswith(".") for part in Path(entry.path).parts)
    )
    # Last its manifest, by which others see that all is whole, and what it was trained on.
    manifest = bundle.path / MANIFEST
    files = (*files, PublishedFile(MANIFEST, manifest, manifest.stat().st_size, sha256_file(manifest)))
    place = _place(target, public)
    return Publication(place, f"Version {version.number} of {workspace.absolute().name}", files, place.known(files))


def publish(plan: Publication, report: Report = no_report) -> str:
    """Do it. Returns the address of what is published; nothing is sent where all is there. Raises as the plan."""
    if plan.known.is_whole:
        return plan.place.name
    return plan.place.send(plan.sent, plan.removed, plan.digests, plan.title, report)


def _place(target: str, public: bool) -> Place:
    if target.startswith(HUB):
        return HubPlace(target, public)
    if public:
        raise ConfigError(f"--public is for the Hugging Face Hub ({HUB}OWNER/NAME), and the target is {target}.")
    if "://" in target and not target.startswith("s3://"):
        raise ConfigError(f"A version is published to a folder, to s3://BUCKET/PREFIX or to {HUB}OWNER/NAME.")
    return FilePlace(target)
