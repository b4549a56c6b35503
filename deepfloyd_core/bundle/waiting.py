"""Whether a scheduled training waits for more pictures, or for more days.

It waits only for a change of the data alone: other settings are a person's decision. And only if no picture was
withdrawn: what was withdrawn is to be out of the model soon. Costs one comparison of two ledgers.
"""

from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from deepfloyd_core.bundle.planned import planned_bundle
from deepfloyd_core.bundle.warm import own_starts
from deepfloyd_core.config.run import Run
from deepfloyd_core.errors import DeepFloydError
from deepfloyd_core.index.ledger import INDEX_FILE
from deepfloyd_core.store.artifacts import Artifact, damaged_parts
from deepfloyd_core.store.counts import many
from deepfloyd_core.store.events import Event, read_events, standing
from deepfloyd_core.store.registry import Outcome
from deepfloyd_core.store.versions import Version, find_version, index_of

_DAY_S = 86_400.0


def waiting(run: Run, index: Artifact, now: datetime | None = None) -> Outcome | None:
    """The champion, and in words what a retraining waits for; None if it is to begin. now: UTC.

    Raises ArtifactError when it is not known which version serves.
    """
    least, days = run.config.retrain_min_new_pictures, run.config.retrain_min_days
    champion = standing(run.workspace).champion if least or days else None
    if champion is None:
        return None
    version = find_version(run.workspace, str(champion))
    old = index_of(run.workspace, version)
    if any(damaged_parts(old)) or not _only_pictures_changed(run, old, version):
        return None
    new, withdrawn = new_pictures(old.path / INDEX_FILE, index.path / INDEX_FILE)
    if withdrawn:
        return None
    reasons = [f"{many(new, 'new picture')} of {least} (retrain_min_new_pictures)"] if new < least else []
    served_days = ((now or datetime.now(UTC)) - _serves_since(run.workspace, champion)).total_seconds() / _DAY_S
    if served_days < days:
        reasons.append(f"{served_days:.1f} of {days:g} days (retrain_min_days)")
    return (
        Outcome(version, "champion", False, f"waiting, {' and '.join(reasons)}", champion, champion)
        if reasons
        else None
    )


def new_pictures(old: Path, new: Path) -> tuple[int, int]:
    """Of two ledgers: how many accepted pictures are new, or have other pixels or captions; and how many names with an
    accepted picture are gone.
    """
    before, now = (_accepted(ledger) for ledger in (old, new))
    changed = pc.invert(pc.is_in(now["content"], before["content"]))
    gone = pc.invert(pc.is_in(before["name"], now["name"]))
    return pc.sum(changed).as_py() or 0, pc.sum(gone).as_py() or 0


def _accepted(ledger: Path) -> pa.Table:
    """The name of each accepted picture, and its content: pixels and captions."""
    columns = ["dataset_id", "source", "image_id", "captions"]
    table = pq.read_table(ledger, columns=columns, filters=pc.field("status") == "accepted")
    captions = pc.binary_join(table["captions"], "\n")
    return pa.table(
        {
            "name": pc.binary_join_element_wise(table["dataset_id"], table["source"], "/"),
            "content": pc.binary_join_element_wise(table["dataset_id"], table["image_id"], captions, "/"),
        }
    )


def _only_pictures_changed(run: Run, old: Artifact, version: Version) -> bool:
    """Whether today's settings would make the version's own bundle of the pictures that it was made from."""
    try:
        planned = planned_bundle(run, old, own_starts(run, version))
    except DeepFloydError:
        return False
    return planned is not None and planned.fingerprint == version.bundle


def _serves_since(workspace: Path, champion: int) -> datetime:
    promoted = [
        event
        for event in read_events(workspace)
        if isinstance(event, Event) and event.version == champion and event.kind == "promoted"
    ]
    return datetime.fromisoformat(promoted[-1].when)
