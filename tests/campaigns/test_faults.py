"""The sweep of faults in short, and that it finds what is wrong."""

import shutil
from pathlib import Path

import faults
import pytest

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc: apt-get install gcc")


def test_an_artifact_is_old_or_new_wherever_a_kill_a_fault_or_a_power_loss_comes(tmp_path: Path) -> None:
    rows = faults.attacked(("acts:quick_acts",), tmp_path)
    assert len(rows) == 5
    for row in rows:
        assert row.tried > 5 and not row.failed, row.failures


def test_what_is_written_in_a_wrong_way_is_found(tmp_path: Path) -> None:
    rows = {row.kind: row for row in faults.attacked(("acts:planted_acts",), tmp_path)}
    found = {kind for kind, row in rows.items() if row.failed}
    assert {"in place: killed before a call", f"in place: {faults.POWER}"} <= found
    assert f"renamed early: {faults.POWER}" in found and "renamed early: killed before a call" not in found
    assert f"named late: {faults.POWER}" in found and "named late: killed before a call" not in found
