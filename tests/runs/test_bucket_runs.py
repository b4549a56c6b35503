"""A run with its workspace in a bucket: it has the bytes of one on a disk, and another machine goes on with it."""

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from faulty_s3 import faulty_s3
from narrowing import known
from polling import within
from s3_server import s3_server
from small_run import SmallRun

from deepfloyd_core.config.bucket_workspace import mirror_folder
from deepfloyd_core.store import bucket_turn, mirror_state
from deepfloyd_core.store.artifacts import all_artifacts

WORKSPACE = "s3://work/runs/small"


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket `work` behind a proxy that spoils answers. Returns the server's address."""
    import boto3

    with s3_server() as url, faulty_s3(url) as (address, _):
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        boto3.resource("s3", endpoint_url=url).create_bucket(Bucket="work")
        yield url


def on(machine: Path) -> tuple[str, ...]:
    """The arguments of a machine."""
    return "--set", f"workspace={WORKSPACE}", "--set", f"workspace_cache_dir={machine}"


def hashes(workspace: Path) -> dict[str, dict[str, str]]:
    return {artifact.name: artifact.hashes for artifact in all_artifacts(workspace)}


@pytest.mark.usefixtures("bucket")
def test_a_run_in_a_bucket_has_the_bytes_of_one_on_a_disk_and_another_machine_goes_on(
    server: str, small_run: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, here, there = str(small_run.config), tmp_path / "here", tmp_path / "there"
    assert small_run.call_here("run", config).returncode == 0
    done = small_run.call_here("run", config, *on(here))
    assert done.returncode == 0 and "published version 1" in done.stdout, done.stderr
    assert hashes(mirror_folder(WORKSPACE, str(here))) == hashes(small_run.workspace)

    again = small_run.call_here("retrain", config, *on(there))
    assert "no change: version 1 serves" in again.stdout, again.stderr
    mirror = mirror_folder(WORKSPACE, str(there))
    assert hashes(mirror) == hashes(small_run.workspace)
    assert not list(mirror.glob("stage?_pixels/*/*.parquet")), "what was not used is not brought"

    drawn = small_run.call_here("generate", config, "--prompt", "a purple star", *on(there))
    assert drawn.returncode == 0, drawn.stderr
    monkeypatch.setenv("HOME", str(tmp_path / "third"))
    listed = small_run.call_here("ls", WORKSPACE)
    assert listed.returncode == 0 and "champion" in listed.stdout, listed.stderr
    assert small_run.call_here("block", WORKSPACE, "1", "--reason", "a test").returncode == 0
    verified = small_run.call_here("verify", WORKSPACE)
    assert verified.returncode == 0, verified.stdout
    assert "blocked" in small_run.call_here("history", str(mirror)).stdout


@pytest.mark.slow
def test_another_machine_goes_on_with_a_training_from_its_last_checkpoint(
    server: str, bucket: str, small_run: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import boto3

    monkeypatch.setattr(bucket_turn, "LEASE_S", 4.0)
    monkeypatch.setattr(bucket_turn, "BEAT_S", 0.5)
    monkeypatch.setattr(mirror_state, "_LOOK_S", 0.1)
    config, log, objects = (
        str(small_run.config),
        tmp_path / "log",
        boto3.resource("s3", endpoint_url=bucket).Bucket("work"),
    )
    steps = ("--set", "stage1.max_train_steps=60")
    run = small_run.start_here(log, "run", config, *steps, *on(tmp_path / "here"))
    states = f"{WORKSPACE.removeprefix('s3://work/')}/working/stage1_lora/"
    assert within(
        120, lambda: any(each.key.endswith("/state.json") for each in objects.objects.filter(Prefix=states)), 0.2
    )
    os.killpg(known(run.pid), signal.SIGKILL)
    run.join()
    there = small_run.call_here("run", config, *steps, *on(tmp_path / "there"))
    assert there.returncode == 0 and "has not been heard of for 4 s: its turn is taken over" in there.stderr, (
        there.stderr
    )
    assert re.search(r"stage1_lora \w+: goes on from step \d+, which is in s3://work/runs/small", there.stderr)
    assert not list(objects.objects.filter(Prefix=states)), "nothing is left of it"
    assert small_run.call_here("run", config, *steps).returncode == 0
    assert hashes(mirror_folder(WORKSPACE, str(tmp_path / "there"))) == hashes(small_run.workspace)
