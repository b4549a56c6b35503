"""An HTTP server on loopback that answers as a test says, and data sets whose pictures are there."""

import csv
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

Answer = Callable[[BaseHTTPRequestHandler], None]


@dataclass
class Site:
    """What a server answers, and how often each path was asked for."""

    answers: dict[str, Answer] = field(default_factory=dict)
    asked: dict[str, int] = field(default_factory=dict)
    url: str = ""


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """A server; yields its URL."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def serving_site() -> Iterator[Site]:
    """A site, without answers yet."""
    site = Site()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            site.asked[self.path] = site.asked.get(self.path, 0) + 1
            site.answers.get(self.path, whole(b"", 404))(self)

        def log_message(self, *_: object) -> None:
            pass

    with serving(Handler) as site.url:
        yield site


def whole(data: bytes, status: int = 200, **headers: str) -> Answer:
    """An answer with these bytes and headers."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        if "content_length" not in headers:
            handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    return answer


def table_of_urls(folder: Path, rows: list[tuple[str, str]], **keys: Any) -> dict[str, Any]:
    """The entry of a table of (URL, caption), which may be on this machine; the table is written into the folder."""
    with (folder / "table.csv").open("w", newline="", encoding="utf-8") as handle:
        csv.writer(handle).writerows([("url", "caption"), *rows])
    where = {"csv_file": str(folder / "table.csv"), "csv_cache_dir": str(folder / "downloads")}
    sizes = {"resolution": 64, "minimum_image_size": 64, "crop_style": "random"}
    return {"type": "csv", "caption_strategy": "csv", "csv_private_addresses": True, **where, **sizes, **keys}
