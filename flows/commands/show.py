"""Prints what a version or an artifact is: what it was made from, its settings, its figures, its files."""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from deepfloyd_core.bundle.identity import BundleSummary
from deepfloyd_core.errors import ArtifactError
from deepfloyd_core.store.artifacts import Artifact, Request, missing_parts
from deepfloyd_core.store.changes import label
from deepfloyd_core.store.counts import duration, many, ranges, size
from deepfloyd_core.store.events import standing
from deepfloyd_core.store.file_faults import storage_error
from deepfloyd_core.store.lineage import all_below, artifact_names
from deepfloyd_core.store.lookup import Known, known_artifact
from deepfloyd_core.store.manifest import Manifest
from deepfloyd_core.store.retention import BUNDLE
from deepfloyd_core.store.settings import changed_settings
from deepfloyd_core.store.versions import Version, published_at, versions
from flows.commands.report import print_figures
from flows.commands.workspace_report import minute, table_of
from tasks.terminal import labelled, print_table

SHOWN_FILES = 30  # the first ones
_DIGITS = 4  # of a figure
# Inputs that are no artifacts, or a part of one.
_OTHERS = {
    "data": "pictures and captions", "encoder": "text encoder", "eval_set": "held-out crops", "losses": "held-out losses",
    "model": "base model", "parent": "weights of init_lora", "pictures": "accepted pictures", "text": "encoded captions",
    "unet": "base model's text modules", "weights": "trained weights",
}  # fmt: skip


def print_version_record(out: Console, workspace: Path, version: Version) -> None:
    """Print a version: when and from what it was made, the settings of all that, its figures, its bundle."""
    bundle = f"{BUNDLE}/{version.bundle}"
    out.print(f"version {version.number}, {standing(workspace).state_of(version.number)}")
    parts = list(_parts(workspace, version, bundle))
    published = f"{minute(published_at(workspace, version.number))} UTC"
    run_file = (workspace / version.run_file).resolve() if version.run_file else "not known"
    started = {"trained": version.start} if version.start else {}
    _print_lines(out, {"published": published, "run file": run_file, "data": version.data, **started})
    _print_made_from(out, workspace, [name for name, _ in parts if name != bundle], {})
    settings: dict[str, tuple[str, str]] = {}
    for _, part in parts:
        if part:
            settings |= changed_settings(part.record.kind, part.record.spec)
    _print_settings(out, settings)
    known = dict(parts)[bundle]
    if known is None:
        out.print(f"{(workspace / bundle).absolute()} is lost or damaged: `deepfloyd verify {workspace}` tells more.")
        return
    _print_figures(out, known.record)
    _print_place(out, known)


def print_artifact(out: Console, workspace: Path, known: Known) -> None:
    """Print an artifact, finished, unfinished or collected."""
    record = known.record
    out.print(f"{label(record.kind)} {record.fingerprint}{_of_versions(workspace, known.name)}")
    if isinstance(record, Manifest):
        made = record.provenance
        packages = ", ".join(f"{name} {number}" for name, number in made.packages.items())
        when = f"{made.started[:16].replace('T', ' ')} UTC, in {duration(made.seconds)}"
        _print_lines(out, {"made": when, "with": f"Python {made.python} on {made.machine}, {packages}"})
    else:
        out.print("unfinished: a run with the same settings and pictures continues it")
    names = artifact_names(record.inputs)
    _print_made_from(out, workspace, names, {key: value for key, value in record.inputs.items() if value not in names})
    _print_settings(out, changed_settings(record.kind, record.spec))
    _print_figures(out, record)
    _print_place(out, known)


def version_json(version: Version) -> str:
    """The record of a version."""
    return json.dumps(asdict(version))


def artifact_json(known: Known) -> str:
    """The record of an artifact."""
    record = known.record
    return record.model_dump_json() if isinstance(record, Manifest) else json.dumps(record.record)


def _parts(workspace: Path, version: Version, bundle: str) -> Iterator[tuple[str, Known | None]]:
    """Everything that a version was made from, and its bundle, in the order in which it was made; None: lost or damaged."""
    names = all_below(bundle, version.lineage) | {f"image_index/{version.image_index}"}
    known: dict[str, Known | None] = dict.fromkeys(sorted(names))
    for name in known:
        with suppress(ArtifactError):
            known[name] = known_artifact(workspace, name)
    yield from sorted(known.items(), key=lambda pair: _began(pair[1]))


def _began(known: Known | None) -> str:
    return known.record.provenance.started if known and isinstance(known.record, Manifest) else ""


def _of_versions(workspace: Path, name: str) -> str:
    """The versions that an artifact belongs to, in words."""
    numbers = [one.number for one in versions(workspace) if name in all_below(f"{BUNDLE}/{one.bundle}", one.lineage)]
    return f", of version{'s' if len(numbers) > 1 else ''} {ranges(numbers)}" if numbers else ", of no version"


def _print_made_from(out: Console, workspace: Path, names: Iterable[str], others: Mapping[str, str]) -> None:
    """A row for each input: artifacts, and fingerprints of what comes from elsewhere or is a part of an artifact."""
    table = table_of("made from", "fingerprint", "")
    for name in names:
        kind, fingerprint = name.split("/")
        table.add_row(label(kind), fingerprint, _state(workspace, name))
    for name, fingerprint in sorted(others.items()):
        table.add_row(_OTHERS.get(name) or label(name), fingerprint, "")
    if table.row_count:
        print_table(out, table)


def _state(workspace: Path, name: str) -> str:
    """What became of an artifact; empty if it exists."""
    try:
        known = known_artifact(workspace, name)
    except ArtifactError:
        return "lost or damaged"
    if known.collected:
        return f"collected {known.collected.day}"
    return "unfinished" if isinstance(known.record, Request) else ""


def _print_settings(out: Console, settings: Mapping[str, tuple[str, str]]) -> None:
    if not settings:
        return
    table = table_of("setting", "value", "default")
    for name, (value, default) in settings.items():
        table.add_row(name, value, default)
    print_table(out, table)


def _print_figures(out: Console, record: Manifest | Request) -> None:
    """The figures of a bundle as at the end of a run; of another artifact the single numbers of its summary."""
    if not isinstance(record, Manifest):
        return
    if record.kind == BUNDLE:
        with suppress(ArtifactError):  # a summary of another version of the program
            print_figures(out, BundleSummary.of_record(record.summary, f"{record.kind} {record.fingerprint}"))
            return
    plain = {key: value for key, value in record.summary.items() if isinstance(value, int | float | str)}
    _print_lines(out, {key.replace("_", " "): _figure(value) for key, value in plain.items()})


def _figure(value: float | str) -> str:
    if isinstance(value, float):
        return f"{value:.{_DIGITS}g}"
    return f"{value:,}" if isinstance(value, int) else value


def _print_place(out: Console, known: Known) -> None:
    """Where an artifact is, and its files."""
    out.print()
    if known.collected:
        out.print(f"Its files were collected on {known.collected.day} by `deepfloyd gc`.")
        return
    out.print(str(known.path.absolute()))
    if not isinstance(known.record, Manifest):
        return
    kind, fingerprint = known.name.split("/")
    try:
        for fault in missing_parts(Artifact(kind, fingerprint, known.path)):
            out.print(labelled("damaged", "bold red", fault))
    except OSError as error:
        out.print(labelled("damaged", "bold red", str(storage_error(error, "read"))))
    files = known.record.files
    table = table_of("file", ">bytes")
    for file in files[:SHOWN_FILES]:
        table.add_row(file.path, size(file.bytes))
    if len(files) > SHOWN_FILES:
        table.add_row(
            f"and {many(len(files) - SHOWN_FILES, 'other')}", size(sum(file.bytes for file in files[SHOWN_FILES:]))
        )
    table.add_row(f"{many(len(files), 'file')} together", size(sum(file.bytes for file in files)))
    print_table(out, table)


def _print_lines(out: Console, lines: Mapping[str, object]) -> None:
    """A line for each name and value."""
    for name, value in lines.items():
        out.print(f"{name:<22} {value}")
