"""A workspace in a bucket: what one machine made another one uses, whatever the store does meanwhile.

Two machines are two folders that mirror one URL. The store is moto's server; where a proxy stands before it, it refuses,
cuts and loses answers.
"""

import shutil
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from faulty_s3 import faulty_s3
from picture_site import serving
from releases import Release, make
from s3_server import s3_server
from small_disk import PAGE, small_disk

from deepfloyd_core.config.retention import Policy
from deepfloyd_core.errors import ArtifactError, BusyError, StorageError
from deepfloyd_core.files import sealed_bytes
from deepfloyd_core.store import bucket_turn, mirror
from deepfloyd_core.store.artifacts import Artifact, all_artifacts, verify_artifact
from deepfloyd_core.store.bucket_turn import bucket_turn as turn
from deepfloyd_core.store.events import Event, read_events, standing
from deepfloyd_core.store.gc import collect
from deepfloyd_core.store.leases import leased
from deepfloyd_core.store.mirror import Mirror, open_mirror
from deepfloyd_core.store.mirror_cache import set_limit
from deepfloyd_core.store.registry import block, promote
from deepfloyd_core.store.versions import bundle_of, champion, versions

WORKSPACE = "s3://work/birds"


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with s3_server(AWS_ENDPOINT_URL="{url}") as url:
        yield url


@pytest.fixture
def bucket(server: str) -> Iterator[Any]:
    """An empty bucket `work`, by boto3."""
    import boto3

    bucket = boto3.resource("s3", endpoint_url=server).create_bucket(Bucket="work")
    yield bucket
    bucket.objects.all().delete()


def machine(folder: Path) -> Mirror:
    """A folder that mirrors the workspace."""
    return open_mirror(WORKSPACE, folder)


def released(folder: Path) -> Release:
    """Two versions, made on a machine."""
    place = machine(folder)
    with turn(place.workspace, "one", wait=True):
        release = Release(place.workspace)
        release.publish("old")
        release.publish("new")
    return release


def hashes(workspace: Path) -> dict[str, dict[str, str]]:
    return {artifact.name: artifact.hashes for artifact in all_artifacts(workspace)}


def test_another_machine_has_all_that_one_made_and_brings_files_when_they_are_used(bucket: Any, tmp_path: Path) -> None:
    release, other = released(tmp_path / "a"), machine(tmp_path / "b").workspace
    assert hashes(other) == hashes(release.workspace) == hashes(Release(tmp_path / "plain").workspace)
    assert versions(other) == versions(release.workspace) and champion(other) == champion(release.workspace)
    assert read_events(other) == read_events(release.workspace)
    assert [file.name for file in other.glob("*/????????????????/**/*") if file.is_file()] == ["manifest.json"] * 9
    bundle = bundle_of(other, versions(other)[-1])
    assert not (bundle.folder / "stage1").exists()
    assert (bundle.path / "stage1/file").read_bytes() and verify_artifact(bundle) == []
    keys = {each.key for each in bucket.objects.all()}
    files = {sha256 for of in hashes(other).values() for sha256 in of.values()}
    assert {key.rpartition("/")[2] for key in keys if "/objects/" in key} == files, "each once"


def test_what_is_damaged_here_is_brought_again_and_what_is_damaged_there_is_made_again(
    bucket: Any, tmp_path: Path
) -> None:
    release = released(tmp_path / "a")
    index = release.parts["new image_index"]
    file = index.path / "stage1/file"
    whole = file.read_bytes()
    file.write_bytes(b"x" * len(whole))
    again = make(release.workspace, "image_index", {"of": "new"}, data="1" * 16)
    assert again.reused and file.read_bytes() == whole
    (index.folder / "manifest.json").write_bytes(b"damaged")
    assert make(release.workspace, "image_index", {"of": "new"}, data="1" * 16).reused
    (release.workspace / "versions/0001.json").write_bytes(b"damaged")
    (release.workspace / "versions/events/000001.json").unlink()
    machine(release.workspace)
    assert len(versions(release.workspace)) == 2 and standing(release.workspace).champion == 2

    other = machine(tmp_path / "b").workspace
    bucket.put_object(
        Key=f"birds/objects/{index.hashes['stage1/file'][:2]}/{index.hashes['stage1/file']}", Body=b"y" * len(whole)
    )
    there = Artifact(index.kind, index.fingerprint, other / index.name)
    assert "has other bytes than its name says" in verify_artifact(there)[0]
    with pytest.raises(ArtifactError, match="has other bytes than its name says"):
        _ = there.path
    with turn(other, "two", wait=True):
        made = make(other, "image_index", {"of": "new"}, data="1" * 16)
    assert not made.reused and (made.path / "stage1/file").read_bytes() == whole
    shutil.rmtree(tmp_path / "b")
    third = machine(tmp_path / "c").workspace
    assert (Artifact(index.kind, index.fingerprint, third / index.name).path / "stage1/file").read_bytes() == whole


def test_what_a_kill_left_unsent_is_sent_by_the_next_run(
    bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = machine(tmp_path / "a")
    with monkeypatch.context() as patch:
        patch.setattr("deepfloyd_core.store.artifacts.push", lambda folder: None)
        made = make(place.workspace, "image_index", {}, data="1" * 16)
    assert not hashes(machine(tmp_path / "b").workspace)
    with turn(place.workspace, "next", wait=True):
        assert hashes(machine(tmp_path / "b").workspace) == {made.name: made.hashes}


def test_decisions_of_two_machines_at_once_all_count(bucket: Any, tmp_path: Path) -> None:
    places = [released(tmp_path / "a").workspace, machine(tmp_path / "b").workspace]

    def decide(place: Path) -> None:
        for number in range(5):
            block(place, 1, f"{place.name} {number}", "a test")

    threads = [threading.Thread(target=decide, args=(place,)) for place in places]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    promote(places[0], 1, "a test")
    other = machine(tmp_path / "c").workspace
    reasons = [event.reason for event in read_events(other) if isinstance(event, Event) and event.kind == "blocked"]
    assert sorted(reasons) == sorted(f"{place.name} {number}" for place in places for number in range(5))
    assert standing(other).champion == 1


def test_a_store_that_refuses_cuts_and_loses_answers_is_asked_again(
    server: str, bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deepfloyd_core.store.bucket._PAUSE_S", 0.01)
    with faulty_s3(server, worse=3) as (address, done):
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        monkeypatch.setattr("deepfloyd_core.store.mirror._buckets", {})
        release = released(tmp_path / "a")
        other = machine(tmp_path / "b").workspace
        for artifact in all_artifacts(other):
            assert (artifact.path / "stage1/file").exists() and verify_artifact(artifact) == []
    assert min(done["refused"], done["cut"], done["lost"]) > 0, done
    assert hashes(other) == hashes(release.workspace) and versions(other) == versions(release.workspace)


def test_no_more_is_kept_here_than_was_asked_for_and_what_a_run_uses_stays(bucket: Any, tmp_path: Path) -> None:
    place = machine(tmp_path / "a")
    set_limit(place, 3000 / 2**30)
    made = []

    @leased
    def run() -> None:
        with turn(place.workspace, "one", wait=True):
            for number in range(4):
                made.append(make(place.workspace, "image_index", {"text": "x" * 1000, "n": number}, data="1" * 16))
        assert all((one.folder / "stage1/file").exists() for one in made), "a run uses all of them"

    run()
    with turn(place.workspace, "two", wait=True):
        make(place.workspace, "image_index", {"text": "x" * 1000, "n": 9}, data="1" * 16)
    assert [(one.folder / "stage1/file").exists() for one in made] == [False, False, False, True]
    assert (made[0].path / "stage1/file").exists() and verify_artifact(made[0]) == [], "brought again"
    assert [(one.folder / "stage1/file").exists() for one in made] == [True, False, False, False]


def test_gc_removes_from_the_bucket_what_no_record_names(bucket: Any, tmp_path: Path) -> None:
    release, other = released(tmp_path / "a"), machine(tmp_path / "b")
    extra = make(release.workspace, "generated", {"of": "somebody"}, version="1" * 16)
    bucket.put_object(Key=f"birds/objects/00/{'0' * 64}", Body=b"of a send that died")
    before = {each.key for each in bucket.objects.all()}
    young = collect(release.workspace, Policy(keep_versions=5, keep_days=1), datetime.now(UTC))
    assert not young.plan.goes and {each.key for each in bucket.objects.all()} == before
    done = collect(other.workspace, Policy(keep_versions=5, keep_days=0), datetime.now(UTC) + timedelta(seconds=5))
    gone = {name for name in hashes(release.workspace) if name not in hashes(other.workspace)}
    assert gone == {one.artifact.name for one in done.plan.goes}
    keys = {each.key for each in bucket.objects.all()}
    named = {sha256 for of in hashes(other.workspace).values() for sha256 in of.values()}
    assert {key.rpartition("/")[2] for key in keys if "/objects/" in key} == named
    assert hashes(machine(tmp_path / "a").workspace) == hashes(other.workspace), "it is gone there as well"
    assert extra.name in gone or "generated" in {name.split("/")[0] for name in hashes(other.workspace)}
    with turn(release.workspace, "a run", wait=True), pytest.raises(BusyError, match="a run on"):
        collect(other.workspace, Policy(keep_versions=5, keep_days=0), datetime.now(UTC))


def test_what_a_bucket_names_never_leads_out_of_its_mirror(bucket: Any, tmp_path: Path) -> None:
    for key in ("../../x.json", "versions/../../../x.json", ".ssh/authorized_keys", "image_index/" + "0" * 16 + "/x"):
        bucket.put_object(Key=f"birds/records/{key}", Body=b"{}")
    place = machine(tmp_path / "a")
    made = make(place.workspace, "image_index", {}, data="1" * 16)
    record = made.manifest.model_dump(mode="json")
    for entry in record["files"]:
        entry["path"] = "../../../out"
    bucket.put_object(Key=f"birds/records/{made.name}/manifest.json", Body=sealed_bytes(record))
    other = machine(tmp_path / "b").workspace
    assert not hashes(other)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    assert sorted(path.name for path in other.iterdir()) == [".bucket", ".locks"]


# ---- turns ----


@pytest.fixture
def short_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bucket_turn, "LEASE_S", 1.0)
    monkeypatch.setattr(bucket_turn, "BEAT_S", 0.2)


@pytest.mark.usefixtures("short_turns")
def test_a_run_of_another_machine_waits_or_is_told_who_is_at_work(bucket: Any, tmp_path: Path) -> None:
    one, two = machine(tmp_path / "a").workspace, machine(tmp_path / "b").workspace
    took: list[float] = []

    def wait() -> None:
        with turn(two, "the second", wait=True):
            took.append(time.monotonic())

    with turn(one, "the first", wait=True):
        with (
            pytest.raises(BusyError, match=r"the first on .* is at work in s3://work/birds"),
            turn(two, "x", wait=False),
        ):
            pass
        waiting = threading.Thread(target=wait)
        waiting.start()
        waiting.join(2.5)
        assert not took, "longer than a lease, which is renewed"
        ended = time.monotonic()
    waiting.join()
    assert took[0] >= ended


@pytest.mark.usefixtures("short_turns")
def test_a_dead_run_loses_its_turn_and_its_machine_has_it_back_at_once(
    bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = machine(tmp_path / "a"), machine(tmp_path / "b")
    dead = bucket_turn.Turn(one, "the dead")
    monkeypatch.setattr(dead, "_beat", lambda: None)
    dead._thread = threading.Thread(target=dead._beat)
    dead.take(wait=True)
    monkeypatch.setattr(time, "time", lambda: 0.0)  # a clock that is off
    with turn(one.workspace, "of the same machine", wait=False):
        pass
    dead = bucket_turn.Turn(one, "the dead")
    dead._thread = threading.Thread(target=lambda: None)
    dead.take(wait=True)
    with turn(two.workspace, "the next", wait=False):
        with pytest.raises(StorageError, match=r"the next on .* has taken the turn"):
            dead.check()
        assert make(two.workspace, "image_index", {}, data="1" * 16)


@pytest.mark.usefixtures("short_turns")
def test_a_run_that_lost_its_turn_writes_nothing_into_the_bucket(bucket: Any, tmp_path: Path) -> None:
    one, two = machine(tmp_path / "a"), machine(tmp_path / "b")
    cut_off = bucket_turn.Turn(one, "cut off")
    cut_off._thread = threading.Thread(target=lambda: None)
    cut_off.take(wait=True)
    mirror.fences[one.workspace] = cut_off.check
    try:
        with turn(two.workspace, "the next", wait=True):
            before = {each.key for each in bucket.objects.all()}
            with pytest.raises(StorageError, match="the same command goes on with it"):
                make(one.workspace, "image_index", {}, data="1" * 16)
            assert {each.key for each in bucket.objects.all()} == before
    finally:
        del mirror.fences[one.workspace]


# ---- what people are told ----


def test_a_bucket_that_cannot_be_used_is_one_sentence(
    bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StorageError, match=r"^s3://none/x: there is no bucket 'none'\. Create it"):
        open_mirror("s3://none/x", tmp_path / "x")
    released(tmp_path / "a")
    bucket.objects.filter(Prefix="birds/records/versions/").delete()
    with pytest.raises(ArtifactError, match=r"s3://work/birds lacks versions/0001\.json, which it had"):
        machine(tmp_path / "a")
    with pytest.raises(StorageError, match="mirrors s3://work/birds, not s3://work/other"):
        open_mirror("s3://work/other", tmp_path / "a")


def test_a_bucket_without_rights_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"

    class Denies(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(403)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            """Nothing."""

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
        monkeypatch.setenv(name, "us-east-1")
    with serving(Denies) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        with pytest.raises(
            StorageError, match=r"^s3://private/x cannot be listed: AccessDenied: Access Denied\. Creden"
        ):
            open_mirror("s3://private/x", tmp_path / "x")
    assert not (tmp_path / "x" / ".bucket").exists(), "nothing is left of a URL that cannot be read"


def test_a_full_disk_is_told_before_the_first_byte_and_the_same_command_goes_on(bucket: Any, tmp_path: Path) -> None:
    place = machine(tmp_path / "a")
    text = "x" * 300_000
    made = make(place.workspace, "image_index", {"text": text}, data="1" * 16)
    with small_disk(tmp_path / "disk", 600_000 + 40 * PAGE) as disk:
        other = machine(disk.folder / "b").workspace
        there = Artifact(made.kind, made.fingerprint, other / made.name)
        (disk.folder / "of_others").write_bytes(b"x" * (shutil.disk_usage(disk.folder).free - 10 * PAGE))
        with pytest.raises(
            StorageError, match=r"What image_index/\w+ of s3://work/birds lacks here takes .* has less room"
        ):
            _ = there.path
        (disk.folder / "of_others").unlink()
        assert (there.path / "stage1/file").stat().st_size > 300_000 and verify_artifact(there) == []
