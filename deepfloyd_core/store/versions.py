"""Versions: the published bundles. Each is one sealed record, `<workspace>/versions/NNNN.json`, never rewritten.

It points at a bundle. When data or settings return to an earlier state, a new version points at the bundle of that
state. A damaged record stops only commands that ask for that version, and its number is never used again. What happened
to a version, and which one serves, is in `events.py`; `registry.py` writes both.
"""

import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from deepfloyd_core.config.stages import Stage
from deepfloyd_core.errors import ArtifactError, ConfigError
from deepfloyd_core.files import make_folder, read_sealed
from deepfloyd_core.store.artifacts import Artifact, damaged_parts, missing_parts
from deepfloyd_core.store.collected import collected
from deepfloyd_core.store.events import FOLDER, SERVING, Event, LostEvent, read_events, standing
from deepfloyd_core.store.leases import take_lease
from deepfloyd_core.store.lineage import Lineage, lineage_of
from deepfloyd_core.store.mirror import write_record
from deepfloyd_core.types import Json

_RECORD = re.compile(r"\d{4,}\.json")
_REPORTS = "reports"
_TOLD = 3  # versions, of those without a champion
_Fingerprint = Annotated[str, Field(pattern="^[0-9a-f]{16}$")]
_LOST = "Take it from a backup: no run writes it again"


@dataclass(frozen=True)
class Origin:
    """The run that made a bundle."""

    run_file: str = ""  # path of its run file; empty if it has none
    recipe: Json = field(default_factory=dict)  # its settings, see `bundle/recipe.py`; empty: not recorded
    start: str = (
        ""  # what its training started from, in words; empty: from the base model, because nobody asked for more
    )


@dataclass(frozen=True)
class Version:
    """One published bundle."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    number: int
    bundle: _Fingerprint
    image_index: _Fingerprint
    data: str  # fingerprint of the pictures and captions it was made from
    lineage: Lineage  # of the bundle, as far as its manifests could be read
    run_file: str = ""  # of the run that published it, from the workspace: the same when both are moved
    recipe: Json = field(default_factory=dict)  # of that run, see `Origin`
    start: str = ""  # see `Origin`

    @property
    def of(self) -> str:
        """`, of one.toml`: the run file's name, for several may share a workspace; empty where it is not known."""
        return f", of {Path(self.run_file).name}" if self.run_file else ""


_READ = TypeAdapter(Version)


def record_version(workspace: Path, bundle: Artifact, index: Artifact, origin: Origin) -> Version:
    """Give a bundle the next version number. The caller holds the lock of versions."""
    make_folder(workspace / FOLDER)
    known = [event.version for event in read_events(workspace) if isinstance(event, Event)]  # also of lost records
    number = max([*published_numbers(workspace), *known], default=0) + 1
    lineage = lineage_of(workspace, bundle.name)
    run_file = os.path.relpath(origin.run_file, workspace) if origin.run_file else ""
    version = Version(
        number,
        bundle.fingerprint,
        index.fingerprint,
        index.inputs["data"],
        lineage,
        run_file,
        origin.recipe,
        origin.start,
    )
    write_record(workspace, _record(workspace, number), asdict(version), once=True)
    return version


def versions(workspace: Path) -> list[Version]:
    """The published versions whose records are intact, oldest first."""
    return recorded_versions(workspace)[0]


def damaged_records(workspace: Path) -> list[str]:
    """A line for each record of a version or an event that exists and cannot be read, or an event's that is missing."""
    return recorded_versions(workspace)[1] + _lost_events(workspace)


def recorded_versions(workspace: Path) -> tuple[list[Version], list[str]]:
    """`versions`, and a line for each record that exists and cannot be read. Each is read once: a disk may fail in one
    reading and not in the next.
    """
    return _read_all(workspace, published_numbers(workspace))


def readable_versions(workspace: Path) -> tuple[list[Version], list[str]]:
    """The versions with intact records; and a line for each damaged record, or missing one below the highest number."""
    known, faults = _read_all(workspace, range(1, max(published_numbers(workspace), default=0) + 1))
    return known, faults + _lost_events(workspace)


def champion(workspace: Path) -> Version | None:
    """The version that serves, `latest`; None when there is none.

    Raises ArtifactError when its record is damaged, or when it is not known which version serves.
    """
    number = standing(workspace).champion
    return None if number is None else _read(workspace, number)


def find_version(workspace: Path, name: str) -> Version:
    """One of SERVING, or a number. Raises ConfigError naming those that exist, ArtifactError when its record is
    damaged.
    """
    published = published_numbers(workspace)
    if name in SERVING and published:
        try:
            if version := champion(workspace):
                return version
        except ArtifactError as error:
            whole = "".join(f" Or name another: --version {one.number}." for one in versions(workspace)[-1:])
            raise ArtifactError(f"{error}{whole}") from None
        raise ConfigError(
            f"No version of {workspace} serves ({_states(workspace, published[-_TOLD:])}). `deepfloyd promote {workspace} "
            "N` makes one serve; --version N uses one as it is."
        )
    if name.isdecimal() and int(name) in published:
        return _read(workspace, int(name))
    numbers = (
        ", ".join(map(str, published)) or "none yet; `deepfloyd run` publishes one, `--version base` draws without"
    )
    raise ConfigError(f"There is no version {name!r} in {workspace}; published: {numbers}.")


def trained_parts(version: Version) -> list[str]:
    """The trained LoRAs of a version, as far as its record names them."""
    parts = version.lineage.get(f"lora_bundle/{version.bundle}", ())
    return sorted(part for part in parts if part.partition("/")[0].endswith("_lora"))


def bundle_of(workspace: Path, version: Version, is_used: bool = True) -> Artifact:
    """The bundle of a version. Raises ArtifactError unless all its files exist and have their sizes and, if it is used, the
    small ones their bytes; OSError where a disk fails.
    """
    bundle = Artifact("lora_bundle", version.bundle, workspace / "lora_bundle" / version.bundle)
    take_lease(workspace, bundle.name)
    if record := collected(workspace, bundle.name):
        raise ArtifactError(
            f"Version {version.number} cannot be used: its bundle was collected on {record.day} by `deepfloyd gc`. "
            "`deepfloyd run` rebuilds it from the settings and pictures of that version."
        )
    if fault := next((damaged_parts if is_used else missing_parts)(bundle), None):
        raise ArtifactError(
            f"Version {version.number} cannot be used: {fault.removesuffix('.')}. `deepfloyd run` rebuilds its bundle "
            "from the settings and pictures of that version."
        )
    return bundle


def published_at(workspace: Path, number: int) -> float:
    """When a version was published: Unix time, s."""
    return _record(workspace, number).stat().st_mtime


def report_file(workspace: Path, number: int) -> Path:
    """The place of a version's report."""
    return workspace / FOLDER / _REPORTS / f"{number:04d}.html"


def report_sizes(workspace: Path) -> dict[int, int]:
    """The bytes of each report that is there, by its version."""
    files = (workspace / FOLDER / _REPORTS).glob("*.html")
    return {int(file.stem): file.stat().st_size for file in files if file.stem.isdecimal()}


def index_of(workspace: Path, version: Version) -> Artifact:
    """The image index that a version was made from; `gc` may have removed it."""
    return Artifact("image_index", version.image_index, workspace / "image_index" / version.image_index)


def part_of(workspace: Path, version: Version, kind: str) -> Artifact | None:
    """The artifact of a kind that a version was made from, by the lineage in its record."""
    names = {*version.lineage, *(name for names in version.lineage.values() for name in names)}
    found = sorted(name for name in names if name.startswith(f"{kind}/"))
    return Artifact(kind, found[0].partition("/")[2], workspace / found[0]) if found else None


def stage_folder(bundle: Path, stage: Stage) -> Path:
    """The folder of a bundle with a stage's trained weights and its scheduler."""
    return bundle / f"stage{stage}"


def _record(workspace: Path, number: int) -> Path:
    return workspace / FOLDER / f"{number:04d}.json"


def published_numbers(workspace: Path) -> list[int]:
    """The numbers of all versions, in their order, also of those whose records are damaged."""
    files = (workspace / FOLDER).glob("*.json")
    return sorted(int(file.stem) for file in files if _RECORD.fullmatch(file.name))


def _lost_events(workspace: Path) -> list[str]:
    return [f"{event.fault}. It told what happened to a version" for event in read_events(workspace)
            if isinstance(event, LostEvent)]  # fmt: skip


def _states(workspace: Path, numbers: Iterable[int]) -> str:
    """Each version with its state."""
    found = standing(workspace)
    return ", ".join(f"version {number}: {found.state_of(number)}" for number in numbers)


def _read_all(workspace: Path, numbers: Iterable[int]) -> tuple[list[Version], list[str]]:
    """Versions whose records are intact, and a line for each other number."""
    good, faults = [], []
    for number in numbers:
        try:
            good.append(_read(workspace, number))
        except ArtifactError as error:
            faults.append(str(error))
        except OSError as error:
            faults.append(_unreadable(_record(workspace, number), number, error))
    return good, faults


def _unreadable(file: Path, number: int, error: OSError) -> str:
    return f"{file}, the record of version {number}, cannot be read: {error.strerror}. {_LOST}."


def _read(workspace: Path, number: int) -> Version:
    """The record of a version. Raises ArtifactError when it is damaged or missing, OSError where a disk fails."""
    file = _record(workspace, number)
    try:
        version = _READ.validate_python(read_sealed(file, _LOST))
    except ValidationError:
        raise ArtifactError(f"{file} is a sealed record, and not of a version. {_LOST}.") from None
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ArtifactError(_unreadable(file, number, error)) from None
    if version.number != number:
        raise ArtifactError(f"{file} is the record of version {version.number}. {_LOST}.")
    return version
