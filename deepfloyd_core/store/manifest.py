"""The manifest of a finished artifact (the record in its manifest.json), and the summary that its builder reported.

The record is plain JSON. Each kind of artifact has its own summary class, in the room that builds it. A summary field
whose default is None is left out of the record while it is None.
"""

import math
import stat
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from deepfloyd_core.errors import ArtifactError
from deepfloyd_core.files import read_sealed, sha256_file
from deepfloyd_core.types import Json

MANIFEST = "manifest.json"
# Rows of crops and of texts. Their readers check each row that they read, which costs less than a hash of the file.
_ROWS = ("stage?-*.parquet", "embeds-*.arrow", "text-*.arrow")
# Bytes. A shard has 64 MiB by default, the LoRA of IF-I-XL 60 MB, its UNet 17 GB.
_SMALL_ROWS, _SMALL = 32 << 20, 1 << 30
_LISTS = (".parquet", ".arrow")  # all others, of some 100 bytes a picture
_REBUILT = "The next run that needs the artifact rebuilds it"


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


def _inside(path: str) -> str:
    if "\0" in path or path.startswith("/") or ".." in path.split("/"):
        raise ValueError("a path that leads out of the artifact")
    return path


class FileEntry(_Record):
    """A file of an artifact."""

    path: Annotated[str, AfterValidator(_inside)]  # inside the artifact
    bytes: int
    sha256: str

    def misfit(self, folder: Path) -> str:
        """Why it is not in an artifact's directory with this size, by its path; empty: it is. Raises OSError where a disk
        fails.
        """
        file = folder / self.path
        try:
            found = file.stat()
        except (FileNotFoundError, NotADirectoryError):
            found = None
        if found is None or not stat.S_ISREG(found.st_mode):
            return f"{file} is missing"
        size = found.st_size
        return "" if size == self.bytes else f"{file} has {size} bytes, its manifest says {self.bytes}"

    def damage(self, folder: Path) -> str:
        """Why it is not in an artifact's directory with these bytes, by its path; empty: it is. Raises OSError where a disk
        fails. Costs a hash of the file (1.7 GB/s).
        """
        file = folder / self.path
        if fault := self.misfit(folder):
            return fault
        return "" if sha256_file(file) == self.sha256 else f"{file} has other bytes than its manifest says"

    def damage_if_small(self, folder: Path) -> str:
        """`damage` of a file that is hashed before each use; `misfit` of large files of rows and whole UNets."""
        return self.damage(folder) if self.bytes <= self._hashed_up_to else self.misfit(folder)

    @property
    def _hashed_up_to(self) -> float:
        """Bytes."""
        if any(fnmatch(self.path, pattern) for pattern in _ROWS):
            return _SMALL_ROWS
        return math.inf if self.path.endswith(_LISTS) else _SMALL


class Provenance(_Record):
    """When, with which versions and on which machine an artifact was made: for people, never part of a fingerprint."""

    started: str  # ISO 8601, UTC
    seconds: float
    python: str
    machine: str
    packages: dict[str, str]


class Manifest(_Record):
    """The sealed record of an artifact."""

    kind: str
    format: int
    fingerprint: str
    spec: Json
    inputs: dict[str, str]
    files: tuple[FileEntry, ...]
    summary: Json
    provenance: Provenance


class Summary(BaseModel):
    """A builder's report of an artifact: counts and figures. A job returns one, too."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)  # JSON has neither

    @classmethod
    def of_record(cls, record: Json, where: object) -> Self:
        """The summary in a record. Raises ArtifactError when it belongs to another kind or another version."""
        try:
            return cls.model_validate(record)
        except ValidationError as error:
            fault = error.errors()[0]
            key = ".".join(map(str, fault["loc"]))
            raise ArtifactError(
                f"{where} has a summary that this version of the program does not know ({key}: {fault['msg']}). Move it "
                "out of the workspace to have it rebuilt."
            ) from None

    @property
    def record(self) -> Json:
        """As plain JSON, without figures that were not measured."""
        return self.model_dump(mode="json", exclude_defaults=True)


def read_manifest(folder: Path) -> Manifest:
    """The record of an artifact's directory. Raises ArtifactError when it is missing or has changed since it was written."""
    try:
        record = read_sealed(folder / MANIFEST, _REBUILT)
    except (FileNotFoundError, NotADirectoryError):
        raise ArtifactError(f"{folder} is {'not finished' if folder.is_dir() else 'missing'}") from None
    try:
        return Manifest.model_validate(record)
    except ValidationError:
        raise ArtifactError(f"{folder / MANIFEST} is a sealed record, and not of an artifact") from None
