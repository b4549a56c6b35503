"""The demo as the README promises it: every stage runs, the new concept is learned, a second run does nothing again."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from deepfloyd_core.store.events import standing
from deepfloyd_core.store.versions import find_version

ROOT = Path(__file__).parents[2]


def _demo(workspace: Path) -> "subprocess.CompletedProcess[str]":
    command = [
        sys.executable,
        "-P",
        "-m",
        "flows",
        "run",
        "flows/configs/demo.toml",
        "--set",
        f"workspace={workspace}",
    ]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=3000)


@pytest.fixture(scope="module")
def demo(server: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The demo's workspace and what its first run printed. It has one thread: other tests share the cores with it."""
    workspace = tmp_path_factory.mktemp("demo")
    done = _demo(workspace)
    assert done.returncode == 0, done.stderr
    return workspace, done.stdout


def _figures(demo: tuple[Path, str]) -> dict[str, Any]:
    """The metrics of the bundle that the run printed."""
    workspace, printed = demo
    bundle = workspace / "lora_bundle" / find_version(workspace, "latest").bundle
    assert str(bundle) in printed
    return dict(json.loads((bundle / "metrics.json").read_bytes())["samples"])


@pytest.mark.slow
def test_the_demo_teaches_stage1_the_new_concept(demo: tuple[Path, str]) -> None:
    figures = _figures(demo)
    assert figures["concept_share_base"] <= 0.2
    assert figures["concept_share_tuned"] >= 0.7


@pytest.mark.slow
def test_the_demo_makes_stage2_better_than_plain_enlargements_and_untuned(demo: tuple[Path, str]) -> None:
    figures = _figures(demo)
    upscaled = figures["held_out"]["upscaled"]
    for way in ("bilinear", "bicubic", "base"):
        assert upscaled["tuned"]["psnr"] > upscaled[way]["psnr"] + 0.5, way
    assert upscaled["tuned"]["ssim"] > upscaled["base"]["ssim"]


@pytest.mark.slow
def test_the_gate_has_measured_what_the_demo_forgot_and_its_colours(demo: tuple[Path, str]) -> None:
    workspace, _ = demo
    figures, report = _figures(demo), standing(workspace).candidates[1].report
    assert figures["probe_loss_base"] < 0.02, "the base knows what it drew"
    assert report is not None and report.passed
    told = {(one.rule, one.about): one for one in report.verdicts if one.figure is not None}
    forgot = figures["probe_loss_tuned"] - figures["probe_loss_base"]
    assert told["forgetting", "Stage I"].figure == pytest.approx(forgot)
    for stage in ("Stage I", "Stage II"):
        assert (told["colour drift", stage].figure or 9) < 2 and 0 <= (
            told["reloaded weights", stage].figure or 0
        ) <= 1e-5


@pytest.mark.slow
def test_a_second_demo_reuses_everything(demo: tuple[Path, str]) -> None:
    workspace, _ = demo
    before = _written(workspace)
    second = _demo(workspace)
    assert second.returncode == 0, second.stderr
    printed = second.stdout + second.stderr
    assert printed.count(": reused") == 11 and ": built" not in printed
    assert _written(workspace) == before


def _written(workspace: Path) -> dict[Path, int]:
    """When each file was written last, but the lock of a run, which names it, and the reports, which are made again."""
    files = (path for path in workspace.rglob("*") if path.is_file())
    others = workspace / ".locks" / "run", *(workspace / "versions" / "reports").glob("*")
    return {path: path.stat().st_mtime_ns for path in files if path not in others}
