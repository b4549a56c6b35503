"""What `gc` removed. Of an artifact that a version was made from, the manifest stays in `<workspace>/collected/`.

So `show` still tells a version's figures and settings, and `verify` distinguishes what was collected from what was lost.
`gc` renames an artifact to `<kind>/.gone-FINGERPRINT`, removes its files, writes this record, then removes the manifest:
a killed `gc` leaves an artifact whole, or gone. Whoever builds the artifact again removes the record.
"""

from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from deepfloyd_core.errors import ArtifactError
from deepfloyd_core.files import TMP_PREFIX, make_folder, read_sealed
from deepfloyd_core.store import mirror
from deepfloyd_core.store.manifest import MANIFEST, Manifest, read_manifest

FOLDER = "collected"
GONE = ".gone-"  # begins the name of an artifact's directory that is being removed


class Collected(BaseModel):
    """The record of a collected artifact."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    when: str  # ISO 8601, UTC
    manifest: Manifest

    @property
    def day(self) -> str:
        """The date, as people read it."""
        return self.when[:10]


@dataclass(frozen=True)
class Records:
    """The records of a workspace, by the artifact's name, and a line for each that is damaged."""

    known: dict[str, Collected]
    damaged: list[str]


def record_file(workspace: Path, name: str) -> Path:
    """The place of an artifact's record. name: KIND/FINGERPRINT."""
    return workspace / FOLDER / f"{name.replace('/', '-')}.json"


def gone_folder(workspace: Path, name: str) -> Path:
    """To where `gc` renames an artifact's directory."""
    kind, fingerprint = name.split("/")
    return workspace / kind / f"{GONE}{fingerprint}"


def write_record(workspace: Path, name: str, when: datetime, manifest: Manifest) -> None:
    """Record that an artifact is collected."""
    file = record_file(workspace, name)
    make_folder(file.parent)
    record = Collected(when=when.astimezone(UTC).isoformat(timespec="seconds"), manifest=manifest)
    mirror.write_record(workspace, file, record.model_dump(mode="json"))


def collected(workspace: Path, name: str) -> Collected | None:
    """The record of a collected artifact; None for an artifact that exists, was never made, or was lost.

    Raises OSError where a disk fails.
    """
    if (workspace / name / MANIFEST).exists():
        return None
    with suppress(ArtifactError, FileNotFoundError, NotADirectoryError):
        return _read(record_file(workspace, name))
    folder = gone_folder(workspace, name)
    # Its files are being removed, or `gc` was killed meanwhile.
    with suppress(ArtifactError, FileNotFoundError, NotADirectoryError):
        when = datetime.fromtimestamp(folder.stat().st_mtime, UTC)
        return Collected(when=when.isoformat(timespec="seconds"), manifest=read_manifest(folder))
    return None


def collected_records(workspace: Path) -> Records:
    """All records of a workspace, also of artifacts that a killed `gc` has not removed yet."""
    known, damaged = dict[str, Collected](), list[str]()
    for file in sorted((workspace / FOLDER).glob("*.json")):
        if file.name.startswith(TMP_PREFIX):
            continue  # of a killed `gc`
        try:
            record = _read(file)
        except (ArtifactError, OSError) as error:
            damaged.append(str(error))
            continue
        known[f"{record.manifest.kind}/{record.manifest.fingerprint}"] = record
    return Records(known, damaged)


def _read(file: Path) -> Collected:
    remedy = "Nothing but history needs it: the artifact is gone, and a run that makes it again removes the record"
    try:
        return Collected.model_validate(read_sealed(file, remedy))
    except ValidationError:
        raise ArtifactError(f"{file} is a sealed record, and not of a collected artifact. {remedy}.") from None
