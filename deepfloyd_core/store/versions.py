"""Versions: the published bundles, in order; the last one is current.

A version is one sealed record, `<workspace>/versions/NNNN.json`, written once under a lock and never rewritten. It
points at a bundle. When data or settings return to an earlier state, the new version points at the bundle of that
state. A damaged record stops only commands that ask for that version, and its number is never used again.
"""

import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from deepfloyd_core.config.stages import Stage
from deepfloyd_core.errors import ArtifactError, ConfigError
from deepfloyd_core.files import read_sealed, write_sealed
from deepfloyd_core.store.artifacts import Artifact, missing_parts
from deepfloyd_core.store.lineage import Lineage, lineage_of
from deepfloyd_core.store.locks import locked

FOLDER = "versions"
_RECORD = re.compile(r"\d{4,}\.json")
_LOST = "Take it from a backup: no run writes it again"


@dataclass(frozen=True)
class Version:
    """One published bundle."""

    number: int
    bundle: str
    image_index: str
    data: str  # fingerprint of the pictures and captions it was made from
    lineage: Lineage  # of the bundle, as far as its manifests could be read
    run_file: str = ""  # of the run that published it, from the workspace: the same when both are moved

    @property
    def of(self) -> str:
        """`, of one.toml`: the run file's name, for several may share a workspace; empty where it is not known."""
        return f", of {Path(self.run_file).name}" if self.run_file else ""


def publish(workspace: Path, bundle: Artifact, index: Artifact, run_file: str = "") -> tuple[Version, bool]:
    """Give a bundle the next version number, unless it is the current one. Returns its version and whether it is new.

    run_file: the path of the run's file; empty if it has none.
    """
    with locked(workspace, FOLDER):
        latest = current(workspace)
        if latest and latest.bundle == bundle.fingerprint:
            return latest, False
        (workspace / FOLDER).mkdir(exist_ok=True)
        number = max(_numbers(workspace), default=0) + 1
        lineage = lineage_of(workspace, bundle.name)
        run_file = os.path.relpath(run_file, workspace) if run_file else ""
        version = Version(number, bundle.fingerprint, index.fingerprint, index.inputs["data"], lineage, run_file)
        write_sealed(_record(workspace, number), asdict(version))
        return version, True


def versions(workspace: Path) -> list[Version]:
    """The published versions whose records are intact, oldest first."""
    return _read_all(workspace, _numbers(workspace))[0]


def damaged_records(workspace: Path) -> list[str]:
    """A line for each version record that exists and cannot be read."""
    return _read_all(workspace, _numbers(workspace))[1]


def readable_versions(workspace: Path) -> tuple[list[Version], list[str]]:
    """The versions with intact records; and a line for each damaged record, or missing one below the highest number."""
    return _read_all(workspace, range(1, max(_numbers(workspace), default=0) + 1))


def current(workspace: Path) -> Version | None:
    """The version `latest`; None before the first one, and when the last record is damaged."""
    known, numbers = versions(workspace), _numbers(workspace)
    return known[-1] if known and known[-1].number == numbers[-1] else None


def find_version(workspace: Path, name: str) -> Version:
    """`latest` or a number. Raises ConfigError naming those that exist, ArtifactError when its record is damaged."""
    published = _numbers(workspace)
    if name == "latest" and published:
        try:
            return _read(workspace, published[-1])
        except ArtifactError as error:
            whole = "".join(f" Or name another: --version {one.number}." for one in versions(workspace)[-1:])
            raise ArtifactError(f"{error}{whole}") from None
    if name.isdecimal() and int(name) in published:
        return _read(workspace, int(name))
    numbers = ", ".join(map(str, published)) or "none yet; `deepfloyd run` publishes the first"
    raise ConfigError(
        f"There is no version {name!r} in {workspace}; published: {numbers}. `base` samples without a LoRA."
    )


def news_of(workspace: Path, version: Version, before: Version | None) -> str:
    """The outcome of a run, for people. before: the version that was current when it began."""
    if before and version == before:
        return f"version {version.number}, unchanged"
    first = next(one for one in versions(workspace) if one.bundle == version.bundle)
    again = f": the bundle of version {first.number} again" if first.number < version.number else ""
    if before and not again and (trained := _trained(version)) and trained == _trained(before):
        again = f": the same weights as version {before.number}"  # the ledger, the samples or the prompts are others
    other = ""
    if before and before.run_file and version.run_file and before.run_file != version.run_file:
        other = (
            f"{version.of}. Version {before.number}{before.of}, is no longer `latest`: use --version {before.number}, "
            "or give each run file a workspace"
        )
    return f"published version {version.number}{again}{other}"


def _trained(version: Version) -> list[str]:
    """The trained LoRAs of a version, as far as its record names them."""
    parts = version.lineage.get(f"lora_bundle/{version.bundle}", ())
    return sorted(part for part in parts if part.partition("/")[0].endswith("_lora"))


def bundle_of(workspace: Path, version: Version) -> Artifact:
    """The bundle of a version. Raises ArtifactError unless all its files exist and have their sizes."""
    bundle = Artifact("lora_bundle", version.bundle, workspace / "lora_bundle" / version.bundle)
    if fault := next(missing_parts(bundle), None):
        raise ArtifactError(
            f"Version {version.number} cannot be used: {fault.removesuffix('.')}. `deepfloyd run` rebuilds its bundle "
            "from the settings and pictures of that version."
        )
    return bundle


def stage_folder(bundle: Path, stage: Stage) -> Path:
    """The folder of a bundle with a stage's trained weights and its scheduler."""
    return bundle / f"stage{stage}"


def _record(workspace: Path, number: int) -> Path:
    return workspace / FOLDER / f"{number:04d}.json"


def _numbers(workspace: Path) -> list[int]:
    files = (workspace / FOLDER).glob("*.json")
    return sorted(int(file.stem) for file in files if _RECORD.fullmatch(file.name))


def _read_all(workspace: Path, numbers: Iterable[int]) -> tuple[list[Version], list[str]]:
    """Versions whose records are intact, and a line for each other number."""
    good, faults = [], []
    for number in numbers:
        try:
            good.append(_read(workspace, number))
        except ArtifactError as error:
            faults.append(str(error))
    return good, faults


def _read(workspace: Path, number: int) -> Version:
    file = _record(workspace, number)
    try:
        version = Version(**read_sealed(file, _LOST))
    except TypeError:
        raise ArtifactError(f"{file} is a sealed record, and not of a version. {_LOST}.") from None
    except OSError as error:
        raise ArtifactError(
            f"{file}, the record of version {number}, cannot be read: {error.strerror}. {_LOST}."
        ) from None
    if version.number != number:
        raise ArtifactError(f"{file} is the record of version {version.number}. {_LOST}.")
    return version
