"""A real browser without a window, for tests of pages."""

import shutil
import subprocess
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NEEDS_BROWSER = pytest.mark.skipif(CHROMIUM is None, reason="no browser; on Debian: apt-get install chromium")


def page(url: str, profile: Path) -> str:
    """The page's document after its scripts ran. profile: the browser's folder, which keeps what pages store."""
    assert CHROMIUM is not None
    switches = [
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
    ]  # fmt: skip
    command = [CHROMIUM, *switches, f"--user-data-dir={profile}", "--virtual-time-budget=20000", "--dump-dom", url]
    return subprocess.run(command, capture_output=True, text=True, timeout=120).stdout


def shows(url: str, profile: Path, text: str, times: int | None = None) -> bool:
    """Whether a page has a text, so many times if that is given. On a busy machine its scripts may need another try."""
    return any(found == times if times else found for found in (page(url, profile).count(text) for _ in range(4)))
