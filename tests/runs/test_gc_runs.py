"""`gc` beside real runs: while one trains, before the next one, and as a deployment's flow."""

import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
from prefect_api import post
from small_run import SmallRun

from deepfloyd_core.bundle.verify import verify_workspace
from deepfloyd_core.config.retention import Policy
from deepfloyd_core.store.artifacts import all_artifacts
from deepfloyd_core.store.gc import collect
from deepfloyd_core.store.leases import running_leases
from deepfloyd_core.store.registry import block
from deepfloyd_core.store.versions import champion

pytestmark = pytest.mark.slow  # a server, and whole runs
FAST = "--set", "stage1.max_train_steps=4", "--set", "stage2.max_train_steps=2"
STRICT, WITH_BOTH = (Policy(keep_versions=count, keep_days=0) for count in (1, 2))


def collected_until_it_ends(run: SmallRun, *arguments: str) -> tuple[int | None, str, set[str], set[str]]:
    """Collect again and again while a command runs. Returns its exit code and output, what was removed, and what it had
    leased.
    """
    log, removed, leased = run.folder / "log", set[str](), set[str]()
    process = run.start_here(log, *arguments)
    while process.is_alive():
        leased |= set(running_leases(run.workspace))
        collection = collect(run.workspace, WITH_BOTH, datetime.now(UTC))
        removed |= {going.artifact.name for going in collection.plan.goes}
        time.sleep(0.05)
    process.join()
    return process.exitcode, log.read_text(), removed, leased


def test_a_run_is_not_disturbed_and_the_next_one_reuses_everything(small_run: SmallRun, server: str) -> None:
    assert small_run.call_here("run", "run.toml", *FAST).returncode == 0
    drawn = small_run.call_here("generate", "run.toml", "--prompt", "a purple star")
    assert drawn.returncode == 0 and all(map(Path.exists, map(Path, drawn.stdout.split())))
    first = {artifact.name for artifact in all_artifacts(small_run.workspace)}
    small_run.add_picture(50)

    code, output, removed, leased = collected_until_it_ends(small_run, "retrain", "run.toml", *FAST)
    assert code == 0, output
    assert {name for name in removed if name in first} == {name for name in first if name.startswith("generated/")}
    assert not removed & leased and len(leased) > 10 and not running_leases(small_run.workspace)
    version = champion(small_run.workspace)
    assert version and version.number == 2

    block(small_run.workspace, 1, "not to return to", "a person")  # else it stays for a rollback
    collect(small_run.workspace, STRICT, datetime.now(UTC))
    kept = {artifact.name for artifact in all_artifacts(small_run.workspace)}
    assert f"lora_bundle/{version.bundle}" in kept and len(first - kept) > 5
    done = small_run.call_here("run", "run.toml", *FAST)
    assert done.returncode == 0 and "built" not in done.stderr, done.stderr
    assert {artifact.name for artifact in all_artifacts(small_run.workspace)} == kept

    refused = small_run.call_here("generate", "run.toml", "--prompt", "x", "--version", "1")
    assert refused.returncode == 1 and "its bundle was collected on" in refused.stderr
    found = verify_workspace(small_run.workspace)
    assert found.faults == 0 and "version 1: collected on" in found.notes[0]


def test_the_flow_shows_what_goes_and_removes_it_when_it_is_told_to(small_run: SmallRun, server_here: str) -> None:
    from flows.gc import gc

    assert small_run.call_here("prepare", "run.toml").returncode == 0
    small_run.add_picture(51)
    assert small_run.call_here("prepare", "run.toml").returncode == 0
    before = {artifact.name for artifact in all_artifacts(small_run.workspace)}
    state = gc(str(small_run.workspace), keep_versions=1, keep_days=0, return_state=True)
    assert "would be removed" in str(state.message)
    assert {artifact.name for artifact in all_artifacts(small_run.workspace)} == before
    state = gc(str(small_run.workspace), delete=True, keep_versions=1, keep_days=0, return_state=True)
    assert "artifacts removed" in str(state.message) and len(list(all_artifacts(small_run.workspace))) < len(before)
    pages = post(server_here, "artifacts/filter", {"artifacts": {"key": {"any_": ["gc-workspace"]}}})
    assert any("| image index | 1 |" in page["data"] and "of no version" in page["data"] for page in pages)
    described = gc.parameters.properties["keep_days"]
    assert (described["minimum"], described["maximum"]) == (0, 36_500) and "How many days" in described["description"]
    for wrong in ({"keep_versions": 0}, {"keep_days": -1}, {"keep_days": "soon"}):
        assert gc(str(small_run.workspace), delete=True, return_state=True, **wrong).is_failed()
