"""File systems that refuse: each error names the file, what was to be done with it, why not, and what to do."""

import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Literal

import pytest
from bad_disk import fail
from releases import Release, deepfloyd
from small_disk import PAGE, small_disk
from small_run import SmallRun
from typer.testing import Result

from deepfloyd_core.errors import StorageError
from deepfloyd_core.files import write_bytes
from deepfloyd_core.store.artifacts import Request, WorkDir, materialise
from deepfloyd_core.store.file_faults import storage_error, written
from deepfloyd_core.store.locks import locked
from deepfloyd_core.store.manifest import MANIFEST, Summary
from flows.serving.server import prefect_server

REQUEST = Request("generated", 1, {}, {})


def _build(work: WorkDir) -> Summary:
    write_bytes(work.path / "file", b"bytes")
    return Summary()


def _fails(number: int, file: str | None = None) -> Callable[[WorkDir], Summary]:
    def build(work: WorkDir) -> Summary:
        raise OSError(number, os.strerror(number), file)

    return build


@pytest.mark.parametrize("number", [errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL])
def test_a_file_system_without_locks_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    locks = fcntl.flock

    def flock(file: int | IO[str], operation: int) -> None:
        fd = file if isinstance(file, int) else file.fileno()
        if Path(f"/proc/self/fd/{fd}").readlink().is_relative_to(tmp_path):
            raise OSError(number, os.strerror(number))
        locks(fd, operation)  # the server that other tests of this process keep up

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    with pytest.raises(StorageError) as caught:
        materialise(tmp_path, REQUEST, _build)
    lock = tmp_path / ".locks" / f"generated-{REQUEST.fingerprint}"
    assert str(caught.value).startswith(f"{lock} cannot be locked: {os.strerror(number).lower()} (")
    assert str(caught.value).endswith("Set `workspace` to a folder on a local disk.")
    said = pytest.raises(StorageError, match=r"server.lock cannot be locked: .* Set PREFECT_HOME to a folder")
    with said, prefect_server(tmp_path / "home"):
        pass


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_directory_that_cannot_be_flushed_is_no_error_a_file_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    refused = stat.S_ISDIR

    def fsync(fd: int) -> None:
        if refused(os.fstat(fd).st_mode):
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    artifact = materialise(tmp_path, REQUEST, _build)
    assert (artifact.path / MANIFEST).is_file()
    refused = stat.S_ISREG
    with pytest.raises(StorageError, match=rf"^{tmp_path}.*json cannot be written: {os.strerror(number).lower()}"):
        materialise(tmp_path, Request("generated", 2, {}, {}), _build)


@pytest.mark.parametrize(("name", "part"), [("stat", "file"), ("read_bytes", MANIFEST)])
def test_a_disk_that_fails_for_a_moment_costs_no_artifact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: Literal["stat", "read_bytes"], part: str
) -> None:
    artifact = materialise(tmp_path, REQUEST, _build)
    with monkeypatch.context() as patch, pytest.raises(StorageError, match=f"^{artifact.path / part} cannot be "):
        fail(patch, name, artifact.path / part, errno.EIO)
        materialise(tmp_path, REQUEST, _fails(errno.EIO))
    assert materialise(tmp_path, REQUEST, _fails(errno.EIO)).reused


@pytest.mark.parametrize(("name", "part"), [("stat", "stage1/file"), ("read_bytes", MANIFEST)])
def test_commands_that_list_versions_tell_of_a_file_that_cannot_be_read_and_list_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: Literal["stat", "read_bytes"], part: str
) -> None:
    release = Release(tmp_path)
    for each in ("old", "new"):
        release.publish(each)
    file = release.parts["old lora_bundle"].path / part
    fail(monkeypatch, name, file, errno.EIO)
    assert f"{file} cannot be read: Input/output error" in plain(deepfloyd("verify", str(tmp_path)))
    assert "its bundle is not complete" in plain(deepfloyd("history", str(tmp_path)))
    if name == "stat":
        bundle = release.parts["old lora_bundle"].fingerprint
        assert f"{file} cannot be read: input/output error" in plain(deepfloyd("show", str(tmp_path), bundle))
    else:  # `ls` sizes every file itself
        listed = plain(deepfloyd("ls", str(tmp_path)))
        assert f"Version 1 cannot be used: {file} cannot be read: input/output error" in listed and "champion" in listed


def plain(result: Result) -> str:
    """What a command printed, without its line breaks. It ended by its own words."""
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return " ".join(result.output.split())


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "Free some space there"),
        (errno.EDQUOT, "Free some of your quota there"),
        (errno.EROFS, "Choose a folder that can be written"),
        (errno.EACCES, "Change its permissions"),
        (errno.ENAMETOOLONG, "shorter path"),
        (errno.ENODEV, "Connect or repair that disk"),
        (errno.EIO, "Connect or repair that disk"),
    ],
)
def test_what_a_builder_meets_names_its_folder_or_the_file_that_it_reads(
    tmp_path: Path, number: int, advice: str
) -> None:
    reason = os.strerror(number)
    reason = reason[:1].lower() + reason[1:]
    for file, said in ((None, f"{tmp_path} cannot be written"), ("/pictures/a.png", "/pictures/a.png cannot be read")):
        with pytest.raises(StorageError) as caught:
            materialise(tmp_path, REQUEST, _fails(number, file))
        assert str(caught.value).startswith(f"{said}: {reason} (") and advice in str(caught.value)


def test_a_write_that_fails_names_the_file_and_not_the_temporary_one(tmp_path: Path) -> None:
    with (
        pytest.raises(StorageError, match=rf"^{tmp_path}/none/file cannot be written: no such file"),
        locked(tmp_path, "x"),
    ):
        write_bytes(tmp_path / "none" / "file", b"")


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a file system of 64 KiB, all of it used."""
    with small_disk(tmp_path / "disk", 16 * PAGE) as disk:
        with (disk.folder / "filler").open("wb", buffering=0) as filler, pytest.raises(OSError):
            while True:
                filler.write(bytes(PAGE))
        yield disk.folder


def test_a_full_disk_is_one_line_by_the_users_door(small_run: SmallRun, full_disk: Path) -> None:
    done = small_run.call_here("prepare", str(small_run.config), "--preview", "1", "--set", f"workspace={full_disk}")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    (line,) = done.stderr.splitlines()
    assert (
        line.startswith(f"error: {full_disk}") and f"no space left on device (tmpfs at {full_disk}, 0 B free)" in line
    )
    assert "Free some space there" in line


@pytest.mark.parametrize(
    ("workspace", "reason"),
    [("/proc/x", "no such file or directory (proc at /proc)"), ("x" * 300, "file name too long")],
)
def test_a_workspace_that_cannot_be_made_is_one_line(small_run: SmallRun, workspace: str, reason: str) -> None:
    done = small_run.call_here("prepare", str(small_run.config), "--preview", "1", "--set", f"workspace={workspace}")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {workspace}") and reason in line


def test_a_folder_beside_the_one_that_is_written_is_read(tmp_path: Path) -> None:
    (tmp_path / "ws").mkdir()
    with pytest.raises(StorageError, match=r"a\.png cannot be read"), written(tmp_path / "ws"):
        (tmp_path / "ws-pictures" / "a.png").read_bytes()


def test_a_network_that_does_not_answer_is_no_disk(tmp_path: Path) -> None:
    assert str(storage_error(TimeoutError(errno.ETIMEDOUT, "timed out"), "written", tmp_path)).endswith("timed out")


def test_a_librarys_own_words_stay(tmp_path: Path) -> None:
    def build(work: WorkDir) -> Summary:
        raise OSError("Error no file named model.safetensors found in directory /models.")

    with pytest.raises(StorageError, match=r"^Error no file named model.safetensors found in directory /models.$"):
        materialise(tmp_path, REQUEST, build)


def test_a_folder_that_cannot_be_removed_is_named_and_not_the_file_in_it_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ws" / "in").mkdir(parents=True)
    (tmp_path / "ws" / "in" / "file").touch()

    def refused(path: str, **keys: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), path)

    monkeypatch.setattr(os, "unlink", refused)
    with (
        pytest.raises(StorageError, match=rf"^{tmp_path}/ws cannot be written: input/output"),
        written(tmp_path / "ws"),
    ):
        shutil.rmtree(tmp_path / "ws" / "in")
