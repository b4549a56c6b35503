"""Prints what lies in a workspace, and what `gc` removes from it."""

import time
from datetime import UTC, datetime
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from deepfloyd_core.store.artifacts import Artifact, missing_parts
from deepfloyd_core.store.changes import label
from deepfloyd_core.store.collected import Collected, collected
from deepfloyd_core.store.counts import many, size
from deepfloyd_core.store.events import standing
from deepfloyd_core.store.file_faults import storage_error
from deepfloyd_core.store.gc import Collection
from deepfloyd_core.store.gc_tables import notes, outcome_words, policy_words, rows_going, rows_staying, why
from deepfloyd_core.store.inventory import Inventory, Stored, bytes_on_disk, take_inventory
from deepfloyd_core.store.leases import running_leases
from deepfloyd_core.store.versions import Version, published_at, readable_versions
from tasks.terminal import labelled, print_table

SHOWN_VERSIONS = 10  # the last ones, unless all are asked for


def print_workspace(out: Console, workspace: Path, every: bool) -> None:
    """Print the versions, the number and size of the artifacts of each kind, unfinished work, and what is wrong.

    every: each version and each artifact.
    """
    inventory = take_inventory(workspace)
    known, faults = readable_versions(workspace)
    sizes = {artifact.name: artifact.bytes for artifact in inventory.artifacts}
    shown = known if every else known[-SHOWN_VERSIONS:]
    if shown:
        table, lost = _versions(workspace, shown, sizes)
        print_table(out, table)
        faults += lost
    if len(shown) < len(known):
        out.print(f"and {many(len(known) - len(shown), 'older version')}; --all lists them")
    print_table(out, _every(inventory) if every else _kinds(inventory))
    if unfinished := [artifact for artifact in inventory.artifacts if not artifact.finished]:
        print_table(out, _unfinished(unfinished))
    for holder in sorted(set(running_leases(workspace).values())):
        out.print(f"used by a run: {holder}")
    for path, fault in inventory.damaged:
        out.print(labelled("damaged", "bold red", f"{path}: {fault}"))
    for fault in faults:
        out.print(labelled("fault", "bold red", fault))
    for path in inventory.foreign:
        out.print(labelled("note", "yellow", f"{path} is not of this program"))
    if left := inventory.leftovers:
        freed = bytes_on_disk(file for leftover in left for file in leftover.files)
        out.print(f"{many(len(left), 'leftover')} of an interrupted gc, {size(freed)}: the next gc removes it")


def print_collection(out: Console, collection: Collection, deleted: bool, every: bool) -> None:
    """Print what `gc` removed, or would remove. every: each artifact."""
    out.print(policy_words(collection.policy))
    if rows := rows_going(collection):
        table = table_of("removed" if deleted else "would go", ">number", ">frees", "why")
        for row in rows:
            table.add_row(row.what, f"{row.count:,}", size(row.bytes), row.why)
        print_table(out, table)
    if every and collection.plan.goes:
        table = table_of("removed" if deleted else "would go", "fingerprint", "changed, UTC", ">frees", "why")
        for going in collection.plan.goes:
            kind, fingerprint = going.artifact.name.split("/")
            table.add_row(label(kind), fingerprint, minute(going.artifact.changed), size(going.frees), why([going]))
        print_table(out, table)
    table = table_of("stays", ">number", ">bytes")
    for row in rows_staying(collection):
        table.add_row(row.why, f"{row.count:,}", size(row.bytes))
    print_table(out, table)
    for line in notes(collection):
        out.print(labelled("note", "yellow", line))
    for line in outcome_words(collection, deleted):
        out.print(line)
    if not deleted and not collection.plan.is_empty:
        out.print("Nothing was removed; --delete removes it.")


def _versions(workspace: Path, shown: list[Version], sizes: dict[str, int]) -> tuple[Table, list[str]]:
    """A row for each version, and a line for each that cannot be used although its bundle was not collected."""
    table = table_of("version", "published, UTC", "run file", "bundle", ">bytes", "state")
    faults, now = list[str](), standing(workspace)
    for version in shown:
        bundle = Artifact("lora_bundle", version.bundle, workspace / "lora_bundle" / version.bundle)
        state: str = now.state_of(version.number)
        record, fault = _collected_or_fault(workspace, bundle)
        if record:
            state += f", collected {record.day}"
        elif fault:
            state += ", cannot be used"
            faults.append(f"Version {version.number} cannot be used: {fault}")
        held = size(sizes[bundle.name]) if bundle.name in sizes else ""
        published, run_file = minute(published_at(workspace, version.number)), Path(version.run_file).name
        table.add_row(str(version.number), published, run_file, version.bundle, held, state)
    return table, faults


def _collected_or_fault(workspace: Path, bundle: Artifact) -> tuple[Collected | None, str]:
    """The record of a collected bundle, or why a bundle cannot be used. Neither: it can be used."""
    try:
        record = collected(workspace, bundle.name)
        return record, "" if record else next(missing_parts(bundle), "")
    except OSError as error:
        return None, str(storage_error(error, "read"))


def _kinds(inventory: Inventory) -> Table:
    """A row for each kind of finished artifacts."""
    kinds: dict[str, list[Stored]] = {}
    for artifact in inventory.artifacts:
        if artifact.finished:
            kinds.setdefault(artifact.kind, []).append(artifact)
    table = table_of("artifacts", ">number", ">bytes", "newest, UTC")
    for kind, group in sorted(kinds.items(), key=lambda pair: min(artifact.changed for artifact in pair[1])):
        files = bytes_on_disk(file for artifact in group for file in artifact.files)
        newest = max(artifact.changed for artifact in group)
        table.add_row(label(kind), f"{len(group):,}", size(files), minute(newest))
    total = [artifact for group in kinds.values() for artifact in group]
    files = bytes_on_disk(file for artifact in total for file in artifact.files)
    table.add_row("together, shared files once", f"{len(total):,}", size(files), "")
    return table


def _every(inventory: Inventory) -> Table:
    """A row for each finished artifact, oldest first in its kind."""
    table = table_of("artifact", "fingerprint", "made, UTC", ">files", ">bytes")
    finished = [artifact for artifact in inventory.artifacts if artifact.finished]
    for artifact in sorted(finished, key=lambda one: (one.kind, one.changed)):
        kind, fingerprint = artifact.name.split("/")
        made, files = minute(artifact.changed), f"{len(artifact.files):,}"
        table.add_row(label(kind), fingerprint, made, files, size(artifact.bytes))
    return table


def _unfinished(artifacts: list[Stored]) -> Table:
    table = table_of("unfinished", "fingerprint", "changed", ">bytes", "")
    for artifact in artifacts:
        kind, fingerprint = artifact.name.split("/")
        state = "a run writes it" if artifact.locked else "the same run continues it"
        table.add_row(label(kind), fingerprint, _ago(artifact.changed), size(artifact.bytes), state)
    return table


def table_of(*heads: str) -> Table:
    """A table without lines between its columns. A head that begins with `>` is of numbers."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1))
    for head in heads:
        table.add_column(head.removeprefix(">"), justify="right" if head.startswith(">") else "left")
    return table


def minute(when: float) -> str:
    """A Unix time as date and time, UTC."""
    return f"{datetime.fromtimestamp(when, UTC):%Y-%m-%d %H:%M}"


def _ago(when: float) -> str:
    """How long ago a Unix time was."""
    seconds = max(time.time() - when, 0)
    for unit, length in (("day", 86_400), ("hour", 3_600), ("minute", 60)):
        if seconds >= 2 * length:
            return f"{many(int(seconds // length), unit)} ago"
    return f"{many(int(seconds), 'second')} ago"
