"""A hub of models on loopback: the part of its API that tells what a repository holds, and who may read it."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from time import time
from typing import Any

TOKEN = "hf_token-of-a-test"


@dataclass
class ModelHub:
    """Its repositories, each with the sizes of its files."""

    url: str = ""
    repos: dict[str, dict[str, int]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)  # whose files nobody may read
    ahead_s: float = 0.0  # its clock
    downloads: list[str] = field(default_factory=list)  # paths of files that were asked for


class _Server(ThreadingHTTPServer):
    def __init__(self, hub: ModelHub) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub = hub


class _Handler(BaseHTTPRequestHandler):
    @property
    def hub(self) -> ModelHub:
        server = self.server
        assert isinstance(server, _Server)
        return server.hub

    def log_message(self, *_: Any) -> None:
        """Nothing."""

    def date_time_string(self, timestamp: float | None = None) -> str:
        """The Date of an answer."""
        return formatdate(time() + self.hub.ahead_s, usegmt=True)

    def answer(self, code: int, body: object, **headers: str) -> None:
        data = json.dumps(body).encode()
        self.send_response(code)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].strip("/")
        repo = path.removeprefix("api/models/").removesuffix("/auth-check")
        if path == "":
            self.answer(200, {})
        elif path == "api/whoami-v2":
            known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            self.answer(200 if known else 401, {"name": "alice"} if known else {"error": "Invalid"})
        elif "/resolve/" in path:
            self.hub.downloads.append(path)
            self.answer(404, {"error": "no"})
        elif repo not in self.hub.repos:
            self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        elif path.endswith("/auth-check"):
            code = 403 if repo in self.hub.gated else 200
            self.answer(code, {}, **({"X_Error_Code": "GatedRepo"} if code == 403 else {}))
        else:
            files = [{"rfilename": name, "size": size} for name, size in self.hub.repos[repo].items()]
            self.answer(200, {"id": repo, "sha": "0" * 40, "private": False, "siblings": files})

    do_HEAD = do_GET


@contextmanager
def hub_of_models() -> Iterator[ModelHub]:
    """One that runs, empty."""
    hub = ModelHub()
    server = _Server(hub)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
