"""Downloads from hostile tables and servers: each costs its own row of the ledger, and nothing else."""

import gzip
import io
import json
import socket
import time
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_world import DataWorld
from picture_site import Answer, Site, serving_site, table_of_urls, whole
from PIL import Image
from small_disk import PAGE, small_disk
from traced import traced_peak

from deepfloyd_core.errors import StorageError
from deepfloyd_core.index.scan import scan
from deepfloyd_core.sources import downloads

MIB = 1 << 20


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    with serving_site() as site:
        yield site


@pytest.fixture(scope="module")
def good() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (80, 90, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def listed(world: DataWorld, entry: dict[str, Any]) -> dict[str, tuple[str | None, str | None]]:
    """The reason and the detail of each URL."""
    rows = scan(world.load(entry, stages=(1,))).to_pylist()
    return {row["source"]: (row["reason"], row["detail"]) for row in rows}


def packed_twice(blocks: int) -> bytes:
    """So many blocks of 1 MiB of zeros in two layers of gzip."""
    outer = zlib.compressobj(9, wbits=31)
    inner = zlib.compressobj(9, wbits=31)
    made = b"".join(outer.compress(inner.compress(bytes(MIB))) for _ in range(blocks))
    return made + outer.compress(inner.flush()) + outer.flush()


def test_a_body_is_inflated_within_the_limit(
    world: DataWorld, site: Site, good: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloads, "MAX_BYTES", 4 * MIB)
    bomb, deflated = packed_twice(96), zlib.compress(good)
    assert len(bomb) < 16 << 10
    site.answers = {
        "/bomb": whole(bomb, Content_Encoding="gzip, gzip"),
        "/once": whole(gzip.compress(good), Content_Encoding="gzip"),
        "/twice": whole(gzip.compress(gzip.compress(good)), Content_Encoding="gzip, identity, X-GZIP"),
        "/deflate": whole(deflated, Content_Encoding="deflate"), "/raw": whole(deflated[2:-4], Content_Encoding="deflate"),
        "/cut": whole(gzip.compress(good)[:-9], Content_Encoding="gzip"),
        "/no": whole(good, Content_Encoding="gzip"), "/br": whole(good, Content_Encoding="br"),
        "/deep": whole(good, Content_Encoding=",".join(["gzip"] * 9)), "/empty": whole(b"", Content_Encoding="gzip"),
    }  # fmt: skip
    run = world.load(table_of_urls(world.folder, [(site.url + name, "x") for name in site.answers]), stages=(1,))
    with traced_peak() as peak:
        found = scan(run).to_pylist()
    assert peak[0] < 32 * MIB
    details = {row["source"].removeprefix(site.url): row["detail"] for row in found if row["reason"]}
    assert {name: str(detail).partition(": ")[2] for name, detail in details.items()} == {
        "/bomb": "more than 4 MiB", "/cut": "its gzip body is cut off",
        "/no": "its gzip body is damaged (Error -3 while decompressing data: incorrect header check)",
        "/br": "its Content-Encoding is none that was asked for (gzip, deflate)",
        "/deep": "its Content-Encoding is none that was asked for (gzip, deflate)",
    }  # fmt: skip
    same = {row["sha256"] for row in found if row["source"].endswith(("/once", "/twice", "/deflate", "/raw"))}
    assert len(same) == 1 and (world.folder / "downloads").is_dir()
    assert not list((world.folder / "downloads").rglob(".tmp-*"))


def test_hostile_headers_and_urls_cost_their_own_rows(world: DataWorld, site: Site, good: bytes) -> None:
    def busy(asked: str) -> Answer:
        def answer(handler: BaseHTTPRequestHandler) -> None:
            (whole(b"", 503, Retry_After=asked) if site.asked[handler.path] == 1 else whole(good))(handler)

        return answer

    waits = ("\u00b2", "-1", "1e9", "9" * 400, "Fri, 31 Dec 1999 23:59:59 GMT")
    site.answers = {f"/busy{number}": busy(asked) for number, asked in enumerate(waits)}
    site.answers |= {
        "/cookie": whole(good, Set_Cookie="a=b; Domain=; Path=/; expires=x"),
        **{f"/to{number}": whole(b"", 302, Location=place) for number, place in enumerate(
            ("http://", "http://x:99999999/", "http://[::1", "//", "ftp://x/", "http://\u00b2\u00b2.\u00b2:8/"))},
    }  # fmt: skip
    odd = ["http://", "https://", "http:///x", "http://:80/", "http://x:99999/", "http://x:-1/", "http://[/", "http://%00/",
           "http://a\x01b/", f"http://{'a' * 64}.invalid/", f"http://x.invalid/{'a' * 70000}", "http://xn--\u00b2/",
           "http://.../", "http://x:8a/", "http://user:@@/", "http://\u2100.invalid/"]  # fmt: skip
    lines = [json.dumps({"url": url, "caption": "x"}) for url in (*[site.url + name for name in site.answers], *odd)]
    lines.append('{"url": "http://127.0.0.1:9/\\ud800", "caption": "x"}')
    table = world.folder / "table.jsonl"
    table.write_text("\n".join(lines), encoding="utf-8")
    found = listed(world, table_of_urls(world.folder, [], csv_file=str(table)))
    fine = {site.url + name for name in site.answers if not name.startswith("/to")}
    assert {url for url, (reason, _) in found.items() if reason is None} == fine
    assert {reason for url, (reason, _) in found.items() if url not in fine} == {"download_failed"}
    assert len(found) == len(lines)


def test_a_cookie_is_sent_to_nobody(world: DataWorld, site: Site, good: bytes) -> None:
    sent: list[str | None] = []

    def answer(handler: BaseHTTPRequestHandler) -> None:
        sent.append(handler.headers["Cookie"])
        whole(good, Set_Cookie="a=b; Path=/")(handler)

    site.answers = {"/1": answer, "/2": answer}
    listed(world, table_of_urls(world.folder, [(site.url + name, "x") for name in site.answers]))
    assert sent == [None, None]


def test_addresses_that_are_not_public_are_refused_unless_allowed(
    world: DataWorld, site: Site, good: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By themselves, in other spellings, and behind a name. Nothing is sent to them."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    real = socket.getaddrinfo

    def look_up(host: Any, *rest: Any, **keys: Any) -> Any:
        return real("127.0.0.1" if host == "pictures.example" else host, *rest, **keys)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    port = site.url.rpartition(":")[2]
    site.answers = {"/x": whole(good)}
    hosts = ("127.0.0.1", "localhost", "127.1", "2130706433", "0", "[::ffff:127.0.0.1]", "pictures.example")
    rows = [(f"http://{host}:{port}/x", "x") for host in hosts]
    rows += [(f"http://{host}/x", "x") for host in ("10.0.0.1", "169.254.169.254", "[fe80::1]", "[::1]", "224.0.0.1")]
    found = listed(world, table_of_urls(world.folder, rows, csv_private_addresses=False))
    assert len(found) == len(rows) and not site.asked
    for url, (reason, detail) in found.items():
        assert reason == "download_failed" and "is no public address; csv_private_addresses = true" in str(detail), url
    found = listed(world, table_of_urls(world.folder, rows[:1]))
    assert found[rows[0][0]] == (None, None) and site.asked == {"/x": 1}


def test_a_redirect_to_a_private_address_is_refused(
    world: DataWorld, site: Site, good: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first server counts as public here: only what it leads to is refused."""
    port = site.url.rpartition(":")[2]
    site.answers = {"/start": whole(b"", 302, Location=f"http://127.0.0.2:{port}/secret"), "/secret": whole(good)}
    real = downloads._check_address
    monkeypatch.setattr(downloads, "_check_address", lambda host: None if host == "127.0.0.1" else real(host))
    found = listed(world, table_of_urls(world.folder, [(f"{site.url}/start", "x")], csv_private_addresses=False))
    assert found[f"{site.url}/start"][0] == "download_failed" and site.asked == {"/start": 1}


def test_an_unfinished_download_leaves_no_file(tmp_path: Path, site: Site) -> None:
    site.answers = {"/cut": whole(b"12345", content_length="99")}
    with pytest.raises(OSError, match=f"{site.url}/cut"):
        downloads.download(downloads.download_client("x", private=True), f"{site.url}/cut", tmp_path / "kept")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_ends_the_run_and_rejects_no_picture(world: DataWorld, site: Site, good: bytes) -> None:
    site.answers = {"/a": whole(good), "/b": whole(good)}
    with small_disk(world.folder / "downloads", 6 * PAGE) as disk:
        entry = table_of_urls(world.folder, [(f"{site.url}/a", "x"), (f"{site.url}/b", "x")])
        with pytest.raises(StorageError, match=rf"^{disk.folder}/.* cannot be written: no space left .* free\)\. Free"):
            listed(world, entry)
        disk.resize(MIB)
        assert listed(world, entry) == {f"{site.url}/{name}": (None, None) for name in "ab"}
