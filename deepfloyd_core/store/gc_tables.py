"""What `gc` removes and what stays, in rows and sentences for the terminal and the Prefect UI."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from deepfloyd_core.config.retention import Policy
from deepfloyd_core.store.changes import DRAWN, label
from deepfloyd_core.store.counts import days, many, ranges, size
from deepfloyd_core.store.gc import Collection
from deepfloyd_core.store.inventory import FileLink, bytes_on_disk
from deepfloyd_core.store.retention import GENERATED, Going


@dataclass(frozen=True)
class Row:
    """Artifacts of a kind that go, or artifacts that stay for one reason."""

    what: str
    count: int
    bytes: int
    why: str


def rows_going(collection: Collection) -> list[Row]:
    """A row for each kind and sort of reason, those that free most first."""
    groups: dict[tuple[str, str], list[Going]] = {}
    for going in collection.plan.goes:
        groups.setdefault((going.artifact.kind, _sort(going)), []).append(going)
    rows = [_row(kind, group) for (kind, _), group in groups.items()]
    if left := collection.plan.leftovers:
        rows.append(Row("leftovers", len(left), sum(frees for _, frees in left), "an earlier gc was interrupted"))
    if reports := collection.plan.reports:
        plural = "s" if len(reports) > 1 else ""
        rows.append(Row("reports", len(reports), sum(reports.values()), f"of version{plural} {ranges(reports)}"))
    return sorted(rows, key=lambda row: -row.bytes)


def rows_staying(collection: Collection) -> list[Row]:
    """A row for each reason, the strongest first. A file that several artifacts share counts with the first reason."""
    groups: dict[str, list[FileLink]] = {}
    counts: dict[str, int] = {}
    seen = set[tuple[int, int]]()
    for staying in collection.plan.stays:
        files = groups.setdefault(staying.why, [])
        new = [file for file in staying.artifact.files if (file.device, file.inode) not in seen]
        files += new
        seen |= {(file.device, file.inode) for file in new}
        counts[staying.why] = counts.get(staying.why, 0) + 1
    return [Row("", counts[why], bytes_on_disk(files), why) for why, files in groups.items()]


def why(goes: Sequence[Going]) -> str:
    """Why artifacts of one kind and sort go."""
    sort = _sort(goes[0])
    if sort == "versions":
        numbers = {number for going in goes for number in going.versions}
        return f"of version{'s' if len(numbers) > 1 else ''} {ranges(numbers)}"
    if sort == "unfinished":
        last = max(going.artifact.changed for going in goes)
        return f"unfinished, not continued since {datetime.fromtimestamp(last, UTC):%Y-%m-%d}"
    return "old" if sort == GENERATED else "of no version"


def policy_words(policy: Policy) -> str:
    """What stays, in a sentence."""
    last = "version" if policy.keep_versions == 1 else f"{policy.keep_versions} versions"
    return (
        f"The last {max(2, policy.keep_versions)} versions that serve or would after rollbacks, and the last {last} of each "
        "run file stay, with everything they were made from. "
    ) + (f"Anything else stays {days(policy.keep_days)}." if policy.keep_days else "Nothing else stays.")


def outcome_words(collection: Collection, deleted: bool) -> list[str]:
    """How many bytes are freed, and which versions cannot be used any more."""
    plan = collection.plan
    if plan.is_empty:
        return ["There is nothing to remove."]
    things = [many(len(plan.goes), "artifact")] if plan.goes else []
    things += [many(len(plan.leftovers), "leftover")] if plan.leftovers else []
    things += [many(len(plan.reports), "report")] if plan.reports else []
    verb = "removed" if deleted else "would be removed"
    *others, last = things
    listed = f"{', '.join(others)} and {last}" if others else last
    lines = [f"{listed} {verb}: {size(plan.frees)} {'freed' if deleted else 'to free'}."]
    if plan.versions:
        plural = "s" if len(plan.versions) > 1 else ""
        lines.append(
            f"Version{plural} {ranges(plan.versions)} {'can' if deleted else 'could then'} no longer be used; "
            f"the record{plural} and the figures stay."
        )
    return lines


def notes(collection: Collection) -> Iterator[str]:
    """A line for each thing that stays although no rule keeps it."""
    for name in collection.in_use:
        yield f"{name} stays: a run took it meanwhile"
    for file in collection.world.away:
        yield f"the last versions of {file} stay: its folder is missing or empty, as where its disk is away"
    for path, fault in collection.world.inventory.damaged:
        yield f"{path} stays: it is damaged ({fault.removesuffix('.')})"
    for path in collection.world.inventory.foreign:
        yield f"{path} stays: it is not of this program"


def markdown_page(workspace: Path, collection: Collection, deleted: bool) -> str:
    """The whole outcome as a page of the UI."""
    going, staying = rows_going(collection), rows_staying(collection)
    lines = [f"### gc of `{workspace.absolute()}`", "", *outcome_words(collection, deleted), ""]
    if going:
        lines += [f"| {'removed' if deleted else 'would go'} | number | frees | why |", "|---|--:|--:|---|"]
        lines += [f"| {row.what} | {row.count:,} | {size(row.bytes)} | {row.why} |" for row in going] + [""]
    lines += ["| stays | number | bytes |", "|---|--:|--:|"]
    lines += [f"| {row.why} | {row.count:,} | {size(row.bytes)} |" for row in staying]
    lines += ["", policy_words(collection.policy)]
    return "\n".join([*lines, "", *(f"- {_plain(line)}" for line in notes(collection))])


def _plain(text: str) -> str:
    """Text that markdown leaves as it is: paths may hold anything."""
    return re.sub(r"([\\`*_{}\[\]<>()#+!|~-])", r"\\\1", text).replace("\n", " ")


def _row(kind: str, goes: Sequence[Going]) -> Row:
    return Row(label(kind), len(goes), sum(going.frees for going in goes), why(goes))


def _sort(going: Going) -> str:
    """The sort of reason why an artifact goes."""
    if not going.artifact.finished:
        return "unfinished"
    if going.artifact.kind in DRAWN:
        return GENERATED
    return "versions" if going.versions else "no version"
