"""What it takes to make a version again: settings and data sets from its record, its pictures by their sha256.

`deepfloyd reproduce` puts the recorded pictures of each folder, without those that came later, into a scratch folder (by
links, so they take no space), and runs the recorded settings there in a workspace of its own. The held-out pictures are
chosen as they were, because their record is copied, and so are the weights that a warm training started from. A
version's record has no secrets: buckets take theirs from the environment. What is not in a folder, and captions, are read
again where they are: after the index, and before anything is trained, the data is compared with the version's.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from deepfloyd_core.adapters.lora_file import weights_file
from deepfloyd_core.adapters.start_from import named_weights
from deepfloyd_core.bundle.planned import Starts
from deepfloyd_core.config.run import Run
from deepfloyd_core.config.stages import STAGES, Stage
from deepfloyd_core.crops.eval_record import copy_closed
from deepfloyd_core.errors import ArtifactError, ConfigError, DataError
from deepfloyd_core.files import read_sealed, sha256_file, write_bytes, write_sealed
from deepfloyd_core.index.changed_pictures import picture_changes
from deepfloyd_core.index.ledger import INDEX_FILE
from deepfloyd_core.store.artifacts import Artifact, verify_artifact
from deepfloyd_core.store.collected import collected
from deepfloyd_core.store.counts import many
from deepfloyd_core.store.lineage import inputs_of
from deepfloyd_core.store.manifest import MANIFEST
from deepfloyd_core.store.provenance import package_versions
from deepfloyd_core.store.versions import Version, bundle_of, find_version, index_of, part_of
from deepfloyd_core.training.jobs import TrainingSummary
from deepfloyd_core.training.start import StartSummary, start_kind
from deepfloyd_core.types import Json

_PLACES = {"workspace", "data_backend_config"}  # of the scratch folder instead
_SECRETS = {"aws_access_key_id", "aws_secret_access_key"}
_RESOLVED = {"text_embeds"}  # the filters of its entry are among the data set's own
_EXPECTED = "version.json"  # in a scratch folder: what its data must be
_WHERE = "instance_data_dir", "csv_file", "dataset_name", "aws_bucket_name"  # of a data set's entry
_NAMED = 5  # of the pictures that are gone


@dataclass(frozen=True)
class Reproduction:
    """A version that can be made again."""

    version: Version
    bundle: Path  # as it was published
    pictures: int  # that are there as they were
    notes: tuple[str, ...]  # what is not as it was, and may change bytes


def recipe_of(run: Run, bundle: Artifact | None = None) -> Json:
    """The settings and data sets of a run, as plain JSON. bundle: with the micro-batches and processes of its trainings,
    which the machine may have decided, and which decide the rounding of sums.
    """
    config = run.config.model_dump(mode="json", exclude=_PLACES, exclude_none=True)
    ranks = set[int]()
    for table, training in _trainings(run.workspace, bundle):
        config[table].pop("micro_batch_size", None)
        if training.micro_batches:
            config[table]["micro_batch_size"] = training.micro_batches[max(training.micro_batches)]
        ranks.add(training.ranks[max(training.ranks)] if training.ranks else 1)
    if len(ranks) == 1:  # also where `auto` chose it
        (config["num_processes"],) = ranks
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
    _check_starts(workspace, version)
    _given_weights(workspace, version)
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
    notes = [
        *_elsewhere_notes(version),
        *_cut_notes(workspace, bundle),
        *_package_notes(bundle.manifest.provenance.packages),
    ]
    return Reproduction(version, bundle.path, there, tuple(notes))


def write_scratch(workspace: Path, version: Version, scratch: Path) -> Path:
    """Put the run file, the data file, the pictures, the record of held-out pictures and the weights to start from into a
    folder. Returns the run file. Raises ConfigError when the folder is not empty.
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
    copy_closed(workspace, made)
    for start in _starts(workspace, version).values():
        shutil.copytree(start.path, made / start.name, copy_function=_link)
    ledger = index_of(workspace, version).path / INDEX_FILE
    expected = {"number": version.number, "data": version.data, "ledger": str(ledger.absolute())}
    write_sealed(scratch / _EXPECTED, expected)
    write_bytes(scratch / "data.json", json.dumps(sets, indent=2).encode())
    places = {"workspace": str(made.absolute()), "data_backend_config": str((scratch / "data.json").absolute())}
    settings = {**version.recipe["run"], **places, "gate": "off", "report_to": "none"}
    for stage, file in _given_weights(workspace, version).items():
        settings[STAGES[stage].table] = {**settings[STAGES[stage].table], "init_lora": str(file.absolute())}
    write_bytes(scratch / "run.json", json.dumps(settings, indent=2).encode())
    return scratch / "run.json"


def check_scratch(scratch: Path, index: Artifact) -> None:
    """Raise DataError when the pictures and captions that a scratch folder's run found are not those of its version."""
    expected = read_sealed(scratch / _EXPECTED, "Name another folder with --scratch")
    if index.inputs["data"] == expected["data"]:
        return
    try:
        lines = picture_changes(Path(expected["ledger"]), index.path / INDEX_FILE)
    except (OSError, ValueError):  # pyarrow's errors are both
        lines = []
    raise DataError(
        f"Version {expected['number']} cannot be made again: its pictures or captions are not as they were. "
        + "; ".join(lines or ["What differs is not in the lists of pictures"]) + "."
    )  # fmt: skip


def scratch_starts(run: Run) -> Starts:
    """What the trainings of a scratch folder's run start from."""
    found = {stage: sorted((run.workspace / start_kind(stage)).glob(f"*/{MANIFEST}")) for stage in run.config.stages}
    return {stage: Artifact(start_kind(stage), files[0].parent.name, files[0].parent)
            for stage, files in found.items() if files}  # fmt: skip


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


def _starts(workspace: Path, version: Version) -> dict[Stage, Artifact]:
    """What the warm trainings of a version started from."""
    names = {name for inputs in version.lineage.values() for name in inputs}
    kinds = {start_kind(stage): stage for stage in STAGES}
    parts = [name.split("/") for name in sorted(names)]
    return {kinds[kind]: Artifact(kind, digits, workspace / kind / digits) for kind, digits in parts if kind in kinds}


def _check_starts(workspace: Path, version: Version) -> None:
    """Raise ArtifactError when weights that a warm training started from are gone or damaged."""
    for stage, start in _starts(workspace, version).items():
        needed = (
            f"Version {version.number} cannot be made again: the weights that its {STAGES[stage].title} starts from"
        )
        if record := collected(workspace, start.name):
            of = StartSummary.of_record(record.manifest.summary, start.path).version
            raise ArtifactError(f"{needed}, those of version {of}, were collected on {record.day} by `deepfloyd gc`.")
        if damage := verify_artifact(start):
            raise ArtifactError(f"{needed} are lost or damaged: {damage[0]}.")


def _given_weights(workspace: Path, version: Version) -> dict[Stage, Path]:
    """The files that `init_lora` names. Raises ConfigError, ArtifactError or DataError for one that is not as it was."""
    found = {}
    for stage, kind in STAGES.items():
        value = str(version.recipe["run"].get(kind.table, {}).get("init_lora", ""))
        if not value:
            continue
        prefix = f"Version {version.number} cannot be made again: its {kind.table}.init_lora is {value!r}"
        file = weights_file(named_weights(workspace, stage, value), prefix)
        lora = part_of(workspace, version, f"{kind.table}_lora")
        if lora is not None and lora.inputs.get("parent") != sha256_file(file):
            raise DataError(f"{prefix}, and {file} has other bytes than it had.")
        found[stage] = file
    return found


def _trainings(workspace: Path, bundle: Artifact | None) -> Iterator[tuple[str, TrainingSummary]]:
    """What the trainings of a bundle reported, each with the table of its stage; without those that are gone."""
    names = (bundle and inputs_of(bundle)) or ()
    kinds = {f"{kind.table}_lora": kind.table for kind in STAGES.values()}
    for kind, _, digits in (name.partition("/") for name in names):
        if kind in kinds:
            with suppress(ArtifactError):
                yield kinds[kind], Artifact(kind, digits, workspace / kind / digits).summary(TrainingSummary)


def _cut_notes(workspace: Path, bundle: Artifact) -> Iterator[str]:
    for table, training in _trainings(workspace, bundle):
        if training.mixed_sums:
            yield f"{table}: its batches were computed {training.mixed_sums}. All will be as the last: bytes may differ"


def _elsewhere_notes(version: Version) -> Iterator[str]:
    for each in version.recipe["data"]:
        if each["type"] != "local" or each.get("dataset_type", "image") != "image":
            place = next(filter(None, map(each.get, _WHERE)), each["type"])
            yield (
                f"{each['id']}: its files are read again from {place}, as they are now. If any is not as it was, the run "
                "ends before it trains"
            )


def _recorded_files(workspace: Path, version: Version) -> Iterator[tuple[Path, str, str | None]]:
    """The files of local folders that a version's index lists: folder, name in it, sha256 (None: not known)."""
    ledger = index_of(workspace, version).path / INDEX_FILE
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


def _link(file: str | Path, link: str | Path) -> None:
    """A second name for a file; where there can be none, a copy."""
    try:
        os.link(file, link)
    except OSError:
        shutil.copy2(file, link)


def _package_notes(packages: dict[str, str]) -> Iterator[str]:
    for name, here in package_versions().items():
        if (then := packages.get(name, "none")) != here:
            yield f"{name} was {then} and is {here} here: bytes may differ"
