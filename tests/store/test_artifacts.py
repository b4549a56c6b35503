"""The artifact contract: built once, finished only with a sealed manifest, never trusted further than its hashes."""

import errno
import hashlib
import io
import json
import logging
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from summaries import summary_of

from deepfloyd_core.crops.summary import CropsSummary
from deepfloyd_core.errors import ArtifactError, StorageError
from deepfloyd_core.files import write_sealed
from deepfloyd_core.measures.held_out_loss import HeldOutLosses
from deepfloyd_core.store import provenance
from deepfloyd_core.store.artifacts import (
    Artifact,
    Request,
    WorkDir,
    all_artifacts,
    find,
    materialise,
    verify_artifact,
)
from deepfloyd_core.store.manifest import MANIFEST, Summary
from deepfloyd_core.store.parts import copy_file, copy_part, finish_part, part_is_whole

REQUEST = Request("eval_set", 1, {"seed": 42, "nested": {"rank": 4, "name": "é"}}, {"image_index": "ab12"})
CONTENT = {"a.bin": b"\x00\x01\x02", "deep/er/b.txt": "naïve\n".encode(), "empty": b""}


def build_files(work: WorkDir) -> Summary:
    """A builder that also leaves working state behind."""
    for name, data in CONTENT.items():
        (work.path / name).parent.mkdir(parents=True, exist_ok=True)
        (work.path / name).write_bytes(data)
    (work.path / ".state").mkdir(exist_ok=True)
    (work.path / ".state" / "half").write_bytes(b"half")
    (work.path / ".tmp-1-a.bin").write_bytes(b"half")
    return summary_of(rows=3)


def never(work: WorkDir) -> Summary:
    raise AssertionError("built again")


@pytest.fixture
def built(tmp_path: Path) -> Artifact:
    artifact = materialise(tmp_path, REQUEST, build_files)
    assert not artifact.reused
    return artifact


# ---- the manifest ---------------------------------------------------------------------------------------------------


def test_a_finished_artifact_lists_every_file_with_its_bytes_and_sha256_and_nothing_else(built: Artifact) -> None:
    record = json.loads((built.path / MANIFEST).read_bytes())
    listed = {entry["path"]: (entry["bytes"], entry["sha256"]) for entry in record["files"]}
    assert listed == {name: (len(data), hashlib.sha256(data).hexdigest()) for name, data in CONTENT.items()}
    assert record["spec"] == REQUEST.spec
    assert record["inputs"] == REQUEST.inputs
    assert record["summary"] == built.manifest.summary == {"rows": 3}
    assert {"started", "seconds", "python", "machine", "packages"} <= set(record["provenance"])
    assert not list(built.path.rglob(".*")), "working state is gone"


def test_artifacts_are_made_without_prefect_and_say_which_packages_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = metadata.version

    def version(name: str) -> str:
        if name == "prefect":
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(provenance, "package_versions", provenance.package_versions.__wrapped__)
    made = materialise(tmp_path, REQUEST, build_files)
    packages = made.manifest.provenance.packages
    assert packages["pyarrow"] == real("pyarrow") and "prefect" not in packages


def test_the_manifest_appears_last_and_is_never_seen_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    real_replace, real_fsync = Path.replace, os.fsync

    def replace(self: Path, target: Path) -> Path:
        assert json.loads(self.read_bytes())["seal"], "the temporary file is whole before it gets its name"
        order.append(f"rename {target.name}")
        return real_replace(self, target)

    def fsync(fd: int) -> None:
        order.append(f"fsync {Path(f'/proc/self/fd/{fd}').readlink().name}")
        real_fsync(fd)

    monkeypatch.setattr(Path, "replace", replace)
    monkeypatch.setattr(os, "fsync", fsync)
    artifact = materialise(tmp_path, REQUEST, build_files)
    place = order.index(f"rename {MANIFEST}")
    assert {f"fsync {Path(name).name}" for name in CONTENT} <= set(order[:place])
    assert order[place - 1].endswith(MANIFEST)
    # Nothing follows but the directory's: for the manifest's name, and when the working state has gone.
    assert order[place + 1 :] == [f"fsync {artifact.path.name}"] * 2


def test_the_manifests_seal_is_the_sha256_of_its_own_record(built: Artifact) -> None:
    record = json.loads((built.path / MANIFEST).read_bytes())
    seal = record.pop("seal")
    text = json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert seal == hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize("text", ["[]", "{}", "null", '"x"', "", "{", '{"seal": 3}', "\xff", "NaN"])
def test_a_manifest_that_is_no_sealed_record_is_an_artifact_error(built: Artifact, text: str) -> None:
    (built.path / MANIFEST).write_bytes(text.encode("latin-1"))
    with pytest.raises(ArtifactError, match="The next run that needs the artifact rebuilds it"):
        _ = built.manifest
    assert verify_artifact(built)


@pytest.mark.parametrize(
    "edit",
    [
        {"format": None},
        {"spec": 3},
        {"inputs": {"index": 3}},
        {"files": [{"path": "a.bin"}]},
        {"provenance": {}},
        *({"files": [{"path": path, "bytes": 1, "sha256": "0" * 64}]} for path in ("a\0", "/etc/passwd", "in/../../a")),
    ],
)
def test_a_manifest_that_was_edited_and_sealed_again_is_an_artifact_error_and_stops_no_other(
    built: Artifact, edit: dict[str, Any]
) -> None:
    record = json.loads((built.path / MANIFEST).read_bytes())
    del record["seal"]
    write_sealed(built.path / MANIFEST, record | edit)
    with pytest.raises(ArtifactError, match="a sealed record, and not of an artifact"):
        _ = built.manifest
    assert verify_artifact(built)
    workspace = built.path.parents[1]
    assert materialise(workspace, replace(REQUEST, format=2), build_files) != built
    assert materialise(workspace, REQUEST, build_files) == built and not verify_artifact(built)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@settings(deadline=None, database=None, derandomize=True)
@given(st.dictionaries(st.sampled_from(["shards", "rows", "sizes", "other"]), PLAIN))
def test_a_summary_of_another_shape_is_an_artifact_error_that_names_the_key(record: dict[str, Any]) -> None:
    with pytest.raises(
        ArtifactError,
        match=r"^/w/x has a summary .* does not know \(\w+.*Move it out of the workspace to have it rebuilt",
    ):
        CropsSummary.of_record(record, "/w/x")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_figure_that_no_manifest_can_hold_is_refused_where_it_is_reported(value: float) -> None:
    with pytest.raises(ValidationError, match="finite number"):
        HeldOutLosses(eval_loss=value)


# ---- the fingerprint -------------------------------------------------------------------------------------------------

SPECS = st.dictionaries(st.text(), PLAIN, max_size=4)


def shuffled(value: Any) -> Any:
    """The same value with every dictionary's keys in the other order."""
    if isinstance(value, dict):
        return {key: shuffled(value[key]) for key in reversed(list(value))}
    return [shuffled(item) for item in value] if isinstance(value, list) else value


@settings(deadline=None, database=None, derandomize=True)
@given(SPECS, st.dictionaries(st.text(), st.text(), max_size=3), st.integers(0, 9))
def test_the_fingerprint_is_the_sha256_of_kind_format_spec_and_inputs_whatever_their_order(
    spec: dict[str, Any], inputs: dict[str, str], number: int
) -> None:
    parts = {"kind": "eval_set", "format": number, "spec": spec, "inputs": inputs}
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    expected = hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]
    assert Request("eval_set", number, spec, inputs).fingerprint == expected
    assert Request("eval_set", number, shuffled(spec), shuffled(inputs)).fingerprint == expected


def test_the_fingerprint_changes_with_each_of_kind_format_spec_and_inputs() -> None:
    others = [
        Request("image_index", REQUEST.format, REQUEST.spec, REQUEST.inputs),
        Request(REQUEST.kind, 2, REQUEST.spec, REQUEST.inputs),
        Request(REQUEST.kind, REQUEST.format, {**REQUEST.spec, "seed": 43}, REQUEST.inputs),
        Request(REQUEST.kind, REQUEST.format, {**REQUEST.spec, "seed": 42.5}, REQUEST.inputs),
        Request(REQUEST.kind, REQUEST.format, {**REQUEST.spec, "more": None}, REQUEST.inputs),
        Request(REQUEST.kind, REQUEST.format, {"seed": 42, "nested": {"rank": 5, "name": "é"}}, REQUEST.inputs),
        Request(REQUEST.kind, REQUEST.format, REQUEST.spec, {"image_index": "ab13"}),
        Request(REQUEST.kind, REQUEST.format, REQUEST.spec, {"pixels": "ab12"}),
        Request(REQUEST.kind, REQUEST.format, {**REQUEST.spec, "image_index": "ab12"}, {}),
    ]
    assert len({request.fingerprint for request in [REQUEST, *others]}) == len(others) + 1


def test_the_fingerprint_depends_on_neither_the_place_nor_the_time(tmp_path: Path) -> None:
    one = materialise(tmp_path / "one", REQUEST, build_files)
    two = materialise(
        tmp_path / "other" / "place", REQUEST, lambda work: summary_of(more=1) if build_files(work) else never(work)
    )
    assert one.fingerprint == two.fingerprint == one.path.name
    assert one.path == tmp_path / "one" / "eval_set" / REQUEST.fingerprint


# ---- reuse and repair -----------------------------------------------------------------------------------------------


def test_an_artifact_that_is_there_is_reused_without_a_look_at_the_builder(built: Artifact, tmp_path: Path) -> None:
    before = (built.path / MANIFEST).read_bytes()
    again = materialise(tmp_path, REQUEST, never)
    assert again == built and again.reused
    assert find(tmp_path, REQUEST) == built
    assert list(all_artifacts(tmp_path)) == [built]
    assert (built.path / MANIFEST).read_bytes() == before


@pytest.mark.parametrize(
    ("harm", "says"),
    [("missing", "is missing"), ("short", "has 2 bytes, its manifest says 3"), ("long", "has 4 bytes"),
     ("manifest", "was changed after it was written")],
)  # fmt: skip
def test_a_missing_or_resized_file_is_rebuilt_and_the_reason_logged(
    built: Artifact, tmp_path: Path, caplog: pytest.LogCaptureFixture, harm: str, says: str
) -> None:
    file = built.path / "a.bin"
    if harm == "missing":
        file.unlink()
    elif harm == "manifest":
        text = (built.path / MANIFEST).read_text()
        (built.path / MANIFEST).write_text(text.replace('"rows": 3', '"rows": 4'))
    else:
        file.write_bytes(b"ab" if harm == "short" else b"abcd")
    (built.path / "stray").write_bytes(b"left over")
    caplog.set_level(logging.INFO, "deepfloyd_core")
    again = materialise(tmp_path, REQUEST, build_files)
    assert not again.reused
    assert [line for line in caplog.messages if "rebuilt because" in line and says in line]
    assert verify_artifact(again) == []
    assert not (again.path / "stray").exists(), "nothing of a damaged artifact is trusted"


def test_what_changed_is_logged_in_the_user_s_words(
    built: Artifact, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "deepfloyd_core")
    spec = {"seed": 42, "nested": {"rank": 8, "name": "é"}, "only_in_the_new_format": True}
    materialise(tmp_path, Request("eval_set", 2, spec, {"image_index": "cd34"}), build_files)
    (line,) = [line for line in caplog.messages if "rebuilt:" in line]
    changes = set(line.split("rebuilt: ")[1].split("; "))
    assert changes == {"this version of the program builds it differently", "rank 4 -> 8", "image_index changed"}


# ---- unfinished builds ------------------------------------------------------------------------------------------------


def test_a_build_that_raises_leaves_no_manifest_and_is_resumed_where_it_was(tmp_path: Path) -> None:
    made: list[str] = []

    def build(work: WorkDir, stop_after: int) -> Summary:
        for number in range(4):
            file = work.path / f"part-{number}"
            if not part_is_whole(file):
                if len(made) >= stop_after:
                    file.write_bytes(b"half of it")  # what a kill leaves of a file in hand
                    raise OSError("no space left on device")
                file.write_bytes(bytes([number]) * 1000)
                finish_part(file)
                made.append(file.name)
        return summary_of(parts=4)

    with pytest.raises(StorageError, match="no space left"):
        materialise(tmp_path, REQUEST, lambda work: build(work, 2))
    folder = tmp_path / "eval_set" / REQUEST.fingerprint
    assert find(tmp_path, REQUEST) is None
    assert not (folder / MANIFEST).exists()
    assert list(all_artifacts(tmp_path)) == []
    artifact = materialise(tmp_path, REQUEST, lambda work: build(work, 99))
    assert not artifact.reused
    assert made == ["part-0", "part-1", "part-2", "part-3"], "finished parts are kept, the half one is made again"
    assert [(artifact.path / name).read_bytes() for name in made] == [bytes([n]) * 1000 for n in range(4)]
    assert not list(artifact.path.glob(".*")), "the records of the parts are working state"
    assert verify_artifact(artifact) == []


def test_a_part_is_trusted_by_its_hash_alone(tmp_path: Path) -> None:
    file = tmp_path / "shard.parquet"
    file.write_bytes(bytes(range(256)) * 8)
    assert not part_is_whole(file), "without a record nothing is trusted"
    finish_part(file)
    assert part_is_whole(file)
    (record,) = tmp_path.glob(".*")
    good, sealed = file.read_bytes(), record.read_bytes()
    for place in range(0, len(good), 97):
        file.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        assert not part_is_whole(file), f"byte {place} flipped"
    file.write_bytes(good[:-1])
    assert not part_is_whole(file)
    file.write_bytes(good)
    for place in range(len(sealed)):
        record.write_bytes(sealed[:place] + bytes([sealed[place] ^ 4]) + sealed[place + 1 :])
        assert not part_is_whole(file), f"byte {place} of the record flipped"
    record.write_bytes(sealed)
    assert part_is_whole(file)
    file.unlink()
    assert not part_is_whole(file)


# ---- verify -----------------------------------------------------------------------------------------------------------


def test_verify_finds_every_single_flipped_bit_of_every_file(built: Artifact) -> None:
    assert verify_artifact(built) == []
    chance = random.Random(1)
    for file in [path for path in built.path.rglob("*") if path.is_file() and path.stat().st_size]:
        good = file.read_bytes()
        for place in range(len(good)):
            file.write_bytes(good[:place] + bytes([good[place] ^ (1 << chance.randrange(8))]) + good[place + 1 :])
            assert verify_artifact(built), f"{file.name}: byte {place}"
        for place in range(0, len(good), 7):
            file.write_bytes(good[:place])
            assert verify_artifact(built), f"{file.name}: cut at {place}"
        file.write_bytes(good + b"\n")
        assert verify_artifact(built), f"{file.name}: one byte more"
        file.write_bytes(good)
    assert verify_artifact(built) == []


def test_verify_finds_extra_and_missing_files_and_a_manifest_of_another_artifact(
    built: Artifact, tmp_path: Path
) -> None:
    (built.path / "deep" / "extra").write_bytes(b"x")
    (built.path / ".hidden").write_bytes(b"x")
    assert sorted(line.split(" ", 1)[1] for line in verify_artifact(built)) == ["is not in the manifest"] * 2
    (built.path / "deep" / "extra").unlink()
    (built.path / ".hidden").unlink()
    (built.path / "empty").unlink()
    assert verify_artifact(built) == [f"{built.path / 'empty'} is missing"]
    other = materialise(tmp_path, Request("eval_set", 1, {"other": 1}, {}), build_files)
    (other.path / MANIFEST).write_bytes((built.path / MANIFEST).read_bytes())
    assert f"{other.path} holds the manifest of eval_set {built.fingerprint}" in verify_artifact(other)


def test_the_command_verify_exits_1_on_a_flipped_byte_and_0_without(built: Artifact, tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "flows", "verify", str(tmp_path)]
    good = subprocess.run(command, capture_output=True, text=True)
    assert (good.returncode, "1 artifact and 0 versions checked, 0 faults" in good.stdout) == (0, True)
    (built.path / "a.bin").write_bytes(b"\x00\x01\x03")
    bad = subprocess.run(command, capture_output=True, text=True)
    assert bad.returncode == 1
    assert f"{built.path / 'a.bin'} has other bytes" in bad.stdout


# ---- two processes ----------------------------------------------------------------------------------------------------


BUILDER = """
import sys, time
from pathlib import Path
from deepfloyd_core.store.artifacts import Request, materialise
from deepfloyd_core.store.manifest import Summary

def build(work):
    with Path(sys.argv[1], "builds").open("a") as log:
        log.write("built\\n")
    time.sleep(0.3)
    (work.path / "file").write_bytes(b"x")
    return Summary()

print("ready", flush=True)
sys.stdin.readline()
print(materialise(Path(sys.argv[1], "workspace"), Request("eval_set", 1, {"x": 1}, {}), build).reused)
"""


def test_three_processes_that_want_the_same_artifact_at_once_build_it_once(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-c", BUILDER, str(tmp_path)]
    pipe = subprocess.PIPE
    processes = [subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) for _ in range(3)]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        answers = [process.communicate(timeout=60)[0].strip() for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert sorted(answers) == ["False", "True", "True"]
    assert (tmp_path / "builds").read_text() == "built\n"


HOLDER = """
import sys, time
from pathlib import Path
from deepfloyd_core.store.artifacts import Request, materialise
from deepfloyd_core.store.manifest import Summary

def build(work):
    (work.path / "half").write_bytes(b"half")
    print("building", flush=True)
    time.sleep(600)

materialise(Path(sys.argv[1]), Request("eval_set", 1, {"x": 1}, {}), build)
"""


def test_a_killed_builder_frees_its_lock_and_leaves_nothing_that_is_trusted(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-P", "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "building\n"
        holder.send_signal(signal.SIGKILL)
        holder.wait(30)
    finally:
        holder.kill()
        holder.communicate()
    request = Request("eval_set", 1, {"x": 1}, {})
    assert find(tmp_path, request) is None
    start = time.monotonic()
    artifact = materialise(tmp_path, request, build_files)
    assert not artifact.reused
    assert time.monotonic() - start < 30, "no waiting for a dead process"
    assert verify_artifact(artifact) == []


@pytest.mark.parametrize(("before", "after"), [(None, 0o700), (0o755, 0o755)])
def test_a_new_workspace_is_its_user_s_alone_and_another_keeps_its_mode(
    tmp_path: Path, before: int | None, after: int
) -> None:
    if before:
        (tmp_path / "workspace").mkdir(before)
    materialise(tmp_path / "workspace", REQUEST, build_files)
    assert (tmp_path / "workspace").stat().st_mode & 0o777 == after


# ---- the commit, ended before each of its steps -----------------------------------------------------------------------


class Ended(OSError):
    """Stands for a disk that fails, or for a kill: what comes after it does not happen."""


def end_before(patch: pytest.MonkeyPatch, number: int) -> None:
    """Make the `number`th change or flush of files fail, from 0, and all after it."""
    steps = iter(range(number))

    def step(real: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any, **keys: Any) -> Any:
            if next(steps, None) is None:
                raise Ended(errno.EIO, os.strerror(errno.EIO))
            return real(*arguments, **keys)

        return called

    for owner, name in ((os, "fsync"), (os, "rmdir"), (os, "unlink"), (os, "replace"), (os, "open"), (io, "open")):
        patch.setattr(owner, name, step(getattr(owner, name)))


def build_with_state(work: WorkDir) -> Summary:
    """Files, a folder, and the working state of each kind: a checkpoint, a log, a part's record."""
    state = work.path / ".checkpoints" / "step-00000002"
    if not state.exists():
        state.mkdir(parents=True)
        (state / "weights").write_bytes(b"days of work")
    (work.path / ".job-train.log").write_bytes(b"a line")
    (work.path / "scheduler").mkdir(exist_ok=True)
    for name in ("lora", "scheduler/config"):
        (work.path / name).write_bytes(name.encode())
    finish_part(work.path / "lora")
    return Summary()


def is_committed(workspace: Path, patch: pytest.MonkeyPatch, number: int) -> bool:
    """Whether a commit that may take so many steps comes to its end, with nothing left over."""

    def build(work: WorkDir) -> Summary:
        summary = build_with_state(work)
        end_before(patch, number)
        return summary

    try:
        artifact = materialise(workspace, REQUEST, build)
    except (Ended, StorageError):
        return False
    return not list(artifact.path.glob(".*"))


def test_wherever_a_commit_ends_the_artifact_is_whole_or_its_working_state_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended, number, done = {"unfinished": 0, "finished": 0}, 0, False
    while not done:
        workspace = tmp_path / str(number)
        with monkeypatch.context() as patch:
            done = is_committed(workspace, patch, number)
        found = find(workspace, REQUEST)
        ended["finished" if found else "unfinished"] += 1
        if found:
            assert verify_artifact(found) == [], "whole, whatever is left of its working state"
        else:
            state = workspace / REQUEST.name / ".checkpoints" / "step-00000002" / "weights"
            assert state.read_bytes() == b"days of work" and (workspace / REQUEST.name / ".request.json").exists()
        after = materialise(workspace, REQUEST, build_with_state)
        assert after.reused == (found is not None) and verify_artifact(after) == []
        assert not list(after.path.rglob(".*")), f"ended before step {number}"
        number += 1
    assert min(ended.values()) > 3


def test_the_name_of_each_new_folder_is_on_the_disk_before_the_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[Path] = []
    monkeypatch.setattr(os, "fsync", lambda fd: flushed.append(Path(f"/proc/self/fd/{fd}").readlink()))
    artifact = materialise(tmp_path / "new" / "workspace", REQUEST, build_files)
    last = max(place for place, path in enumerate(flushed) if "manifest.json" in path.name)
    for folder in (tmp_path, tmp_path / "new", tmp_path / "new" / "workspace", artifact.path.parent):
        assert folder in flushed[:last], folder


# ---- reuse ------------------------------------------------------------------------------------------------------------


def flip(file: Path) -> None:
    """One bit of the last byte, with the times that it had."""
    data, times = file.read_bytes(), file.stat()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_a_file_with_a_flipped_bit_is_not_reused_and_named(built: Artifact, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a.bin", "deep/er/b.txt"):
        flip(built.path / name)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            again = materialise(built.path.parents[1], REQUEST, build_files)
        assert not again.reused and (again.path / name).read_bytes() == CONTENT[name]
        assert f"rebuilt because {built.path / name} has other bytes than its manifest says" in caplog.text


@pytest.mark.parametrize("harm", ["flipped", "gone"])
def test_a_damaged_file_is_taken_from_another_artifact_that_has_it_and_nothing_is_built(
    built: Artifact, tmp_path: Path, harm: str
) -> None:
    def build(work: WorkDir) -> Summary:
        copy_part(built.path / "deep" / "er" / "b.txt", built.hashes["deep/er/b.txt"], work.path / "copy")
        return Summary()

    other = materialise(tmp_path, Request("lora_bundle", 1, {}, {}), build)
    file = built.path / "deep" / "er" / "b.txt"
    assert not file.samefile(other.path / "copy")
    if harm == "gone":
        shutil.rmtree(file.parent)
    else:
        flip(file)
    assert materialise(tmp_path, REQUEST, never).reused and file.read_bytes() == CONTENT["deep/er/b.txt"]
    flip(other.path / "copy")
    of_other = Request("lora_bundle", 1, {}, {})
    assert materialise(tmp_path, of_other, never).reused
    flip(other.path / "copy")
    flip(file)
    with pytest.raises(AssertionError, match="built again"):
        materialise(tmp_path, of_other, never)
    assert not list(other.path.glob(".tmp*")), "a copy that is damaged as well is not taken"


@pytest.mark.parametrize("kernel", ["whole", "refuses", "gives up half way"])
def test_a_copy_has_every_byte_whatever_the_kernel_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: str
) -> None:
    old, new, data = tmp_path / "old", tmp_path / "new", random.Random(0).randbytes(3_000_000)
    old.write_bytes(data)
    calls = iter([1000, 0])

    def copy_file_range(source: int, copy: int, count: int) -> int:
        if kernel == "refuses" or (count := next(calls)) == 0:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        return os.write(copy, os.read(source, count))

    if kernel != "whole":
        monkeypatch.setattr(os, "copy_file_range", copy_file_range)
    copy_file(old, new)
    assert new.read_bytes() == data and new.stat().st_ino != old.stat().st_ino
