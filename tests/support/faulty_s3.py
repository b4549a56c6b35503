"""A proxy before an S3 server that is as bad as one on a bad day: 503s, answers that are cut, answers that are lost."""

import http.client
import random
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler

from picture_site import serving

REFUSED, CUT, LOST = 0.05, 0.01, 0.01  # of all requests
_LEFT_OUT = ("transfer-encoding", "connection", "date", "server", "content-length")


@contextmanager
def faulty_s3(url: str, seed: int = 1, worse: int = 1) -> Iterator[tuple[str, Counter[str]]]:
    """Its address, and how often it did what. url: of the server; worse: so many times as often."""
    refused, cut, lost = (worse * share for share in (REFUSED, CUT, LOST))
    done, lock, chance = Counter[str](), threading.Lock(), random.Random(seed)

    class Proxy(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            with lock:
                draw = chance.random()
                shares = {"refused": refused, "cut": refused + cut, "lost": refused + cut + lost}
                fault = next((name for name, share in shares.items() if draw < share), "")
                done[fault or "passed"] += 1
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if fault == "refused":
                self._answer(503, [], b"")
                return
            connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=30)
            connection.request(self.command, self.path, body, dict(self.headers))
            answer = connection.getresponse()
            data = answer.read()
            connection.close()
            self.close_connection = bool(fault)
            if fault != "lost":
                self._answer(answer.status, answer.getheaders(), data, answer.getheader("Content-Length"), fault)

        def _answer(
            self, status: int, headers: list[tuple[str, str]], data: bytes, size: str | None = None, fault: str = ""
        ) -> None:
            self.send_response(status)
            for name, value in headers:
                if name.lower() not in _LEFT_OUT:
                    self.send_header(name, value)
            self.send_header("Content-Length", size if size and self.command == "HEAD" else str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2] if fault == "cut" else data)

        do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

        def log_message(self, *_: object) -> None:
            """Nothing."""

    with serving(Proxy) as address:
        yield address, done
