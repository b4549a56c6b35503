"""`deepfloyd publish`: to a folder, a real S3 API and a Hub on loopback; what is there is kept, what is old goes."""

import hashlib
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_stand_in import TOKEN, Hub, hub_in_place
from releases import Release, deepfloyd
from s3_server import s3_server
from small_disk import PAGE, small_disk

from deepfloyd_core.bundle import publish_hub
from deepfloyd_core.bundle.publish_files import RECORD, FilePlace
from deepfloyd_core.errors import StorageError
from deepfloyd_core.files import canonical_json
from deepfloyd_core.store.artifacts import Artifact, Request, WorkDir, materialise
from deepfloyd_core.store.manifest import Summary
from deepfloyd_core.store.registry import block
from deepfloyd_core.store.registry import publish as publish_version
from deepfloyd_core.store.versions import Origin, find_version

FILES = {
    "README.md": b"# a card\n", "sheet.png": b"\x89PNG" * 500, "stage1/pytorch_lora_weights.safetensors": b"w1" * 70_000,
    "stage2/pytorch_lora_weights.safetensors": b"w2" * 9_000, ".inner": b"not for others",
}  # fmt: skip


@pytest.fixture
def release(tmp_path: Path) -> Release:
    return Release(tmp_path / "workspace")


def version(release: Release, number: int, **changes: bytes | None) -> int:
    """Publish a bundle with files; None leaves one out."""

    def build(work: WorkDir) -> Summary:
        for name, data in ({**FILES, **changes}).items():
            if data is not None:
                (work.path / name).parent.mkdir(exist_ok=True)
                (work.path / name).write_bytes(data)
        return Summary()

    index: Artifact = release.parts["old image_index"]
    request = Request("lora_bundle", 1, {"number": number}, {"image_index": index.name})
    bundle = materialise(release.workspace, request, build)
    return publish_version(release.workspace, bundle, index, Origin("")).version.number


def shown(release: Release, data: dict[str, bytes], number: int = 1) -> dict[str, bytes]:
    """What should be there of a version with these files."""
    bundle = release.workspace / "lora_bundle" / find_version(release.workspace, str(number)).bundle
    files = {name: data for name, data in data.items() if not name.startswith(".")}
    files["manifest.json"] = (bundle / "manifest.json").read_bytes()
    sums = "".join(f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in sorted(files.items()))
    record = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()} | {"SHA256SUMS": ""}
    return {**files, "SHA256SUMS": sums.encode(), RECORD: canonical_json(record).encode()}


def in_folder(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_gets_the_files_of_a_version_and_then_those_of_the_next(release: Release, tmp_path: Path) -> None:
    version(release, 1)
    target = tmp_path / "published"
    planned = deepfloyd("publish", str(release.workspace), "1", str(target), "--dry-run")
    assert (
        planned.exit_code == 0 and not target.exists() and "140,000" in planned.output and "5 files" in planned.output
    )
    done = deepfloyd("publish", str(release.workspace), "latest", str(target))
    assert done.exit_code == 0 and str(target) in done.output
    assert in_folder(target) == shown(release, FILES)
    assert subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=target, capture_output=True).returncode == 0

    before = (target / "sheet.png").stat().st_mtime_ns
    assert "0 files" in deepfloyd("publish", str(release.workspace), "1", str(target)).output
    (target / "stage1" / "pytorch_lora_weights.safetensors").unlink()
    (target / "notes.txt").write_text("mine")
    assert "1 file, 0.1 MiB" in deepfloyd("publish", str(release.workspace), "1", str(target)).output
    assert (target / "sheet.png").stat().st_mtime_ns == before, "what is there is not written again"

    version(release, 2, **{"README.md": b"# another\n", "stage2/pytorch_lora_weights.safetensors": None})
    done = deepfloyd("publish", str(release.workspace), "2", str(target))
    assert "stage2/pytorch_lora_weights.safetensors" in done.output and "of an earlier publication" in done.output
    now = {name: data for name, data in FILES.items() if not name.startswith("stage2/")} | {"README.md": b"# another\n"}
    assert in_folder(target) == {**shown(release, now, 2), "notes.txt": b"mine"}


def test_what_cannot_be_published_is_refused(release: Release, tmp_path: Path) -> None:
    number = version(release, 1)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    workspace = str(release.workspace)

    def refused(*arguments: str) -> str:
        done = deepfloyd("publish", *arguments)
        assert done.exit_code != 0
        return str(done.exception)

    assert "holds other files, and no publication of ours" in refused(workspace, "1", str(tmp_path / "full"))
    assert list((tmp_path / "full").iterdir()) == [tmp_path / "full" / "thesis.txt"]
    assert "--public is for the Hugging Face Hub" in refused(workspace, "1", str(tmp_path / "x"), "--public")
    assert "There is no version '7'" in refused(workspace, "7", str(tmp_path / "x"))
    assert "to a folder, to s3://BUCKET/PREFIX or to hf://" in refused(workspace, "1", "sftp://me:secret@place/x")
    for name in ("hf://", "hf://alone", "hf://a/b/c", "hf://a/b c"):
        assert "names no repository" in refused(workspace, "1", name)
    bundle = release.workspace / "lora_bundle"
    file = next(bundle.glob("*/README.md"))
    file.chmod(0o644)
    file.write_bytes(b"# a lard\n")
    assert "Version 1 is not published: " in refused(workspace, "1", str(tmp_path / "x"))
    file.write_bytes(FILES["README.md"])
    block(release.workspace, number, "it does harm", "a test")
    assert "Version 1 is blocked: it does harm" in refused(workspace, "1", str(tmp_path / "x"))
    assert not (tmp_path / "x").exists()


@pytest.fixture(scope="module")
def s3() -> Iterator[Any]:
    """A bucket of a real S3 API on loopback."""
    import boto3

    with s3_server(AWS_ENDPOINT_URL="{url}"):
        yield boto3.resource("s3").create_bucket(Bucket="published")


def test_a_bucket_gets_them_and_an_interrupted_publication_is_gone_on_with(
    release: Release, s3: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    S3FileSystem: Any = pytest.importorskip("s3fs").S3FileSystem

    version(release, 1)
    put, names = S3FileSystem._put_file, list[str]()

    async def failing(self: Any, local: str, remote: str, **more: Any) -> Any:
        if remote.endswith("pytorch_lora_weights.safetensors") and "stage2" in remote:
            raise OSError("the line is cut")
        names.append(remote)
        return await put(self, local, remote, **more)

    with monkeypatch.context() as patched:
        patched.setattr(S3FileSystem, "_put_file", failing)
        done = deepfloyd("publish", str(release.workspace), "1", "s3://published/models/star")
        assert "cannot be published to: OSError: the line is cut" in str(done.exception)
    assert len(names) == 3 and not any(one.key.endswith("SHA256SUMS") for one in s3.objects.all())
    other = {"sheet.png": None, "stage1/pytorch_lora_weights.safetensors": b"w9" * 70_000}
    version(release, 2, **other)
    with monkeypatch.context() as patched:  # the next version is cut as well, right after its weights have arrived

        async def cut(self: Any, local: str, remote: str, **more: Any) -> Any:
            await put(self, local, remote, **more)
            raise OSError("the line is cut")

        patched.setattr(S3FileSystem, "_put_file", cut)
        S3FileSystem.clear_instance_cache()
        deepfloyd("publish", str(release.workspace), "2", "s3://published/models/star")
    S3FileSystem.clear_instance_cache()
    done = deepfloyd("publish", str(release.workspace), "1", "s3://published/models/star")
    assert done.exit_code == 0, done.exception
    found = {one.key.removeprefix("models/star/"): one.get()["Body"].read() for one in s3.objects.all()}
    assert found == shown(release, FILES)
    assert "0 files" in deepfloyd("publish", str(release.workspace), "1", "s3://published/models/star").output
    assert "The specified bucket does not exist" in str(
        deepfloyd("publish", str(release.workspace), "1", "s3://nothing-here/x").exception
    )


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub_in_place(monkeypatch) as running:
        yield running


def test_the_hub_gets_them_in_one_commit_of_a_private_repository(release: Release, hub: Hub) -> None:
    version(release, 1)
    planned = deepfloyd("publish", str(release.workspace), "1", "hf://me/model", "--dry-run")
    assert planned.exit_code == 0 and hub.private is None, planned.exception
    done = deepfloyd("publish", str(release.workspace), "1", "hf://me/model")
    assert done.exit_code == 0 and f"{hub.url}/me/model" in done.output, done.exception
    assert hub.files == shown(release, FILES) and hub.private is True
    assert hub.commits == ["Version 1 of workspace"] and len(hub.uploads) == 3

    again = deepfloyd("publish", str(release.workspace), "1", "hf://me/model")
    assert "0 files" in again.output and len(hub.commits) == 1, "nothing to do, no commit"

    hub.files["my-notes.md"] = b"mine"  # beside a publication of ours
    changes: dict[str, Any] = {"README.md": b"# another\n", "stage2/pytorch_lora_weights.safetensors": None}
    version(release, 2, **changes)
    assert deepfloyd("publish", str(release.workspace), "2", "hf://me/model").exit_code == 0
    now = {name: data for name, data in FILES.items() if not name.startswith("stage2/")} | {"README.md": b"# another\n"}
    assert hub.files == {**shown(release, now, 2), "my-notes.md": b"mine"}
    assert hub.commits[1:] == ["Version 2 of workspace"] and len(hub.uploads) == 3, "only what is new was sent"


def test_a_hub_that_refuses_or_cuts_is_asked_again_and_goes_on(release: Release, hub: Hub) -> None:
    version(release, 1)
    hub.refuse, hub.cut = 1, 1
    assert deepfloyd("publish", str(release.workspace), "1", "hf://me/model").exit_code == 0
    assert hub.files == shown(release, FILES) and len(hub.uploads) == len(set(hub.uploads)) == 3


@pytest.mark.parametrize("listens", [False, True], ids=["nobody", "silence"])
def test_a_hub_that_does_not_answer_is_one_sentence(
    release: Release, hub: Hub, monkeypatch: pytest.MonkeyPatch, listens: bool
) -> None:
    version(release, 1)
    monkeypatch.setattr(publish_hub, "_PAUSES_S", (0.0, 0.0))
    monkeypatch.setattr(publish_hub, "_SILENCE_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        if not listens:
            silent.close()
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{port}")
        done = deepfloyd("publish", str(release.workspace), "1", "hf://me/model")
    assert isinstance(done.exception, StorageError) and TOKEN not in str(done.exception)
    told = "ReadTimeout" if listens else "ConnectError"
    assert f"hf://me/model cannot be published to: {told}" in str(done.exception)


def test_the_hub_s_refusals_are_told_without_the_token(
    release: Release, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    version(release, 1)
    assert deepfloyd("publish", str(release.workspace), "1", "hf://me/model", "--public").exit_code == 0
    assert hub.private is False
    done = deepfloyd("publish", str(release.workspace), "1", "hf://me/model")
    assert "hf://me/model is public" in str(done.exception)
    monkeypatch.setenv("HF_TOKEN", "hf_of-somebody-else")
    done = deepfloyd("publish", str(release.workspace), "1", "hf://me/model", "--public")
    assert "refuses this login (401)" in str(done.exception)
    assert "somebody" not in f"{done.output}{done.exception}"


def test_what_is_not_ours_stays_wherever_it_is(release: Release, hub: Hub, tmp_path: Path) -> None:
    """Also beside a SHA256SUMS of somebody else's."""
    version(release, 1)
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / "thesis.pdf").write_bytes(b"mine")
    (folder / "SHA256SUMS").write_text(f"{hashlib.sha256(b'mine').hexdigest()}  thesis.pdf\n")
    for target in (str(folder), "hf://me/model"):
        hub.private, hub.files = True, {"README.md": b"# my own card\n", ".gitattributes": b""}
        refused = deepfloyd("publish", str(release.workspace), "1", target)
        assert "holds other files, and no publication of ours" in str(refused.exception), target
    assert in_folder(folder).keys() == {"thesis.pdf", "SHA256SUMS"} and len(hub.files) == 2
    hub.files = {".gitattributes": b""}
    assert deepfloyd("publish", str(release.workspace), "1", "hf://me/model").exit_code == 0


def test_a_folder_whose_publication_was_cut_is_gone_on_with(
    release: Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version(release, 1)
    version(release, 2, **{"stage1/pytorch_lora_weights.safetensors": b"w9" * 70_000})
    target, put = tmp_path / "published", FilePlace._put

    def cut(after: int) -> None:
        count = iter(range(after, -1, -1))

        def failing(self: FilePlace, one: Any) -> None:
            put(self, one)
            if next(count) == 0:
                raise KeyboardInterrupt

        monkeypatch.setattr(FilePlace, "_put", failing)

    cut(0)
    assert deepfloyd("publish", str(release.workspace), "1", str(target)).exit_code != 0
    monkeypatch.setattr(FilePlace, "_put", put)
    assert deepfloyd("publish", str(release.workspace), "1", str(target)).exit_code == 0
    cut(0)  # its one other file has just been written
    assert deepfloyd("publish", str(release.workspace), "2", str(target)).exit_code != 0
    assert (target / "stage1" / "pytorch_lora_weights.safetensors").read_bytes() == b"w9" * 70_000
    monkeypatch.setattr(FilePlace, "_put", put)
    assert "2 files, " in deepfloyd("publish", str(release.workspace), "1", str(target)).output
    assert in_folder(target) == shown(release, FILES), "not the weights of the other version"
    for name in ("SHA256SUMS", RECORD):  # as a kill in the middle of a write leaves them
        (target / f".tmp-host-123-{name}").write_bytes(b"half")
    assert deepfloyd("publish", str(release.workspace), "2", str(target)).exit_code == 0
    assert not list(target.glob(".tmp-*"))


def test_a_record_that_is_damaged_is_told_and_nothing_is_sent(release: Release, hub: Hub) -> None:
    version(release, 1)
    assert deepfloyd("publish", str(release.workspace), "1", "hf://me/model").exit_code == 0
    del hub.files[RECORD]
    hub.files[RECORD] = b"no record"
    assert "is damaged" in str(deepfloyd("publish", str(release.workspace), "1", "hf://me/model").exception)


def test_a_folder_on_a_disk_that_grows_page_by_page_gets_all_files_in_the_end(release: Release, tmp_path: Path) -> None:
    version(release, 1)
    with small_disk(tmp_path / "small", PAGE) as disk:
        target, pages, code = disk.folder / "published", 1, 1
        while code:
            pages += 3
            disk.resize(pages * PAGE)
            done = deepfloyd("publish", str(release.workspace), "1", str(target))
            code, said = done.exit_code, str(done.exception)
            assert code == 0 or (
                f"no space left on device (tmpfs at {disk.folder}, " in said and "Free some" in said
            ), said
        assert pages > 20 and in_folder(target) == shown(release, FILES)
