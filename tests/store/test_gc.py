"""What `gc` does to a workspace: what stays can be used, what goes is said, and nobody is disturbed."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from deepfloyd_core.bundle.verify import verify_workspace
from deepfloyd_core.config.retention import Policy
from deepfloyd_core.errors import ArtifactError, StorageError
from deepfloyd_core.files import sha256_bytes
from deepfloyd_core.store import leases, retention
from deepfloyd_core.store.artifacts import Artifact, Request, WorkDir, find, materialise, newest
from deepfloyd_core.store.collected import FOLDER as RECORDS
from deepfloyd_core.store.collected import collected
from deepfloyd_core.store.gc import collect, would_collect
from deepfloyd_core.store.inventory import take_inventory
from deepfloyd_core.store.leases import leased, running_leases, take_lease
from deepfloyd_core.store.locks import artifact_lock, locked, locked_if_free
from deepfloyd_core.store.manifest import MANIFEST, Summary
from deepfloyd_core.store.parts import take_part
from deepfloyd_core.store.registry import promote, publish, rollback
from deepfloyd_core.store.versions import Origin, bundle_of, find_version, report_file, versions
from flows.commands.cli import app

STRICT = Policy(keep_versions=1, keep_days=0)


def deepfloyd(*arguments: object) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)))


def request(kind: str, number: int, *inputs: Artifact, **others: str) -> Request:
    return Request(kind, 1, {"seed": number}, {**{one.kind: one.name for one in inputs}, **others})


def made(
    workspace: Path, kind: str, number: int, *inputs: Artifact, links: Artifact | None = None, **others: str
) -> Artifact:
    """A finished artifact of a file of its own, and of one that it shares with another artifact."""

    def build(work: WorkDir) -> Summary:
        (work.path / "file").write_bytes(f"{kind} {number}".encode() * 1000)
        if links:
            digest = sha256_bytes((links.path / "file").read_bytes())
            take_part(links.path / "file", digest, work.path / "linked")
        return Summary()

    return materialise(workspace, request(kind, number, *inputs, **others), build)


class Nights:
    """A workspace with a version of each night: index, pixels, a LoRA, and a bundle that links the LoRA's file."""

    def __init__(self, workspace: Path, count: int) -> None:
        self.workspace = workspace
        self.parts: list[dict[str, Artifact]] = [self.night(number) for number in range(count)]

    def night(self, number: int) -> dict[str, Artifact]:
        index = made(self.workspace, "image_index", number, data="1" * 16)
        pixels = made(self.workspace, "stage1_pixels", number, index)
        lora = made(self.workspace, "stage1_lora", number, pixels)
        bundle = made(self.workspace, "lora_bundle", number, index, lora, links=lora)
        publish(self.workspace, bundle, index)
        return {one.kind: one for one in (index, pixels, lora, bundle)}

    @property
    def names(self) -> set[str]:
        return {f"{file.parents[1].name}/{file.parent.name}" for file in self.workspace.glob(f"*/*/{MANIFEST}")
                if not file.parent.name.startswith(".") and not file.parent.is_symlink()}  # fmt: skip

    def of(self, *numbers: int) -> set[str]:
        return {part.name for number in numbers for part in self.parts[number].values()}


def older(workspace: Path, days: float = 100) -> None:
    """As if everything had been there for some days longer, in the order in which it was made."""
    for path in sorted(workspace.rglob("*"), reverse=True):
        before = path.lstat()
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns - int(days * 86_400e9)), follow_symlinks=False)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def now() -> datetime:
    return datetime.now(UTC)


@pytest.fixture
def nights(tmp_path: Path) -> Nights:
    nights = Nights(tmp_path / "workspace", 4)
    older(nights.workspace)
    return nights


def test_a_dry_run_shows_what_goes_and_changes_nothing(nights: Nights) -> None:
    before = tree(nights.workspace)
    done = deepfloyd("gc", nights.workspace, "--keep-versions", 2)
    assert done.exit_code == 0 and tree(nights.workspace) == before
    assert "of versions 1, 2" in done.output and "8 artifacts would be removed" in done.output
    assert "Nothing was removed; --delete removes it." in done.output
    listed = deepfloyd("gc", nights.workspace, "--keep-versions", 2, "--all").output
    assert all(name.rpartition("/")[2] in listed for name in nights.of(0, 1))
    assert not any(name.rpartition("/")[2] in listed for name in nights.of(2, 3))


def test_old_versions_go_with_what_they_were_made_from_and_a_second_gc_finds_nothing(nights: Nights) -> None:
    before = tree(nights.workspace)
    done = deepfloyd("gc", nights.workspace, "--keep-versions", 2, "--delete")
    assert done.exit_code == 0 and "8 artifacts removed" in done.output
    assert nights.names == nights.of(2, 3)
    after = tree(nights.workspace)
    assert all(
        before[name] == after[name] for name in before if name.startswith("versions/") or name in nights.of(2, 3)
    )
    assert not list(nights.workspace.glob("*/.gone-*"))
    assert "There is nothing to remove." in deepfloyd("gc", nights.workspace, "--keep-versions", 2, "--delete").output


def test_the_bytes_that_it_says_are_those_that_the_disk_gets_back(nights: Nights) -> None:
    def used() -> int:
        stats = {(s.st_dev, s.st_ino): s.st_size for p in nights.workspace.glob("*_*/*/*") if (s := p.lstat())}
        return sum(stats.values())

    kept, gone = nights.parts[3]["lora_bundle"].path / "file", nights.parts[0]["stage1_pixels"].path / "file"
    gone.unlink()
    gone.hardlink_to(kept)  # as a shard that a later version took over
    os.link(nights.parts[1]["stage1_lora"].path / "file", nights.workspace.parent / "backup")
    before = used()
    planned = would_collect(nights.workspace, STRICT, now()).plan.frees
    collection = collect(nights.workspace, STRICT, now())
    backed_up = (nights.workspace.parent / "backup").stat().st_size
    assert collection.plan.frees == planned == before - used() - backed_up


def test_a_collected_version_says_so_wherever_it_is_asked_for(nights: Nights) -> None:
    day = f"{now():%Y-%m-%d}"
    collect(nights.workspace, STRICT, now())
    found = verify_workspace(nights.workspace)
    assert found.faults == 0 and found.notes == (
        f"versions 1, 2: collected on {day} by `deepfloyd gc`, cannot be used",
    )
    with pytest.raises(
        ArtifactError, match=rf"Version 1 cannot be used: its bundle was collected on {day} by `deepfloyd"
    ):
        bundle_of(nights.workspace, find_version(nights.workspace, "1"))
    bundle_of(nights.workspace, find_version(nights.workspace, "latest"))
    listed = deepfloyd("ls", nights.workspace).output
    assert listed.count(f"collected {day}") == 2 and listed.count("champion") == 1 and "fault" not in listed
    shown = deepfloyd("show", nights.workspace, "v1").output
    assert f"collected {day}" in shown and "seed" in shown
    pixels = nights.parts[0]["stage1_pixels"]
    assert (
        json.loads(deepfloyd("show", nights.workspace, pixels.fingerprint, "--json").output)["kind"] == "stage1_pixels"
    )


def test_what_is_built_again_is_no_longer_collected_and_can_be_lost_like_any_other(nights: Nights) -> None:
    collect(nights.workspace, STRICT, now())
    again = nights.night(0)
    assert again == nights.parts[0] and not any(collected(nights.workspace, part.name) for part in again.values())
    assert verify_workspace(nights.workspace).faults == 0
    (again["stage1_pixels"].path / MANIFEST).unlink()
    (line,) = verify_workspace(nights.workspace).missing
    assert again["stage1_pixels"].name in line and "needed by versions 1, 5" in line


def test_a_bundle_that_is_published_again_knows_what_it_was_made_from_though_that_is_gone(nights: Nights) -> None:
    collect(nights.workspace, STRICT, now())
    first = versions(nights.workspace)[0]
    index = made(nights.workspace, "image_index", 0, data="1" * 16)
    again = made(nights.workspace, "lora_bundle", 0, index, nights.parts[0]["stage1_lora"])
    version = publish(nights.workspace, again, index).version
    assert version.bundle == first.bundle and version.lineage == first.lineage


def test_while_it_is_not_known_what_a_version_needs_nothing_goes(nights: Nights) -> None:
    (nights.workspace / "versions" / "0002.json").write_bytes(b"{}")
    before = tree(nights.workspace)
    with pytest.raises(
        ArtifactError, match=r"0002\.json .*Nothing is removed while it is not known.*move the record out"
    ):
        collect(nights.workspace, STRICT, now())
    assert {name: data for name, data in tree(nights.workspace).items() if not name.startswith(".locks")} == {
        name: data for name, data in before.items() if not name.startswith(".locks")
    }


def test_a_rollback_finds_the_versions_before_the_champion_and_a_collected_one_is_not_promoted(nights: Nights) -> None:
    promote(nights.workspace, 1, "a person")
    collect(nights.workspace, Policy(keep_versions=2, keep_days=0), now())
    assert nights.names == nights.of(0, 2, 3)  # the champion, the one before it, and the last two
    with pytest.raises(ArtifactError, match=r"Version 2 cannot be used: its bundle was collected on"):
        promote(nights.workspace, 2, "a person")
    assert "version 4 serves" in rollback(nights.workspace, "a person")
    history = deepfloyd("history", nights.workspace).output
    assert "blocked" in history and "champion" in history


def test_of_the_strictest_policy_a_rollback_still_has_a_version_to_return_to(nights: Nights) -> None:
    done = deepfloyd("gc", nights.workspace, "--keep-versions", 1, "--keep-days", 0, "--delete")
    told = "The last 2 versions that serve or would after rollbacks, and the last version of each run file stay"
    assert told in " ".join(done.output.split())
    assert "version 3 serves" in rollback(nights.workspace, "a person")
    bundle_of(nights.workspace, find_version(nights.workspace, "latest"))


def test_reports_go_with_their_versions_but_for_the_last_ones(nights: Nights, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "KEPT_REPORTS", 1)
    reports = [report_file(nights.workspace, number) for number in (1, 2, 3, 4)]
    reports[0].parent.mkdir()
    for report in reports:
        report.write_bytes(b"<p>" * 1000)
    (reports[0].parent / "notes.html").write_bytes(b"mine")
    arguments = ("gc", nights.workspace, "--keep-versions", 1, "--keep-days", 0)
    planned = deepfloyd(*arguments).output
    assert "2 reports would be removed" in planned and "6.00 kB" in planned and "of versions 1, 2" in planned
    assert all(report.exists() for report in reports)
    before = would_collect(nights.workspace, STRICT, now()).plan.frees
    assert collect(nights.workspace, STRICT, now()).plan.frees == before
    assert [report.exists() for report in reports] == [False, False, True, True]
    reports[1].write_bytes(b"<p>")  # a person had it made again
    done = deepfloyd(*arguments, "--delete")
    assert "1 report removed: 3 B freed." in done.output and not reports[1].exists()
    assert (reports[0].parent / "notes.html").exists()


def test_what_belongs_to_a_run_file_whose_disk_is_away_stays_and_is_named(tmp_path: Path) -> None:
    """Versions of run files that were removed beside others count together, so that the older one goes."""
    disk, workspace = tmp_path / "disk" / "project", tmp_path / "workspace"
    disk.mkdir(parents=True)
    files = [disk / "away.toml", tmp_path / "removed.toml", *[tmp_path / "here.toml"] * 3]
    for number, file in enumerate(files):
        file.write_text("")
        index = made(workspace, "image_index", number, data="1" * 16)
        publish(workspace, made(workspace, "lora_bundle", number, index), index, Origin(str(file)))
    files[1].unlink()
    older(workspace)

    def of_the_first() -> bool:
        return would_collect(workspace, STRICT, now()).plan.versions == (3,)

    assert of_the_first(), "the champion, the one before it, and the last of each run file"
    files[0].unlink()
    assert of_the_first(), "its folder is empty: a mount point"
    assert str(files[0]) in "".join(deepfloyd("gc", workspace, "--keep-versions", 1).output.split())
    disk.rmdir()
    assert of_the_first() and "its disk is away" in " ".join(deepfloyd("gc", workspace).output.split())
    disk.mkdir()
    (disk / "another.toml").write_text("")
    assert would_collect(workspace, STRICT, now()).plan.versions == (1, 3), "it was removed beside others"


def test_while_it_is_not_known_which_version_serves_nothing_goes(nights: Nights) -> None:
    events = sorted((nights.workspace / "versions" / "events").iterdir())
    events[-1].write_bytes(b"{}")
    with pytest.raises(ArtifactError, match="it is not known which version serves"):
        collect(nights.workspace, STRICT, now())
    assert nights.names == nights.of(0, 1, 2, 3)
    promote(nights.workspace, 4, "a person")
    collect(nights.workspace, STRICT, now())
    assert nights.names == nights.of(3)


@pytest.mark.parametrize("name", ["0003.json", "events/000006.json"])
def test_a_disk_that_fails_once_while_versions_are_read_removes_nothing(
    nights: Nights, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Whichever reading of a record it is: the version, or who served before the champion, would be unknown to the rest."""
    real, readings, failing = Path.read_bytes, [0], [0]
    record = nights.workspace / "versions" / name

    def read(path: Path) -> bytes:
        if path == record:
            readings[0] += 1
            if readings[0] == failing[0]:
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", read)
    would_collect(nights.workspace, STRICT, now())
    assert readings[0]
    for failing[0] in range(1, readings[0] + 1):
        readings[0] = 0
        with pytest.raises(ArtifactError, match=r"nput/output error.*Nothing is removed"):
            would_collect(nights.workspace, STRICT, now())


# ---- what is not its own ----------------------------------------------------------------------------------------------


def test_files_of_others_are_named_and_stay(nights: Nights, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere" / ("a" * 16)
    elsewhere.mkdir(parents=True)
    (elsewhere / MANIFEST).write_text("{}")
    strangers = [
        nights.workspace / "notes.txt", nights.workspace / "stage1_lora" / "best one" / "lora.safetensors",
        nights.workspace / "mine" / "folder" / "file", nights.workspace / "tensorboard" / "mine" / "events",
    ]  # fmt: skip
    for path in strangers:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    (nights.workspace / "generated").mkdir()
    link = nights.workspace / "generated" / ("a" * 16)
    link.symlink_to(elsewhere)
    damaged = nights.parts[0]["stage1_pixels"].path
    (damaged / MANIFEST).write_bytes(b"{}")
    ours = nights.workspace / "diff_1_2.png"
    ours.write_bytes(b"")
    older(nights.workspace)
    done = deepfloyd("gc", nights.workspace, "--keep-versions", 1, "--keep-days", 0, "--delete")
    assert done.exit_code == 0 and nights.names == nights.of(2, 3) | {nights.parts[0]["stage1_pixels"].name}
    for path in (*strangers, link, damaged / "file"):
        assert path.exists(), path
    shown = done.output.replace("\n", " ")
    assert ours.exists() and ours.name not in shown
    for text in ("notes.txt", "best one", "/mine ", "tensorboard/mine", f"generated/{'a' * 16}", str(damaged)):
        assert text in shown, text


def test_what_tensorboard_reads_of_a_training_goes_with_it(nights: Nights) -> None:
    boards = [nights.workspace / "tensorboard" / artifact_lock(parts["stage1_lora"].name) for parts in nights.parts]
    for board in boards:
        board.mkdir(parents=True)
        (board / "events").write_text("x" * 500)
    older(nights.workspace)
    before = would_collect(nights.workspace, STRICT, now()).plan.frees
    boards[0].rename(boards[0].with_name("stage1_lora-" + "f" * 16))  # of a training that is not there
    assert collect(nights.workspace, STRICT, now()).plan.frees == before
    assert {path.name for path in (nights.workspace / "tensorboard").iterdir()} == {boards[2].name, boards[3].name}


# ---- runs that go on meanwhile ----------------------------------------------------------------------------------------


def test_what_a_run_has_looked_for_stays_until_the_run_ends(nights: Nights) -> None:
    first = nights.parts[0]

    @leased
    def run() -> None:
        assert find(nights.workspace, request("stage1_pixels", 0, first["image_index"])) == first["stage1_pixels"]
        bundle_of(nights.workspace, find_version(nights.workspace, "2"))
        assert set(running_leases(nights.workspace)) == {
            first["stage1_pixels"].name,
            nights.parts[1]["lora_bundle"].name,
        }
        collect(nights.workspace, STRICT, now())
        bundle_of(nights.workspace, find_version(nights.workspace, "2"))
        assert (first["stage1_pixels"].path / "file").exists()
        assert f"used by a run: process {os.getpid()} of " in deepfloyd("ls", nights.workspace).output

    run()
    assert not running_leases(nights.workspace) and first["stage1_pixels"].name in nights.names
    collect(nights.workspace, STRICT, now())
    assert nights.names == nights.of(2, 3) and not list((nights.workspace / ".leases").iterdir())


def test_the_newest_that_a_run_is_about_to_reuse_stays_when_a_newer_one_is_made(nights: Nights) -> None:
    @leased
    def run() -> None:
        before = newest(nights.workspace, "stage1_pixels", 1)
        assert before == nights.parts[3]["stage1_pixels"]
        nights.parts.append(nights.night(4))
        collect(nights.workspace, STRICT, now() + timedelta(days=1))
        assert (before.path / "file").exists()

    run()


def test_a_killed_run_keeps_nothing(nights: Nights) -> None:
    code = f"""
import time
from pathlib import Path
from deepfloyd_core.store.leases import leased, take_lease
@leased
def run():
    take_lease(Path({str(nights.workspace)!r}), {nights.parts[0]["lora_bundle"].name!r})
    print("held", flush=True)
    time.sleep(60)
run()
"""
    with subprocess.Popen([sys.executable, "-P", "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        collect(nights.workspace, STRICT, now())
        assert nights.parts[0]["lora_bundle"].name in nights.names
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert len(list((nights.workspace / ".leases").iterdir())) == 1
    collect(nights.workspace, STRICT, now())
    assert nights.names == nights.of(2, 3) and not list((nights.workspace / ".leases").iterdir())


def test_what_somebody_writes_stays_with_what_it_is_made_from(nights: Nights) -> None:
    """Also without a lease: a trainer that outlives its run by a checkpoint has the lock alone."""
    pixels = nights.parts[1]["stage1_pixels"]
    unfinished = request("stage1_lora", 99, pixels)

    def dies(work: WorkDir) -> Summary:
        (work.path / "weights").write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        materialise(nights.workspace, unfinished, dies)
    folder = nights.workspace / unfinished.name
    older(folder, 150)
    os.utime(folder, (0, 0))
    with locked(nights.workspace, artifact_lock(unfinished.name)):
        collect(nights.workspace, STRICT, now())
        assert (folder / "weights").exists() and pixels.name in nights.names
    collection = collect(nights.workspace, STRICT, now())
    assert {going.artifact.name for going in collection.plan.goes} == {unfinished.name} | {
        name for name in nights.of(1) if name.startswith(("image_index", "stage1_pixels"))
    }
    assert not folder.exists() and nights.names == nights.of(2, 3)


@pytest.mark.parametrize("way", ["continued", "locked"])
def test_work_that_a_run_takes_up_after_the_plan_stays(
    nights: Nights, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    unfinished = nights.workspace / request("stage1_lora", 99).name
    with pytest.raises(KeyboardInterrupt):
        materialise(
            nights.workspace, request("stage1_lora", 99), lambda work: (_ for _ in ()).throw(KeyboardInterrupt())
        )
    older(unfinished, 150)
    os.utime(unfinished, (0, 0))
    real, held = leases.no_new_leases, ExitStack()

    def taken_up(workspace: Path) -> AbstractContextManager[dict[str, str]]:
        if way == "continued":
            (unfinished / "weights").write_bytes(b"more")
        else:
            held.enter_context(locked_if_free(workspace, artifact_lock(f"stage1_lora/{unfinished.name}")))
        return real(workspace)

    monkeypatch.setattr("deepfloyd_core.store.gc.no_new_leases", taken_up)
    with held:
        collection = collect(nights.workspace, STRICT, now())
    assert collection.in_use == (f"stage1_lora/{unfinished.name}",) and unfinished.exists()


def test_a_run_never_loses_what_it_found_however_gc_and_runs_meet(nights: Nights) -> None:
    """Runs find an old artifact, or build it, and read it to their ends, while gc removes it again and again."""
    rng = random.Random(3)
    ended, faults, reads, builds = threading.Event(), list[str](), 0, 0
    old = request("stage1_pixels", 0, nights.parts[0]["image_index"])

    @leased
    def run() -> None:
        nonlocal builds
        artifact = find(nights.workspace, old)
        if artifact is None:
            builds += 1
            artifact = made(nights.workspace, "stage1_pixels", 0, nights.parts[0]["image_index"])
            older(artifact.path, 200)
        for _ in range(5):
            assert (artifact.path / "file").read_bytes() == b"stage1_pixels 0" * 1000
            assert artifact.hashes

    def runs() -> None:
        nonlocal reads
        while not ended.is_set():
            try:
                run()
                reads += 1
                time.sleep(rng.uniform(0, 0.01))
            except (OSError, ArtifactError, AssertionError) as error:
                faults.append(repr(error))

    threads = [threading.Thread(target=runs) for _ in range(2)]
    for thread in threads:
        thread.start()
    until = time.monotonic() + 2
    while time.monotonic() < until:
        collect(nights.workspace, STRICT, now())
    ended.set()
    for thread in threads:
        thread.join()
    assert not faults and reads > 20 and builds > 1, (faults[:3], reads, builds)


# ---- kills and refusals -----------------------------------------------------------------------------------------------


def killed_gc(workspace: Path, at: int) -> bool:
    """Collect in a fork of this process, which kills itself before so many changes of the disk. Returns whether it did."""
    process = os.fork()
    if process:
        return os.WIFSIGNALED(os.waitpid(process, 0)[1])
    try:
        left = at

        def change(do: Callable[..., object], *arguments: object, **named: object) -> object:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return do(*arguments, **named)

        for name in ("rename", "replace", "unlink", "rmdir", "mkdir"):
            setattr(os, name, partial(change, getattr(os, name)))
        collect(workspace, STRICT, now())
    finally:
        os._exit(0)


def test_a_killed_gc_leaves_artifacts_whole_or_gone_and_the_next_one_ends_it(tmp_path: Path) -> None:
    rng, workspace = random.Random(7), tmp_path / "workspace"
    nights = Nights(workspace, 5)
    older(workspace)
    at, places = 0, set[tuple[bool, ...]]()
    while killed_gc(workspace, at := at + rng.randint(1, 4)):
        places.add((any(workspace.glob("*/.gone-*")), any(workspace.glob("collected/*")), len(nights.names) < 20))
        found = verify_workspace(workspace)
        assert found.faults == 0 and nights.of(4) <= nights.names
        again = rng.randrange(4)
        assert nights.night(again) == nights.parts[again]  # a run builds, or finds, what it needs
        assert verify_workspace(workspace).faults == 0
        older(workspace)
        publish(workspace, nights.parts[4]["lora_bundle"], nights.parts[4]["image_index"])
    assert nights.of(4) <= nights.names and not list(workspace.glob("*/.gone-*"))
    assert not would_collect(workspace, STRICT, now()).plan.goes and verify_workspace(workspace).faults == 0
    assert at > 25 and len(places) > 2, (at, places)


def test_two_at_once_take_turns(nights: Nights) -> None:
    counts: list[int] = []
    threads = [
        threading.Thread(target=lambda: counts.append(len(collect(nights.workspace, STRICT, now()).plan.goes)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(counts) == [0, 8] and nights.names == nights.of(2, 3)


def test_a_file_that_cannot_be_removed_stops_nothing_else_and_is_named(
    nights: Nights, monkeypatch: pytest.MonkeyPatch
) -> None:
    stuck, real = nights.parts[0]["stage1_lora"].fingerprint, Path.unlink

    def unlink(path: Path, missing_ok: bool = False) -> None:
        if stuck in str(path.parent) and path.name == "file":
            raise PermissionError(13, os.strerror(13), str(path))
        real(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink)
    with pytest.raises(StorageError, match=rf"\.gone-{stuck}/file cannot be removed: permission denied"):
        collect(nights.workspace, STRICT, now())
    assert nights.names == nights.of(2, 3)
    assert "1 leftover" in deepfloyd("ls", nights.workspace).output
    monkeypatch.undo()
    assert "1 leftover removed" in deepfloyd("gc", nights.workspace, "--delete").output
    assert collected(nights.workspace, nights.parts[0]["stage1_lora"].name)


def test_an_inventory_of_a_workspace_that_changes_leaves_out_what_is_gone(nights: Nights) -> None:
    assert {one.name for one in take_inventory(nights.workspace).artifacts} == nights.of(0, 1, 2, 3)
    assert not (nights.workspace / RECORDS).exists()


def test_without_a_run_no_lease_is_written(nights: Nights) -> None:
    take_lease(nights.workspace, "stage1_lora/" + "0" * 16)
    assert not (nights.workspace / ".leases").exists()
