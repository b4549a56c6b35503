"""Damaged answers of HTTP servers: a download is whole, or one OSError that names its URL, and leaves nothing behind.

What is downloaded is what the standard library's client reads from the same answer, where it reads one.
"""

import gzip
import http.client
import io
import shutil
import socket
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mutations import damaged, damaged_text, one_of
from trials import Target, Trial

from deepfloyd_core.sources.downloads import download, download_client

_BODY = bytes(range(256)) * 12
_MOST = 64 << 20  # bytes: nothing here inflates to more


def _answer(body: bytes, *headers: str, status: str = "200 OK", length: bool = True) -> bytes:
    lines = [f"HTTP/1.1 {status}", *headers, *([f"Content-Length: {len(body)}"] if length else []), "", ""]
    return "\r\n".join(lines).encode("latin-1") + body


def _chunked(body: bytes, size: int) -> bytes:
    parts = [body[start : start + size] for start in range(0, len(body), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


def _answers() -> list[bytes]:
    packed, chunked = gzip.compress(_BODY), "Transfer-Encoding: chunked"
    cookie = "Set-Cookie: a=b; Domain=x; expires=Fri, 31 Dec 1999 23:59:59 GMT"
    partial = "Content-Type: image/png; charset=x", 'ETag: "1"', "Content-Range: bytes 0-699/700"
    return [
        _answer(_BODY),
        _answer(packed, "Content-Encoding: gzip"),
        _answer(zlib.compress(_BODY), "Content-Encoding: deflate"),
        _answer(gzip.compress(packed), "Content-Encoding: gzip, x-gzip"),
        _answer(_BODY, "Connection: close", length=False),
        _answer(_chunked(_BODY, 700), chunked, length=False),
        _answer(_chunked(packed, 99), chunked, "Content-Encoding: gzip", length=False),
        _answer(b"", "Location: /other", cookie, status="302 Found"),
        _answer(b"busy", "Retry-After: 3", status="503 Service Unavailable"),
        _answer(b"", status="304 Not Modified", length=False),
        _answer(_BODY[:700], *partial, status="206 Partial"),
        b"HTTP/1.1 100 Continue\r\n\r\n" + _answer(_BODY),
        b"HTTP/1.0 200 OK\r\n\r\n" + _BODY,
    ]


class _Server:
    """Sends the same bytes to whoever connects, and closes."""

    def __init__(self) -> None:
        self.answer = b""
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}/picture"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            connection, _ = self._listening.accept()
            with connection:
                try:
                    connection.recv(1 << 16)
                    connection.sendall(self.answer)
                    connection.shutdown(socket.SHUT_WR)
                    connection.settimeout(1)
                    while connection.recv(1 << 16):
                        pass
                except OSError:
                    pass


@contextmanager
def _served(folder: Path) -> Iterator[Trial]:
    server, client, file = _Server(), download_client("x", private=True), folder / "kept"
    sleep, time.sleep = time.sleep, lambda seconds: None

    def trial(data: bytes) -> str:
        server.answer = data
        try:
            download(client, server.url, file)
        except OSError as error:
            assert server.url in str(error) and len(str(error)) < 100_000, str(error)[:300]
            assert not list(folder.iterdir()), "something is left of a download that failed"
            return "refused"
        found = file.read_bytes()
        file.unlink()
        assert len(found) < _MOST
        said = _by_the_standard_library(data)
        assert said is None or found == said, "other bytes than by the standard library's client"
        return "accepted"

    yield trial
    time.sleep = sleep
    shutil.rmtree(folder)


class _Bytes:
    """A socket that has these bytes."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def makefile(self, *_: Any, **__: Any) -> io.BytesIO:
        return io.BytesIO(self._data)


def _by_the_standard_library(data: bytes) -> bytes | None:
    """The body of an answer of status 200. None: it is none that this client reads, or one that is packed."""
    answer = http.client.HTTPResponse(_Bytes(data), method="GET")  # type: ignore[arg-type]
    try:
        answer.begin()
        if answer.status != 200 or answer.headers.get("Content-Encoding"):
            return None
        return answer.read()
    except (http.client.HTTPException, ValueError):
        return None


_LINES = (
    "Content-Encoding: gzip", "Content-Encoding: gzip, gzip, deflate", "Content-Encoding: identity, br", "Content-Length: 5",
    "Content-Length: -1", "Transfer-Encoding: chunked", "Location: http://[::1", "Location: //x:99999999/",
    "Location: /picture", "Location: http://\u00b2\u00b2.\u00b2:8/", "Retry-After: \u00b2", "Set-Cookie: \x01=;;;Domain=.",
    "HTTP/1.1 200 OK", "Connection: upgrade\r\nUpgrade: h2c", "", "\r\n", "0\r\n", "ffffffffff",
)  # fmt: skip
_text = damaged_text((*(f"{line}\r\n" for line in _LINES), "301", "302", "307", "429", "503", "200", "204"))
TARGETS = (Target("answers of HTTP servers", _answers, one_of(damaged, _text, _text), _served),)
