"""What it takes to make a version again: settings and data sets from its record, its pictures by their sha256.

`deepfloyd reproduce` puts the recorded pictures of each folder, without those that came later, into a scratch folder (by
links, so they take no space), and runs the recorded settings there in a workspace of its own. The held-out pictures are
chosen as they were, because their record is copied. A version's record has no secrets: buckets take theirs from the
environment.
"""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from deepfloyd_core.config.run import Run
from deepfloyd_core.crops import eval_record
from deepfloyd_core.errors import ArtifactError, ConfigError, DataError
from deepfloyd_core.files import sha256_file, write_bytes
from deepfloyd_core.index.ledger import INDEX_FILE
from deepfloyd_core.store.counts import many
from deepfloyd_core.store.provenance import package_versions
from deepfloyd_core.store.versions import Version, bundle_of, find_version
from deepfloyd_core.types import Json

_PLACES = {"workspace", "data_backend_config"}  # of the scratch folder instead
_SECRETS = {"aws_access_key_id", "aws_secret_access_key"}
_RESOLVED = {"text_embeds"}  # the filters of its entry are among the data set's own
_NAMED = 5  # of the pictures that are gone


@dataclass(frozen=True)
class Reproduction:
    """A version that can be made again."""

    version: Version
    bundle: Path  # as it was published
    pictures: int  # that are there as they were
    notes: tuple[str, ...]  # what is not as it was, and may change bytes


def recipe_of(run: Run) -> Json:
    """The settings and data sets of a run, as plain JSON."""
    config = run.config.model_dump(mode="json", exclude=_PLACES, exclude_none=True)
    sets = [each.model_dump(mode="json", exclude=_SECRETS | _RESOLVED, exclude_none=True)
            for each in (*run.datasets, *run.conditioning)]  # fmt: skip
    return {"run": config, "data": sets}


def check_reproduction(workspace: Path, number: int) -> Reproduction:
    """Check that a version can be made again: its bundle, its record, its pictures by their sha256. Reads all of them.

    Raises ArtifactError, ConfigError or DataError that says what is missing.
    """
    version = find_version(workspace, str(number))
    bundle = bundle_of(workspace, version)
    if not version.recipe:
        raise ConfigError(f"The record of version {number} has no settings, so it cannot be made again.")
    settings = version.recipe["run"]
    if any(str(settings.get(f"stage{stage}", {}).get("init_lora", "")).isdecimal() for stage in (1, 2)):
        raise ConfigError(
            f"Version {number} starts from the weights of another version. That cannot be made again yet."
        )
    gone, there = [], 0
    for folder, name, sha256 in _recorded_files(workspace, version):
        file = folder / name
        if file.is_file() and sha256 in (None, sha256_file(file)):
            there += 1
        else:
            gone.append(str(file))
    if gone:
        shown = ", ".join(gone[:_NAMED]) + (f" and {len(gone) - _NAMED} more" if len(gone) > _NAMED else "")
        are = many(len(gone), "file of its data is", "files of its data are")
        raise DataError(f"Version {number} cannot be made again: {are} gone or changed: {shown}.")
    return Reproduction(version, bundle.path, there, tuple(_package_notes(bundle.manifest.provenance.packages)))


def write_scratch(workspace: Path, version: Version, scratch: Path) -> Path:
    """Put the run file, the data file, the pictures and the record of held-out pictures into a folder. Returns the run
    file. Raises ConfigError when the folder is not empty.
    """
    if scratch.exists() and any(scratch.iterdir()):
        raise ConfigError(f"{scratch} is not empty. Remove it, or name another folder with --scratch.")
    for folder, name, _ in _recorded_files(workspace, version):
        target = _scratch_folder(scratch, folder) / name
        for file, link in ((folder / name, target), (_caption_file(folder / name), _caption_file(target))):
            if file.is_file() and not link.exists():
                link.parent.mkdir(parents=True, exist_ok=True)
                _link(file, link)
    sets = [{**each, "instance_data_dir": str(_scratch_folder(scratch, Path(each["instance_data_dir"])).absolute())}
            if each["type"] == "local" and each.get("dataset_type") == "image" else each
            for each in version.recipe["data"]]  # fmt: skip
    made = scratch / "workspace"
    made.mkdir(parents=True)
    if (workspace / eval_record.FOLDER).is_dir():
        shutil.copytree(workspace / eval_record.FOLDER, made / eval_record.FOLDER)
    write_bytes(scratch / "data.json", json.dumps(sets, indent=2).encode())
    places = {"workspace": str(made.absolute()), "data_backend_config": str((scratch / "data.json").absolute())}
    settings = {**version.recipe["run"], **places, "gate": "off", "report_to": "none"}
    write_bytes(scratch / "run.json", json.dumps(settings, indent=2).encode())
    return scratch / "run.json"


def different_files(first: Path, second: Path) -> list[str]:
    """The files of two bundles that differ, each with how; every byte is compared."""
    names = {
        str(file.relative_to(folder)) for folder in (first, second) for file in folder.rglob("*") if file.is_file()
    }
    lines = []
    for name in sorted(names - {"manifest.json"}):  # which has times
        files = first / name, second / name
        if not all(file.is_file() for file in files):
            lines.append(f"{name} is only in {files[0].parent if files[0].is_file() else files[1].parent}")
        elif sha256_file(files[0]) != sha256_file(files[1]):
            lines.append(f"{name} has other bytes")
    return lines


def _recorded_files(workspace: Path, version: Version) -> Iterator[tuple[Path, str, str | None]]:
    """The files of local folders that a version's index lists: folder, name in it, sha256 (None: not known)."""
    ledger = workspace / "image_index" / version.image_index / INDEX_FILE
    try:
        rows = pq.read_table(ledger, columns=["dataset_id", "source", "image_id"]).to_pylist()
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"{ledger}, the list of version {version.number}'s pictures, cannot be read: {error}"
        ) from None
    folders = {
        each["id"]: Path(each["instance_data_dir"]) for each in version.recipe["data"] if each["type"] == "local"
    }
    for row in rows:
        if folder := folders.get(row["dataset_id"]):
            yield folder, row["source"], row["image_id"]


def _scratch_folder(scratch: Path, folder: Path) -> Path:
    return scratch / "pictures" / folder.absolute().relative_to(folder.absolute().anchor)


def _caption_file(picture: Path) -> Path:
    return picture.with_suffix(".txt")


def _link(file: Path, link: Path) -> None:
    """A second name for a file; where there can be none, a copy."""
    try:
        os.link(file, link)
    except OSError:
        shutil.copy2(file, link)


def _package_notes(packages: dict[str, str]) -> Iterator[str]:
    for name, here in package_versions().items():
        if (then := packages.get(name, "none")) != here:
            yield f"{name} was {then} and is {here} here: bytes may differ"
