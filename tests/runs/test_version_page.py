"""The page of a version in the UI: its size, its key, its text, and the report that a run writes beside it."""

import logging
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from candidates import Candidate
from PIL import Image
from prefect.client.schemas.actions import ArtifactCreate
from prefect_api import PrefectApi
from releases import deepfloyd
from small_run import SmallRun

from deepfloyd_core.bundle.history import history
from deepfloyd_core.bundle.version_report import version_report
from deepfloyd_core.config.run import Run
from deepfloyd_core.preflight.load import load_run
from deepfloyd_core.store.versions import find_version, report_file
from tasks import ui_pages, version_page
from tasks.page_keys import workspace_key
from tasks.ui_pages import show_history
from tasks.version_page import markdown_page, show_version

GOOD = Candidate()


@pytest.fixture
def run(small_run: SmallRun) -> Run:
    run = load_run(small_run.config)
    return Run(**{**vars(run), "config": run.config.model_copy(update={"gate": "auto"})})


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, str]]:
    """The pages that were shown: key, description, markdown."""
    shown: list[tuple[str, str, str]] = []
    monkeypatch.setattr(
        version_page, "create_markdown_artifact",
        lambda page, key, description: shown.append((key, description, page)),
    )  # fmt: skip
    return shown


def test_a_run_writes_the_report_of_its_version_and_of_the_one_that_it_replaces_and_shows_a_small_page(
    run: Run, pages: list[tuple[str, str, str]]
) -> None:
    for one in (GOOD, GOOD.with_(loss=-0.06, psnr=1.5, seed=1), GOOD.with_(loss=0.02, seed=2)):
        sheet = one.bundle(run.workspace).path / "sheet.png"
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (2000, 2000, 3), np.uint8)).save(sheet)
        show_version(run.workspace, one.publish(run))
    assert {key for key, _, _ in pages} == {"version-workspace"}
    assert [words for _, words, _ in pages] == [
        "Version 1 of workspace serves", "Version 2 of workspace serves", "Version 3 of workspace is blocked",
    ]  # fmt: skip
    states = [re.sub(r"\s+", " ", re.sub("<[^>]*>", "", report_file(run.workspace, number).read_text().partition(
        "<h1>")[2].partition("</h1>")[0])) for number in (1, 2, 3)]  # fmt: skip
    assert states == ["Version 1 served before", "Version 2 serves", "Version 3 is blocked"]
    last = pages[-1][2]
    assert all(len(page.encode()) < 300 << 10 for _, _, page in pages) and "](data:image/jpeg;base64," in last
    table = [line for line in last.splitlines() if line.startswith("| Stage")]
    assert table[0].startswith("| Stage II: PSNR to the truth, dB | 30.0 | 30.0 | **30.0** | worse: -0.50 (")
    assert all(len(line) < 110 for line in table)
    assert str(report_file(run.workspace, 3)) in last and str(version_report(
        run.workspace, find_version(run.workspace, "3")).bundle) in last  # fmt: skip
    assert f"`deepfloyd diff {run.workspace} 2 3`" in last and "- Version 2 serves" in last


@pytest.mark.slow
def test_a_flow_that_decides_shows_the_version_that_serves_then(run: Run, server_here: str) -> None:
    from flows.version_flows import block, promote, rollback

    def page() -> str:
        return str(
            PrefectApi(server_here).get(f"artifacts/{workspace_key('version', run.workspace)}/latest")["description"]
        )

    for one in (GOOD, GOOD.with_(loss=-0.06, psnr=1.5, seed=1)):
        one.publish(run)
    folder = str(run.workspace)
    rollback(folder)
    assert page() == "Version 1 of workspace serves"
    promote(folder, 2)
    assert page() == "Version 2 of workspace serves"
    block(folder, 1, "its style")
    assert page() == "Version 2 of workspace serves"
    block(folder, 2, "its style")
    assert page() == "Version 2 of workspace is blocked"


def test_names_and_reasons_are_no_markup_on_the_page(run: Run) -> None:
    GOOD.publish(run)
    reason = "<script>alert(1)</script> | [x](https://example.com) ![y](https://example.com/y.png) `z`"
    deepfloyd("block", str(run.workspace), "1", "--reason", reason)
    report = version_report(run.workspace, find_version(run.workspace, "1"))
    page = markdown_page(report, report_file(run.workspace, 1))
    assert not re.search(r"(?<!\\)<script|(?<!\\)\]\(http", page) and "\\<script\\>" in page


def test_a_lost_bundle_has_a_page_too(run: Run) -> None:
    GOOD.publish(run)
    version = find_version(run.workspace, "1")
    shutil.rmtree(run.workspace / "lora_bundle" / version.bundle)
    page = markdown_page(version_report(run.workspace, version), report_file(run.workspace, 1))
    assert page.startswith("# Version 1 serves") and "cannot be used" in page and "lost or damaged" in page


def test_a_report_that_cannot_be_written_is_a_warning_and_the_version_stays_published(
    run: Run, pages: list[tuple[str, str, str]], caplog: pytest.LogCaptureFixture
) -> None:
    outcome = GOOD.publish(run)
    report_file(run.workspace, 1).parent.write_text("in the way")
    with caplog.at_level(logging.WARNING):
        show_version(run.workspace, outcome)
    assert f"The report on version 1 was not written: {report_file(run.workspace, 1).parent} cannot be" in caplog.text
    assert "[Errno" not in caplog.text
    assert len(pages) == 1 and "for a browser" not in pages[0][2]


@pytest.mark.parametrize("name", ["mine", "my_Model v2", "Kätzchen", "копия", "a--b", "-", "v2"])
def test_the_key_is_one_that_prefect_takes_and_differs_with_the_name(name: str) -> None:
    key = workspace_key("version", Path("/somewhere") / name)
    assert ArtifactCreate(key=key).key == key
    others = {
        workspace_key("version", Path("/somewhere") / other)
        for other in ("other", "my-model-v2", "k-tzchen", "a-b", "")
    }
    assert key not in others and key.startswith("version-")


def test_the_history_of_a_workspace_has_a_drawing_of_its_figures(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: dict[str, str] = {}
    monkeypatch.setattr(ui_pages, "create_markdown_artifact", lambda page, key, description: shown.update({key: page}))
    for one in (GOOD, GOOD.with_(loss=-0.06, seed=1)):
        show_history(run.workspace, history(run.workspace))
        one.publish(run)
    show_history(run.workspace, history(run.workspace))
    page = shown.pop("history-workspace")
    assert not shown and "](data:image/svg+xml;base64," in page
    heads = [line for line in page.splitlines() if line.startswith("**")]
    assert [head.split(",")[0] for head in heads] == ["**Version 2: champion", "**Version 1: former"]
    assert "- held\\-out loss of Stage I: " in page and "_" not in page.partition("base64,")[2].partition(")")[2]
