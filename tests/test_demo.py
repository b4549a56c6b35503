"""The demo as the README promises it: every stage runs, the new concept is learned, a second run does nothing again."""

import subprocess
import sys
from pathlib import Path

import pytest

from deepfloyd_core.bundle import find_version

ROOT = Path(__file__).parent.parent


def _demo(workspace: Path) -> "subprocess.CompletedProcess[str]":
    command = [
        sys.executable,
        "-P",
        "-m",
        "flows.cli",
        "run",
        "flows/configs/demo.toml",
        "--set",
        f"workspace={workspace}",
    ]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200)


@pytest.mark.slow
def test_the_demo_learns_and_a_second_one_reuses_everything(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)  # as a user runs it
    first = _demo(tmp_path)
    assert first.returncode == 0, first.stderr
    version = find_version(tmp_path, "latest")
    bundle = tmp_path / "lora_bundle" / version.bundle
    assert str(bundle) in first.stdout
    figures = dict(
        line.rsplit(maxsplit=1) for line in first.stdout.splitlines() if line.startswith(("concept", "psnr"))
    )
    figures = {name.strip(): float(value) for name, value in figures.items()}
    assert figures["concept share base"] <= 0.2
    assert figures["concept share tuned"] >= 0.7
    assert figures["psnr tuned"] > figures["psnr bilinear"]
    assert figures["psnr tuned"] > figures["psnr base"]

    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    second = _demo(tmp_path)
    assert second.returncode == 0, second.stderr
    printed = second.stdout + second.stderr
    assert printed.count(": reused") == 9 and ": built" not in printed
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert after == before
