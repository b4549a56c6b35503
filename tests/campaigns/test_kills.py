"""The campaign of kills in short: one pass, in which each command is killed some times."""

from pathlib import Path

import kills
import pytest


@pytest.mark.slow
def test_a_run_that_was_killed_again_and_again_has_the_bytes_of_one_that_was_not(server: str, tmp_path: Path) -> None:
    *moments, passes = kills.attack(0, 1, tmp_path)
    assert sum(row.tried for row in moments) > 1
    assert (passes.tried, passes.failed) == (1, 0), passes.failures
