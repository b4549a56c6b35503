"""What happened to versions: the champion by the events, and damaged records, kills and two at once around them."""

import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from releases import Release, deepfloyd

from deepfloyd_core.errors import ArtifactError, ConfigError
from deepfloyd_core.files import write_sealed
from deepfloyd_core.store import registry
from deepfloyd_core.store.events import Event, LostEvent, fold, read_events, standing
from deepfloyd_core.store.registry import Decision, news_of, publish, settled
from deepfloyd_core.store.verdicts import GateReport, Verdict
from deepfloyd_core.store.versions import Version, champion, find_version, versions

VERDICT = Verdict(rule="a rule", about="Stage I", passed=False, reason="worse", figure=0.5, interval=(0.25, 0.75))
REPORT = GateReport(against=1, verdicts=(VERDICT,))

# ---- the fold ---------------------------------------------------------------------------------------------------------


def event(number: int, version: int, kind: str) -> Event:
    return Event.model_validate(
        {"number": number, "version": version, "kind": kind, "reason": "", "by": "a test", "when": ""}
    )


def champion_of(history: list[tuple[str, int]]) -> int | str | None:
    """The rule in other words: search backwards for a promotion that no later block of the same version undid, unless a
    still later promotion brought that back. A lost event hides all before it."""
    for place in reversed(range(len(history))):
        kind, version = history[place]
        if kind == "lost":
            return "unknown"
        last = [kind for kind, other in history if other == version and kind in ("promoted", "blocked")][-1:]
        if kind == "promoted" and last == ["promoted"]:
            return version
    return None


HISTORIES = st.lists(st.tuples(st.sampled_from(["candidate", "promoted", "blocked", "lost"]), st.integers(1, 4)))


@given(HISTORIES)
def test_the_champion_is_the_last_promoted_version_that_is_not_blocked(history: list[tuple[str, int]]) -> None:
    now = fold(
        LostEvent(number, "lost") if kind == "lost" else event(number, version, kind)
        for number, (kind, version) in enumerate(history, 1)
    )
    wanted = champion_of(history)
    if wanted == "unknown":
        with pytest.raises(ArtifactError, match="promote WORKSPACE N"):
            _ = now.champion
        assert {now.state_of(number) for number in range(1, 5)} <= {"unknown", "blocked"}
    else:
        assert now.champion == wanted
        assert [number for number in range(1, 5) if now.state_of(number) == "champion"] == ([wanted] if wanted else [])


@given(HISTORIES, st.integers(1, 4))
def test_a_promotion_settles_every_history_and_a_block_of_it_leaves_what_was_before(
    history: list[tuple[str, int]], version: int
) -> None:
    events: list[Event | LostEvent] = [
        LostEvent(number, "lost") if kind == "lost" else event(number, of, kind)
        for number, (kind, of) in enumerate(history, 1)
    ]
    promoted = fold([*events, event(99, version, "promoted")])
    assert promoted.champion == version
    blocked = fold([*events, event(99, version, "promoted"), event(100, version, "blocked")])
    wanted = champion_of([*history, ("blocked", version)])
    if wanted == "unknown":
        with pytest.raises(ArtifactError):
            promoted.champion_without(version)
    else:
        assert blocked.champion == promoted.champion_without(version) == wanted


# ---- the commands -----------------------------------------------------------------------------------------------------


@pytest.fixture
def release(tmp_path: Path) -> Release:
    found = Release(tmp_path / "workspace")
    found.publish("old")
    found.publish("new")
    return found


def serves(release: Release) -> int | None:
    found = champion(release.workspace)
    return found.number if found else None


def test_rollback_promote_and_block_change_which_version_serves_and_history_says_why(release: Release) -> None:
    workspace = str(release.workspace)
    assert serves(release) == 2
    done = deepfloyd("rollback", workspace)
    assert done.output == "version 2 is blocked (rolled back); version 1 serves\n"
    assert serves(release) == 1 and find_version(release.workspace, "latest").number == 1
    done = deepfloyd("promote", workspace, "2")
    assert done.output == "version 2 is promoted and serves\n" and serves(release) == 2
    assert deepfloyd("promote", workspace, "2").output == "version 2 serves already\n"
    done = deepfloyd("block", workspace, "2", "--reason", "faces\nare [red]gone")
    assert done.output == "version 2 is blocked (faces are [red]gone); version 1 serves\n"
    printed = deepfloyd("history", workspace).output
    assert "faces are [red]gone" in printed and "champion" in printed and "blocked" in printed
    assert deepfloyd("block", workspace, "1", "--reason", "x").output.endswith("no version serves\n")
    refused = deepfloyd("rollback", workspace)
    assert isinstance(refused.exception, ConfigError) and "No version" in str(refused.exception)
    with pytest.raises(ConfigError, match=r"version 1: blocked, version 2: blocked.*promote"):
        find_version(release.workspace, "latest")


def test_what_cannot_be_done_is_refused_and_changes_nothing(release: Release) -> None:
    workspace = str(release.workspace)
    deepfloyd("block", workspace, "1", "--reason", "x")
    before = len(read_events(release.workspace))
    for arguments, message in (
        (("rollback", workspace), "Before version 2 none serves"),
        (("promote", workspace, "7"), "published: 1, 2"),
        (("block", workspace, "7", "--reason", "x"), "published: 1, 2"),
        (("block", workspace, "2", "--reason", "  "), "reason is empty"),
        (("history", f"{workspace}/none"), "is not there"),
    ):
        refused = deepfloyd(*arguments)
        assert isinstance(refused.exception, ConfigError) and message in str(refused.exception), arguments
    shutil.rmtree(release.parts["old lora_bundle"].path)
    for arguments in (("promote", workspace, "1"),):
        assert isinstance(deepfloyd(*arguments).exception, ArtifactError)
    deepfloyd("promote", workspace, "2")
    assert len(read_events(release.workspace)) == before
    assert deepfloyd("block", workspace, "2").exit_code == 2, "without a reason"


def test_a_version_whose_bundle_is_gone_is_not_rolled_back_to(release: Release) -> None:
    shutil.rmtree(release.parts["old lora_bundle"].path)
    refused = deepfloyd("rollback", str(release.workspace))
    assert isinstance(refused.exception, ArtifactError) and "Version 1 cannot be used" in str(refused.exception)
    assert serves(release) == 2
    assert "its bundle is not complete" in deepfloyd("history", str(release.workspace)).output


def test_versions_without_events_have_no_champion_and_a_promotion_gives_them_one(release: Release) -> None:
    shutil.rmtree(release.workspace / "versions" / "events")
    with pytest.raises(ConfigError, match=r"version 1: candidate, version 2: candidate.*`deepfloyd promote"):
        find_version(release.workspace, "latest")
    assert deepfloyd("promote", str(release.workspace), "1").exit_code == 0 and serves(release) == 1


# ---- what was blocked -------------------------------------------------------------------------------------------------


def test_a_bundle_that_was_blocked_is_not_published_again_until_it_is_promoted(release: Release) -> None:
    registry.rollback(release.workspace, "a test")
    outcome = release.outcome("new")
    news = "no change: version 2 is blocked (rolled back); version 1 serves"
    assert news_of(release.workspace, outcome) == news
    assert settled(release.workspace, release.parts["new lora_bundle"].fingerprint) == outcome
    assert len(versions(release.workspace)) == 2
    registry.promote(release.workspace, 2, "a test")
    assert news_of(release.workspace, release.outcome("new")) == "no change: version 2 serves"
    assert release.publish("old") == 3


def test_a_verdict_leaves_the_champion_where_it_is_unless_it_promotes(tmp_path: Path) -> None:
    release = Release(tmp_path / "workspace")
    release.publish("old")
    bundle, index = release.parts["new lora_bundle"], release.parts["new image_index"]

    def judge(version: Version, before: int | None) -> Decision:
        assert (version.number, before) == (2, 1)
        return Decision("candidate", "a person decides", REPORT)

    waiting = publish(release.workspace, bundle, index, judge=judge)
    assert news_of(release.workspace, waiting) == (
        f"version 2 is a candidate: a person decides; `deepfloyd promote {release.workspace} 2` promotes it; version 1 "
        "serves"
    )
    assert publish(release.workspace, bundle, index, judge=judge, waits=True).version.number == 2, "judged once"
    assert standing(release.workspace).candidates[2].report == REPORT
    worse = publish(release.workspace, bundle, index, judge=lambda version, before: Decision("blocked", "worse"))
    assert news_of(release.workspace, worse) == "version 2 is blocked: worse; version 1 serves"
    assert (worse.version.number, serves(release)) == (2, 1)


# ---- damage, kills, two at once ---------------------------------------------------------------------------------------


def damaged(file: Path, record: bytes) -> None:
    if record == b"foreign":
        write_sealed(file, {"number": 4, "color": "blue"})
    elif record == b"another":
        shutil.copyfile(file.with_name("000001.json"), file)
    elif record == b"gone":
        file.unlink()
    else:
        file.write_bytes(record)


@pytest.mark.parametrize("record", [b"", b"{}", b"null", b"\x00" * 99, b"foreign", b"another", b"gone"])
def test_a_damaged_event_leaves_no_champion_names_its_file_and_a_promotion_settles_it(
    release: Release, record: bytes
) -> None:
    events = release.workspace / "versions" / "events"
    number = 3 if record == b"gone" else 4  # the last one would leave no gap
    damaged(events / f"00000{number}.json", record)
    message = f"00000{number}.json.*not known which version serves.*`deepfloyd promote WORKSPACE N`"
    for ask in (lambda: find_version(release.workspace, "latest"), lambda: release.outcome("old")):
        if number == 3 and record == b"gone":
            assert serves(release) == 2, "what came later promotes it"
            break
        with pytest.raises(ArtifactError, match=message):
            ask()
    assert f"00000{number}.json" in deepfloyd("history", str(release.workspace)).output.replace("\n", "")
    assert find_version(release.workspace, "1").number == 1
    assert deepfloyd("promote", str(release.workspace), "1").exit_code == 0
    assert serves(release) == 1
    assert (events / "000005.json").exists() == (record != b"gone" or number == 3), "its number is not used again"


def test_a_champion_whose_record_is_damaged_is_named_and_can_be_rolled_back(release: Release) -> None:
    (release.workspace / "versions" / "0002.json").write_bytes(b"")
    with pytest.raises(ArtifactError, match=r"0002\.json.*--version 1"):
        find_version(release.workspace, "latest")
    assert deepfloyd("rollback", str(release.workspace)).exit_code == 0 and serves(release) == 1


@pytest.mark.parametrize("last", ["0002.json", "000003.json"])
def test_a_run_that_was_killed_before_its_verdict_is_judged_by_the_next_one(tmp_path: Path, last: str) -> None:
    release = Release(tmp_path / "workspace")
    release.publish("old")

    def killed_after_the_record() -> None:
        from deepfloyd_core import files

        write = files.write_bytes

        def write_and_die(path: Path, data: bytes) -> None:
            write(path, data)
            if path.name == last:
                os.kill(os.getpid(), signal.SIGKILL)

        files.write_bytes = write_and_die
        release.publish("new")

    child = multiprocessing.get_context("fork").Process(target=killed_after_the_record)
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert serves(release) == 1 and [one.number for one in versions(release.workspace)] == [1, 2]
    assert standing(release.workspace).state_of(2) == "candidate"
    assert "candidate" in deepfloyd("history", str(release.workspace)).output
    assert release.publish("new") == 2 and serves(release) == 2
    assert "published version 2" not in news_of(release.workspace, release.outcome("new"))


def test_many_promotions_at_once_are_one_event_each(release: Release) -> None:
    fork = multiprocessing.get_context("fork")

    def promoted(number: int) -> None:
        for _ in range(5):
            registry.promote(release.workspace, number, "a test")

    before = len(read_events(release.workspace))
    children = [fork.Process(target=promoted, args=(number,)) for number in (1, 2, 1, 2)]
    for child in children:
        child.start()
    for child in children:
        child.join()
        assert child.exitcode == 0
    events = read_events(release.workspace)
    assert all(isinstance(one, Event) and one.number == number for number, one in enumerate(events, 1))
    numbers = [one.version for one in events[before:] if isinstance(one, Event)]
    assert all(one != other for one, other in zip([2, *numbers], numbers, strict=False)), "the champion is not promoted"
    record = json.loads((release.workspace / "versions" / "events" / "000001.json").read_text())
    assert record["kind"] == "candidate"
