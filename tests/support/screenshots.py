"""Pictures of the UI for the documentation, as small PNGs; `python tests/support/screenshots.py PREFECT_HOME PORT OUT`.

`deepfloyd ui --port PORT` must run with that PREFECT_HOME, and a `finetune` must have ended. The browser is driven over its
DevTools protocol: a page's scripts need some real seconds, and tabs a click.
"""

import base64
import io
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from browser import CHROMIUM
from PIL import Image
from prefect_api import PrefectApi
from websockets.sync.client import connect
from websockets.sync.connection import Connection

from flows.serving.home import login_link, password

PAGES = (("version", "version", 1500), ("training", "stage1-lora", 1300), ("crops", "stage1-pixels", 760))
LARGEST_BYTES = 140_000
SHORTEST_S, LONGEST_S = 4.0, 60.0
DESK = (1180, 900)


class Tab:
    """A tab of the browser."""

    def __init__(self, line: Connection) -> None:
        self._line, self._numbers = line, itertools.count()

    def ask(self, method: str, **parameters: Any) -> Any:
        """A command of the protocol, and its result."""
        number = next(self._numbers)
        self._line.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while (answer := json.loads(self._line.recv(timeout=60))).get("id") != number:
            pass
        return answer["result"]

    def run(self, script: str) -> Any:
        """The value of an expression."""
        return self.ask("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")

    def open(self, url: str, size: tuple[int, int], text: str, theme: str = "dark") -> None:
        """Open a page at a size, and wait until it has a text."""
        metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": False}
        self.ask("Emulation.setDeviceMetricsOverride", **metrics)
        self.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])
        self.ask("Page.navigate", url=url)
        self.wait_for(text)

    def wait_for(self, text: str) -> None:
        """Wait until the page has a text, and a little longer."""
        deadline = time.monotonic() + LONGEST_S
        while text not in (self.run("document.body ? document.body.innerText : ''") or ""):
            assert time.monotonic() < deadline, f"no {text!r} on the page"
            time.sleep(0.2)
        time.sleep(SHORTEST_S)

    def click(self, text: str) -> None:
        """Click the innermost element with just this text."""
        found = f"[...document.querySelectorAll('*')].filter(e => e.innerText?.trim() === {json.dumps(text)}).at(-1)"
        assert self.run(f"{found} ? ({found}.click(), true) : false"), text
        time.sleep(SHORTEST_S)

    def save(self, path: Path) -> None:
        """The page as a PNG below LARGEST_BYTES, of as many colours as that allows."""
        shot = self.ask("Page.captureScreenshot", format="png")["data"]
        picture = Image.open(io.BytesIO(base64.b64decode(shot))).convert("RGB")
        for colours in (224, 160, 112, 64):
            picture.quantize(colours, Image.Quantize.MAXCOVERAGE, kmeans=3, dither=Image.Dither.NONE).save(
                path, optimize=True
            )
            if path.stat().st_size < LARGEST_BYTES:
                break


@contextmanager
def browser_tab() -> Iterator[Tab]:
    """A tab of a browser of its own."""
    assert CHROMIUM is not None, "no browser; on Debian: apt-get install chromium"
    with TemporaryDirectory() as folder:
        switches = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"]
        command = [CHROMIUM, *switches, "--remote-debugging-port=0", f"--user-data-dir={folder}", "about:blank"]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        try:
            port = _port(Path(folder) / "DevToolsActivePort")
            (target,) = [one for one in json.loads(_read(f"http://127.0.0.1:{port}/json")) if one["type"] == "page"]
            with connect(target["webSocketDebuggerUrl"], max_size=None, proxy=None) as line:
                yield Tab(line)
        finally:
            process.terminate()
            process.wait(10)


def _port(file: Path) -> int:
    deadline = time.monotonic() + LONGEST_S
    while not file.exists() or not file.read_text():
        assert time.monotonic() < deadline, "the browser does not start"
        time.sleep(0.1)
    return int(file.read_text().split()[0])


def _read(url: str) -> str:
    import urllib.request

    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=10) as answer:
        return str(answer.read().decode())


def main(home: Path, port: int, out: Path) -> None:
    """Take the pictures of the newest `finetune` that has ended."""
    page, api = f"http://127.0.0.1:{port}", PrefectApi(f"http://127.0.0.1:{port}/api", password(home))
    ended = {"flows": {"name": {"any_": ["finetune"]}}, "flow_runs": {"state": {"type": {"any_": ["COMPLETED"]}}}}
    run = api.post("flow_runs/filter", {**ended, "sort": "START_TIME_DESC", "limit": 1})[0]
    shown = api.post("artifacts/filter", {"flow_runs": {"id": {"any_": [run["id"]]}}, "limit": 100})
    ids = {entry["key"].partition("-demo")[0]: entry["id"] for entry in shown if entry["key"]}
    with browser_tab() as tab:
        tab.open(login_link(page, home), DESK, "Dashboard")
        tab.open(f"{page}/runs/flow-run/{run['id']}", (1180, 1250), "Artifacts")
        tab.click("Artifacts")
        tab.wait_for("stage2-pixels")
        tab.save(out / "ui-run.png")
        for name, key, height in PAGES:
            tab.open(f"{page}/artifacts/artifact/{ids[key]}", (1180, height), "Details")
            tab.save(out / f"ui-{name}.png")
        tab.open(f"{page}/deployments", DESK, "finetune")
        tab.save(out / "ui-deployments.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
