"""A Hub of models on loopback: the part of its API by which `huggingface_hub` makes repositories and commits files."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from typing import Any

import pytest

TOKEN = "hf_token-of-a-test"
LARGE = ".safetensors", ".parquet", ".png"  # are stored by their sha256


@dataclass
class Hub:
    """Its state, and the faults that it is to have."""

    url: str = ""
    private: bool | None = None  # of its one repository; None: there is none
    files: dict[str, bytes] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)  # large files by sha256, also without a commit
    commits: list[str] = field(default_factory=list)
    uploads: list[str] = field(default_factory=list)
    refuse: int = 0  # how many of the next requests are answered with 503
    cut: int = 0  # how many of the next uploads end in the middle

    def entry(self, name: str) -> dict[str, Any]:
        """A file as the API lists it."""
        data = self.files[name]
        found = {"type": "file", "path": name, "size": len(data), "oid": _git_oid(data)}
        if name.endswith(LARGE):
            found["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        return found

    def commit(self, lines: list[dict[str, Any]]) -> None:
        """Do what a commit says."""
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.commits.append(value["summary"])
            elif line["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.files[value["path"]] = self.stored[value["oid"]]
            elif line["key"] == "deletedFile":
                del self.files[value["path"]]


def _git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Server(ThreadingHTTPServer):
    def __init__(self, hub: Hub) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub = hub


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> Hub:
        server = self.server
        assert isinstance(server, _Server)
        return server.hub

    def log_message(self, *_: Any) -> None:
        """Nothing."""

    def answer(self, code: int, body: object = None, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts: list[bytes] = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if self.spoilt():
            return
        if self.hub.private is None:
            self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        elif "/resolve/" in path:
            data = self.hub.files.get(path.partition("/resolve/")[2].partition("/")[2])
            if data is None:
                self.answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
            else:
                self.answer(200, data, ETag=f'"{_git_oid(data)}"', X_Repo_Commit="0" * 40)
        elif "/tree/" in path:
            self.answer(200, [self.hub.entry(name) for name in sorted(self.hub.files)])
        else:
            siblings = [{"rfilename": name} for name in sorted(self.hub.files)]
            self.answer(200, {"id": "me/model", "private": self.hub.private, "sha": "0" * 40, "siblings": siblings})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.body()
        if self.spoilt():
            return
        if self.path.endswith("/repos/create"):
            asked = json.loads(body)
            self.hub.private = asked.get("private", asked.get("visibility") == "private")
            self.answer(200, {"url": f"{self.hub.url}/me/model"})
        elif self.path.endswith("/validate-yaml"):  # of the card
            self.answer(200, {"warnings": [], "errors": []})
        elif "/preupload/" in self.path:
            files = [
                {"path": one["path"], "uploadMode": "lfs" if one["path"].endswith(LARGE) else "regular",
                 "shouldIgnore": False, "oid": self.hub.entry(one["path"])["oid"] if one["path"] in self.hub.files else None}
                for one in json.loads(body)["files"]
            ]  # fmt: skip
            self.answer(200, {"files": files})
        elif self.path.endswith("/objects/batch"):
            objects: list[dict[str, Any]] = []
            for one in json.loads(body)["objects"]:
                there = one["oid"] in self.hub.stored
                actions = {} if there else {"actions": {"upload": {"href": f"{self.hub.url}/store/{one['oid']}"}}}
                objects.append({"oid": one["oid"], "size": one["size"], **actions})
            self.answer(200, {"transfer": "basic", "objects": objects})
        elif "/commit/" in self.path:
            self.hub.commit([json.loads(line) for line in body.splitlines()])
            self.answer(200, {"commitUrl": f"{self.hub.url}/me/model/commit/0", "commitOid": "0" * 40})
        else:
            self.answer(404, {"error": self.path})

    def do_PUT(self) -> None:
        if self.hub.cut > 0:
            self.hub.cut -= 1
            self.rfile.read(10)
            self.close_connection = True
            self.connection.close()
            return
        name, data = self.path.rpartition("/")[2], self.body()
        assert hashlib.sha256(data).hexdigest() == name
        self.hub.stored[name] = data
        self.hub.uploads.append(name)
        self.answer(200, {})

    def spoilt(self) -> bool:
        """Answer a request that is not to be done."""
        if self.hub.refuse > 0:
            self.hub.refuse -= 1
            self.answer(503, {"error": "not now"})
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer(401, {"error": "Invalid credentials in Authorization header"},
                        X_Error_Message="Invalid credentials in Authorization header")  # fmt: skip
        else:
            return False
        return True


@contextmanager
def hub_stand_in() -> Iterator[Hub]:
    """One that runs, empty."""
    hub = Hub()
    server = _Server(hub)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def hub_in_place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The same in place of the real one, for the library in this process."""
    constants = import_module("huggingface_hub.constants")
    with hub_stand_in() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        template = f"{running.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield running
