"""What is told of versions: each event once, also after a kill, and what a command decided without a server."""

import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from releases import Release, deepfloyd

from deepfloyd_core.files import read_sealed, write_sealed
from deepfloyd_core.store import registry
from deepfloyd_core.store.happenings import mark_told, untold
from deepfloyd_core.store.registry import Decision, publish
from deepfloyd_core.store.versions import Version


@pytest.fixture
def release(tmp_path: Path) -> Release:
    return Release(tmp_path / "birds")


def judged(then: str, reason: str = "") -> registry.Judge:
    def judge(version: Version, champion: int | None) -> Decision:
        return Decision(then, reason)  # type: ignore[arg-type]

    return judge


def add(release: Release, name: str, then: str, reason: str = "") -> None:
    parts = release.parts[f"{name} lora_bundle"], release.parts[f"{name} image_index"]
    publish(release.workspace, *parts, None, judged(then, reason))


def told(workspace: Path) -> list[tuple[str, int]]:
    return [(one.kind, one.version) for one in untold(workspace).happenings]


def test_what_was_promoted_blocked_or_waits_is_told_in_its_order_and_once(release: Release) -> None:
    workspace = release.workspace
    add(release, "old", "promoted", "better")
    assert told(workspace) == [("promoted", 1)] and told(workspace) == [("promoted", 1)], "until it is marked"
    mark_told(workspace, untold(workspace).last)
    assert told(workspace) == []
    add(release, "new", "candidate", "0.5 dB")
    registry.promote(workspace, 2, "a person")
    assert told(workspace) == [("promoted", 2)], "nobody need decide any more"
    mark_told(workspace, 3)
    assert deepfloyd("rollback", str(workspace)).exit_code == 0
    assert told(workspace) == [("promoted", 2), ("blocked", 2), ("promoted", 1)]
    (_, blocked, again) = untold(workspace).happenings
    assert blocked.message == again.message == "version 2 is blocked: rolled back; version 1 serves"
    assert blocked.id != again.id and blocked.id == untold(workspace).happenings[1].id


def test_a_candidate_that_waits_and_one_that_is_blocked_are_told_with_their_reasons(release: Release) -> None:
    add(release, "old", "blocked", "worse")
    add(release, "new", "candidate", "0.5 dB")
    assert [one.message for one in untold(release.workspace).happenings] == [
        "version 1 is blocked: worse; no version serves", "version 2 is a candidate: 0.5 dB; no version serves",
    ]  # fmt: skip


def test_a_damaged_mark_tells_nothing_again_and_what_comes_later(release: Release) -> None:
    add(release, "old", "promoted")
    mark_told(release.workspace, 0)
    (release.workspace / "versions" / "told").write_bytes(b"\x00")
    assert told(release.workspace) == []
    add(release, "new", "promoted")
    assert told(release.workspace) == [("promoted", 2)]


def test_a_lost_record_is_passed_over(release: Release) -> None:
    add(release, "old", "promoted")
    add(release, "new", "promoted")
    (release.workspace / "versions" / "events" / "000003.json").write_bytes(b"")
    assert told(release.workspace) == [("promoted", 1), ("promoted", 2)]


def age(workspace: Path, days: float) -> None:
    """Let every event of a workspace have happened so long ago."""
    when = (datetime.now(UTC) - timedelta(days=days)).isoformat(timespec="seconds")
    for file in (workspace / "versions" / "events").iterdir():
        write_sealed(file, dict(read_sealed(file, "")) | {"when": when})


def test_a_workspace_whose_mark_is_gone_tells_its_young_events_and_no_older_ones(release: Release) -> None:
    workspace = release.workspace
    add(release, "old", "promoted")
    age(workspace, days=4)
    add(release, "new", "promoted")
    mark_told(workspace, untold(workspace).last)
    (workspace / "versions" / "told").unlink()
    assert told(workspace) == [("promoted", 2)]
    age(workspace, days=4)
    assert told(workspace) == []
    assert deepfloyd("rollback", str(workspace)).exit_code == 0
    age(workspace, days=5)
    assert told(workspace) == [("blocked", 2), ("promoted", 1)], "late, and after what was told"


def test_what_follows_an_older_backup_of_the_events_is_told(release: Release, tmp_path: Path) -> None:
    workspace, backup = release.workspace, tmp_path / "backup"
    add(release, "old", "promoted")
    shutil.copytree(workspace / "versions" / "events", backup)
    add(release, "new", "promoted")
    mark_told(workspace, untold(workspace).last)
    shutil.rmtree(workspace / "versions" / "events")
    shutil.copytree(backup, workspace / "versions" / "events")
    assert told(workspace) == []
    registry.block(workspace, 1, "blurred", "a person")
    assert told(workspace) == [("blocked", 1)]
