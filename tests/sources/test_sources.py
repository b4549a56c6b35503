"""Pictures from buckets, URLs, saved data sets and tar files: the same ledger and the same shards as from a folder."""

import hashlib
import http.client
import io
import os
import tarfile
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_world import DataWorld
from picture_site import Site, serving, serving_site, table_of_urls, whole
from PIL import Image
from s3_server import s3_server

from deepfloyd_core.config.data_sets import ImageDataset
from deepfloyd_core.config.run import Run
from deepfloyd_core.errors import ConfigError, DataError
from deepfloyd_core.index.identity import index_request
from deepfloyd_core.index.ledger import read_index
from deepfloyd_core.index.scan import scan
from deepfloyd_core.preflight.load import load_run
from deepfloyd_core.processes.pool import Children, Limits
from deepfloyd_core.sources import downloads
from deepfloyd_core.sources.source import SOURCES, open_source

SIZE = {"resolution": 64, "minimum_image_size": 64, "crop_style": "random"}


def picture(seed: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (80, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


PICTURES = {f"{number:02d}.png": picture(number) for number in range(12)} | {"broken.jpg": b"not a picture"}
CAPTIONS = {name: f"caption of {name}" for name in PICTURES}
Ledger = dict[str | None, tuple[Any, ...]]  # status, reason, bytes, width, captions
Pixels = set[tuple[str, bytes, str]]  # image_id, pixels, caption
FromFolder = tuple[Ledger, Pixels]


def ledger(world: DataWorld, run: Run) -> Ledger:
    """What an index says of each picture, by its bytes: names differ from source to source."""
    rows = read_index(world.index(run))
    return {row.image_id: (row.status, row.reason, row.bytes, row.width, tuple(row.captions)) for row in rows}


def pixels(world: DataWorld, run: Run) -> Pixels:
    made = world.pixels(run, world.index(run), 1)
    rows = [row for file in sorted(made.path.glob("*.parquet")) for row in pq.read_table(file).to_pylist()]
    return {(row["image_id"], row["pixels"], row["caption"]) for row in rows}


@pytest.fixture
def from_folder(world: DataWorld, tmp_path: Path) -> FromFolder:
    """The ledger and the pixels of the same pictures in a folder."""
    other = type(world)(tmp_path / "folder", world.children)
    (tmp_path / "folder" / "pictures").mkdir(parents=True)
    for name, data in PICTURES.items():
        other.add(name, data, CAPTIONS[name])
    run = other.load(SIZE, stages=(1,))
    return ledger(other, run), pixels(other, run)


@pytest.fixture(scope="module")
def children(s3: str) -> Iterator[Children]:
    """Processes of their own, because they find credentials in the environment that they were started with."""
    with Children(2, Limits(), ("deepfloyd_core.index.index",)) as children:
        yield children


# ---- S3: moto's server, and a proxy that spoils answers ----


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """A real S3 API on loopback."""
    with s3_server() as url:
        yield url


@pytest.fixture
def bucket(s3: str, request: pytest.FixtureRequest) -> Any:
    """A bucket of its own with the pictures below `set/`, by boto3."""
    import boto3

    name = "b" + hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:20]
    resource = boto3.resource("s3", endpoint_url=s3).create_bucket(Bucket=name)
    for number, (key, data) in enumerate(PICTURES.items()):
        folder = "set/" if number % 2 else "set/deeper/"
        resource.put_object(Key=folder + key, Body=data)
        resource.put_object(Key=(folder + key).rsplit(".", 1)[0] + ".txt", Body=CAPTIONS[key].encode())
    resource.put_object(Key="settle/other.png", Body=picture(99))  # begins like the prefix and is not below it
    resource.put_object(Key="set/.hidden.png", Body=picture(98))
    for name in ("clip.mov", "00.AAE", "@eaDir/00.png", "Thumbs.db", "LICENSE"):
        resource.put_object(Key=f"set/{name}", Body=b"no picture")
    return resource


def in_bucket(bucket: Any, endpoint: str) -> dict[str, Any]:
    return {
        "type": "aws", "aws_bucket_name": bucket.name, "aws_data_prefix": "set", "aws_endpoint_url": endpoint,
        "caption_strategy": "textfile", **SIZE,
    }  # fmt: skip


def test_a_bucket_gives_what_a_folder_gives(world: DataWorld, bucket: Any, s3: str, from_folder: FromFolder) -> None:
    run = world.load(in_bucket(bucket, s3), stages=(1,))
    assert (ledger(world, run), pixels(world, run)) == from_folder


def test_a_bucket_reads_names_as_a_folder_does(world: DataWorld, bucket: Any, s3: str) -> None:
    for key, text in {"00.TXT": "from capitals", "new.png.txt": "x.png.txt", "IMG_7.caption": "caption file"}.items():
        bucket.put_object(Key=f"set/names/{key}", Body=text.encode("utf-16"))
    for number, key in enumerate(("00.png", "new.png", "IMG_7"), 100):
        bucket.put_object(Key=f"set/names/{key}", Body=picture(number))
    index = world.index(world.load(in_bucket(bucket, s3), stages=(1,)))
    captions = {row.source: row.captions for row in read_index(index) if row.source.startswith("names/")}
    assert captions == {
        "names/00.png": ["from capitals"], "names/new.png": ["x.png.txt"], "names/IMG_7": ["caption file"],
    }  # fmt: skip
    assert index.manifest.summary["other_files"] == {".mov": 1, ".aae": 1, "@eaDir/": 1, ".db": 1, "no extension": 1}
    assert index.manifest.summary["inputs"] == len(PICTURES) + 3


def test_what_a_controlnet_follows_can_be_in_a_bucket(world: DataWorld, bucket: Any, s3: str) -> None:
    """Its pictures beside themselves: the same crops of the same bytes."""
    place = in_bucket(bucket, s3)
    pairs = {**{key: value for key, value in place.items() if key.startswith("aws_")}, "id": "b", "type": "aws"}
    follows = {"model_flavour": "tiny-i", "controlnet": True, "controlnet_conditioning": "paired"}
    run = world.load(
        {**place, "conditioning_data": "b"}, {**pairs, "dataset_type": "conditioning"}, stages=(1,), stage1=follows
    )
    index = world.index(run)
    made = world.pixels(run, index, 1)
    one, other = (
        [row["pixels"] for file in sorted(made.path.glob("*.parquet")) for row in pq.read_table(file).to_pylist()]
        for made in (made, world.conditioning(run, index, made))
    )
    assert len(one) == 12 and one == other


def test_only_changed_and_new_objects_are_read_again(
    world: DataWorld, bucket: Any, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = world.load(in_bucket(bucket, s3), stages=(1,))
    first = scan(run)
    source, read = open_source(run.datasets[0]), list[str]()
    real = source.pieces

    def recorded(name: str) -> Iterator[bytes]:
        read.append(name)
        return real(name)

    monkeypatch.setattr(source, "pieces", recorded)
    assert scan(run).equals(first)
    assert read == []
    bucket.put_object(Key="set/01.png", Body=picture(50))
    bucket.put_object(Key="set/new.png", Body=picture(51))
    bucket.put_object(Key="set/03.txt", Body=b"another caption")
    bucket.Object("set/05.png").delete()
    rows = {row["source"]: row for row in scan(run).to_pylist()}
    assert sorted(read) == ["01.png", "new.png"]
    assert rows["01.png"]["sha256"] == hashlib.sha256(picture(50)).hexdigest()
    assert rows["03.png"]["captions"] == ["another caption"]
    assert rows["new.png"]["captions"] is None
    assert "05.png" not in rows


class _Proxy(BaseHTTPRequestHandler):
    """Forwards to a server, and spoils the first answers to each request: 503, a cut body, then the truth."""

    target = ""
    seen: ClassVar[dict[str, int]] = {}
    spoilt = 0

    def do_GET(self) -> None:
        connection = http.client.HTTPConnection(self.target, timeout=30)
        connection.request(self.command, self.path, headers=dict(self.headers))
        answer = connection.getresponse()
        data = answer.read()
        times = self.seen[self.path] = self.seen.get(self.path, 0) + (self.command == "GET")
        picked = (
            self.command == "GET"
            and "list-type" not in self.path
            and int(hashlib.sha256(self.path.encode()).hexdigest(), 16) % 2 == 0
        )
        if picked and times == 1:
            type(self).spoilt += 1
            self.send_error(503)
            return
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "date", "server"):
                self.send_header(name, value)
        self.end_headers()
        if picked and times == 2:
            type(self).spoilt += 1
            data = data[: len(data) // 2]
            self.close_connection = True
        self.wfile.write(data)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.slow
def test_refused_and_cut_answers_are_asked_for_again(
    world: DataWorld, bucket: Any, s3: str, from_folder: FromFolder
) -> None:
    _Proxy.target, _Proxy.seen, _Proxy.spoilt = s3.removeprefix("http://"), {}, 0
    with serving(_Proxy) as endpoint:
        run = world.load(in_bucket(bucket, endpoint), stages=(1,))
        assert ledger(world, run) == from_folder[0]
    assert _Proxy.spoilt > 8


def test_a_bucket_that_is_not_there_is_one_clear_error(world: DataWorld, s3: str) -> None:
    entry = {"type": "aws", "aws_bucket_name": "nowhere", "aws_endpoint_url": s3, "caption_strategy": "textfile"}
    with pytest.raises(DataError, match=r"s3://nowhere cannot be listed.*|There is no picture in s3://nowhere"):
        scan(world.load(entry))


def test_credentials_of_the_data_file_reach_no_artifact_and_no_note(world: DataWorld, bucket: Any, s3: str) -> None:
    keys = {"aws_access_key_id": "KEY-IN-THE-FILE", "aws_secret_access_key": "SECRET-IN-THE-FILE"}
    run = world.load(in_bucket(bucket, s3) | keys, stages=(1,))
    pixels(world, run)
    assert "IN-THE-FILE" not in repr(run) + str(run)
    for path in (world.folder / "workspace").rglob("*"):
        assert path.is_dir() or b"IN-THE-FILE" not in path.read_bytes(), path


# ---- URLs: a server with slow, short, wrong and missing answers ----


@pytest.fixture
def site() -> Iterator[Site]:
    with serving_site() as site:
        yield site


def test_a_table_of_urls_gives_what_a_folder_gives_and_is_downloaded_once(
    world: DataWorld, site: Site, from_folder: FromFolder
) -> None:
    site.answers = {f"/{name}?w=1": whole(data) for name, data in PICTURES.items()}
    entry = table_of_urls(world.folder, [(f"{site.url}/{name}?w=1", CAPTIONS[name]) for name in PICTURES])
    run = world.load(entry, stages=(1,))
    assert (ledger(world, run), pixels(world, run)) == from_folder
    assert set(site.asked.values()) == {1}
    again = world.load(entry, stages=(1,), workspace=str(world.folder / "another"))
    assert ledger(world, again) == from_folder[0]
    assert set(site.asked.values()) == {1}


@pytest.mark.parametrize(
    ("key", "says"), [(None, f"deepfloyd-pipeline/{version('deepfloyd-pipeline')}"), ("me@x.org", "me@x.org")]
)
def test_downloads_say_whose_they_are_and_the_ledger_what_was_answered(
    world: DataWorld, site: Site, key: str | None, says: str
) -> None:
    agents: list[str] = []

    def answer(handler: BaseHTTPRequestHandler) -> None:
        agents.append(handler.headers["User-Agent"])
        whole(picture(1))(handler)

    site.answers = {"/good": answer, "/shut": whole(b"", 403)}
    entry = table_of_urls(world.folder, [(f"{site.url}/{name}", "x") for name in ("good", "shut", "gone")])
    entry |= {"csv_user_agent": key} if key else {}
    rows = {row.source: row for row in read_index(world.index(world.load(entry, stages=(1,), max_rejected_share=1.0)))}
    assert agents == [says]
    details = {name: rows[f"{site.url}/{name}"].detail for name in ("good", "shut", "gone")}
    assert details == {
        "good": None, "shut": f"{site.url}/shut: HTTP 403 Forbidden", "gone": f"{site.url}/gone: HTTP 404 Not Found",
    }  # fmt: skip


def test_another_failure_of_a_download_is_not_another_data_set(world: DataWorld, site: Site) -> None:
    site.answers = {"/good": whole(picture(1)), "/shut": whole(b"", 403)}
    run = world.load(
        table_of_urls(world.folder, [(f"{site.url}/{name}", "x") for name in ("good", "shut")]), stages=(1,)
    )
    first = index_request(run, scan(run)).fingerprint
    site.answers["/shut"] = whole(b"", 410)
    assert index_request(run, scan(run)).fingerprint == first


@pytest.mark.parametrize("agent", ["", "two\nlines", "Füchse"])
def test_an_agent_that_no_header_can_hold_is_refused(world: DataWorld, agent: str) -> None:
    with pytest.raises(ConfigError, match="csv_user_agent"):
        world.load(table_of_urls(world.folder, [("http://x/y", "x")]) | {"csv_user_agent": agent})


def test_a_parquet_table_of_urls_with_lists_of_captions(world: DataWorld, site: Site) -> None:
    site.answers = {"/a": whole(picture(1)), "/b": whole(picture(2))}
    table = pa.table(
        {"link": [f"{site.url}/a", f"{site.url}/b", f"{site.url}/a", None], "say": [["x", "y"], ["z"], ["w"], ["v"]]}
    )
    pq.write_table(table, world.folder / "table.parquet")
    entry = table_of_urls(world.folder, []) | {
        "type": "parquet", "caption_strategy": "parquet", "csv_file": str(world.folder / "table.parquet"),
        "csv_url_column": "link", "csv_caption_column": "say",
    }  # fmt: skip
    rows = {row.source: row.captions for row in read_index(world.index(world.load(entry, stages=(1,))))}
    assert rows == {f"{site.url}/a": ["x", "y", "w"], f"{site.url}/b": ["z"]}


def test_bad_answers_are_rows_of_the_ledger_and_what_heals_is_asked_again(
    world: DataWorld, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloads, "WHOLE_S", 1.0)
    monkeypatch.setattr(downloads, "MAX_BYTES", 1 << 20)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    good = picture(1)

    def healing(handler: BaseHTTPRequestHandler) -> None:
        times = site.asked["/heals"]
        (whole(b"", 503, Retry_After="1") if times == 1 else whole(good, content_length="99999") if times == 2
         else whole(good))(handler)  # fmt: skip
        handler.close_connection = True

    def endless(handler: BaseHTTPRequestHandler) -> None:
        whole(b"", content_length=str(1 << 30))(handler)
        with_pause = range(200)
        try:
            for _ in with_pause:
                handler.wfile.write(b"x")
                time.sleep(0.05)
        except OSError:
            return

    site.answers = {
        "/good": whole(good), "/heals": healing, "/cut": whole(good, content_length="99999"), "/slow": endless,
        "/large": whole(bytes(2 << 20)), "/500": whole(b"", 500), "/loop": whole(b"", 302, Location="/loop"),
        "/moved": whole(b"", 302, Location="/good"), "/page": whole(b"<html>gone</html>"), "/empty": whole(b""),
        "/out": whole(b"", 302, Location="file:///etc/passwd"),
    }  # fmt: skip
    cut = site.answers["/cut"]

    def cut_off(handler: BaseHTTPRequestHandler) -> None:
        cut(handler)
        handler.close_connection = True

    site.answers["/cut"] = cut_off
    names = [*site.answers, "/404"]
    rows = [(site.url + name, "a caption") for name in names]
    rows += [("file:///etc/passwd", "a file"), ("http://127.0.0.1:9/x", "nobody"), ("http://[::", "no address")]
    monkeypatch.setattr(time, "sleep", lambda _: None)
    found = {row.source.removeprefix(site.url): row.reason for row in read_index(world.index(world.load(
        table_of_urls(world.folder, rows), stages=(1,), max_rejected_share=1.0)))}  # fmt: skip
    lost = {"/cut", "/slow", "/large", "/500", "/loop", "/404", "/out", "http://127.0.0.1:9/x", "http://[::"}
    expected = dict.fromkeys(lost, "download_failed") | {"/good": None, "/heals": None, "/moved": None}
    expected |= {"/page": "unsupported", "/empty": "unsupported", "file:///etc/passwd": "not_a_url"}
    assert found == expected
    assert {name: site.asked[name] for name in ("/heals", "/cut", "/500", "/404")} == {
        "/heals": 3, "/cut": 3, "/500": 3, "/404": 1,
    }  # fmt: skip


# ---- data sets that were saved, and tar files ----


def test_a_saved_data_set_gives_what_a_folder_gives(world: DataWorld, from_folder: FromFolder) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed: make test-extras")
    captions = list(CAPTIONS.values())
    rows: dict[str, list[Any]] = {
        "image": [{"bytes": data, "path": None} for data in PICTURES.values()],
        "caption": captions,
    }
    rows["number"] = list(range(len(PICTURES)))
    rows["other"] = [None if place % 2 else text for place, text in enumerate(captions)]
    features = datasets.Features(
        image=datasets.Image(), caption=datasets.Value("string"), number=datasets.Value("int64"),
        other=datasets.Value("string"),
    )  # fmt: skip
    made = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"train": made, "test": made.select([0])}).save_to_disk(str(world.folder / "saved"))
    entry = {"type": "huggingface", "dataset_name": str(world.folder / "saved"), "caption_strategy": "huggingface"}
    run = world.load(entry | SIZE, stages=(1,))
    assert (ledger(world, run), pixels(world, run)) == from_folder
    first = scan(run)
    assert scan(run).equals(first), "sizes and hashes come from the notes"
    assert len(scan(world.load(entry | SIZE | {"split": "test"}, stages=(1,)))) == 1
    block = {"huggingface": {"caption_column": "other", "fallback_caption_column": "caption"}}
    assert ledger(world, world.load(entry | SIZE | block, stages=(1,))) == from_folder[0]
    for keys, says in (({"split": "no"}, "split is 'no'"), ({"image_column": "no"}, "no column 'no'"),
                       ({"image_column": "number"}, "does not hold pictures")):  # fmt: skip
        with pytest.raises(ConfigError, match=says):
            world.load(entry | SIZE | keys)


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def in_tars(folder: Path) -> None:
    for start in (0, 5, 10):
        chosen = list(PICTURES)[start : start + 5]
        texts = {name.rsplit(".", 1)[0] + ".txt": CAPTIONS[name].encode() for name in chosen}
        write_tar(folder / f"{start:05d}.tar", {name: PICTURES[name] for name in chosen} | texts)


def test_tar_files_give_what_a_folder_gives(world: DataWorld, from_folder: FromFolder) -> None:
    in_tars(world.folder / "tars")
    run = world.load(
        {"type": "webdataset", "instance_data_dir": str(world.folder / "tars"), "caption_strategy": "textfile"} | SIZE,
        stages=(1,),
    )
    assert (ledger(world, run), pixels(world, run)) == from_folder


def test_tar_files_in_a_bucket(world: DataWorld, bucket: Any, s3: str, from_folder: FromFolder) -> None:
    in_tars(world.folder / "tars")
    for tar in (world.folder / "tars").iterdir():
        bucket.upload_file(str(tar), f"tars/{tar.name}")
    entry = {"type": "webdataset", "instance_data_dir": f"s3://{bucket.name}/tars", "aws_endpoint_url": s3}
    run = world.load(entry | {"caption_strategy": "textfile"} | SIZE, stages=(1,))
    assert ledger(world, run) == from_folder[0]


def test_odd_tar_files_cost_their_own_rows(world: DataWorld) -> None:
    folder = world.folder / "tars"
    in_tars(folder)
    whole_tar = (folder / "00000.tar").read_bytes()
    (folder / "cut.tar").write_bytes(whole_tar[:700])
    (folder / "noise.tar").write_bytes(os.urandom(5000))
    (folder / "small.tar.gz").write_bytes(b"x")
    (folder / "notes.md").write_text("not a tar")
    with tarfile.open(folder / "others.tar", "w") as tar:
        for name in ("clip.mov", "00.cls", "@eaDir/00.png", "00.json"):
            tar.addfile(tarfile.TarInfo(name))
    with tarfile.open(folder / "links.tar", "w") as tar:
        link = tarfile.TarInfo("a.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    entry = {"type": "webdataset", "instance_data_dir": str(folder), "caption_strategy": "textfile"} | SIZE
    index = world.index(world.load(entry, stages=(1,), max_rejected_share=0.5))
    rows = read_index(index)
    assert index.manifest.summary["other_files"] == {".mov": 1, ".cls": 1, "@eaDir/": 1}
    odd = {row.source: row.reason for row in rows if not row.source.startswith("0")}
    assert odd == {"noise.tar": "unreadable", "small.tar.gz": "unsupported", "cut.tar": "unreadable"} or odd == {
        "noise.tar": "unreadable", "small.tar.gz": "unsupported", "cut.tar/00.png": "unreadable",
    }  # fmt: skip
    assert sum(row.status == "accepted" for row in rows) == 12


def test_every_type_that_a_data_file_may_name_has_a_source() -> None:
    assert set(get_args(ImageDataset.model_fields["type"].annotation)) == SOURCES.keys()


def test_a_package_that_is_missing_is_named_with_its_command(world: DataWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    def absent(url: str, **_: object) -> None:
        raise ImportError("Install s3fs to access S3")

    open_source.cache_clear()
    monkeypatch.setattr(fsspec.core, "url_to_fs", absent)
    with pytest.raises(ConfigError, match=r"pip install 'deepfloyd-pipeline\[s3\]'"):
        world.load({"type": "aws", "aws_bucket_name": "b", "caption_strategy": "textfile"})


def test_sources_can_be_mixed_in_one_run(world: DataWorld, bucket: Any, s3: str) -> None:
    world.add("here.png", picture(70), "here")
    run = world.load({"id": "folder", **SIZE}, {"id": "bucket", **in_bucket(bucket, s3)}, stages=(1,))
    rows = read_index(world.index(run))
    assert {row.dataset_id for row in rows if row.status == "accepted"} == {"folder", "bucket"}
    assert load_run(world.folder / "run.json").datasets == run.datasets
