"""The campaign of kills in a bucket in short: one pass, in which each command is killed at least once."""

import os
from pathlib import Path

import bucket_kills
import pytest

from deepfloyd_core.store import bucket_turn


@pytest.mark.slow
def test_a_run_in_a_bucket_that_was_killed_on_two_machines_has_the_bytes_of_one_that_was_not(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LEASE_S", "BEAT_S"):  # the campaign sets its own
        monkeypatch.setattr(bucket_turn, name, getattr(bucket_turn, name))
    monkeypatch.setenv("HOME", os.environ["HOME"])
    kills, spoilt, passes = bucket_kills.attack(0, 1, tmp_path)
    assert kills.tried > 1 and spoilt.tried > 1
    assert (passes.tried, passes.failed) == (1, 0), passes.failures
