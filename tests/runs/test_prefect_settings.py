"""Prefect's settings in a block: ours in 0.1 ms are those of its own `temporary_settings`."""

from pathlib import Path

import pytest
from prefect.settings import (
    PREFECT_API_AUTH_STRING,
    PREFECT_API_URL,
    PREFECT_CLIENT_MAX_RETRIES,
    PREFECT_FLOWS_HEARTBEAT_FREQUENCY,
    PREFECT_PROFILES_PATH,
    PREFECT_SERVER_EPHEMERAL_ENABLED,
    get_current_settings,
    temporary_settings,
)

from tasks.prefect_settings import changed_settings

URL = "http://127.0.0.1:9/api"


def test_settings_of_a_block_are_those_that_prefect_makes(tmp_path: Path) -> None:
    before = get_current_settings()
    named = {
        PREFECT_API_URL: URL,
        PREFECT_API_AUTH_STRING: None,
        PREFECT_CLIENT_MAX_RETRIES: 0,
        PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None,
        PREFECT_PROFILES_PATH: tmp_path / "profiles.toml",
        PREFECT_SERVER_EPHEMERAL_ENABLED: False,
    }
    nested = {
        "api": {"url": URL, "auth_string": None},
        "client": {"max_retries": 0},
        "flows": {"heartbeat_frequency": None},
        "profiles_path": tmp_path / "profiles.toml",
        "server": {"ephemeral": {"enabled": False}},
    }
    with temporary_settings(named):
        theirs = {setting: setting.value() for setting in named}
    with changed_settings(nested):
        assert {setting: setting.value() for setting in named} == theirs
        with changed_settings({"client": {"max_retries": 3}}):
            assert PREFECT_CLIENT_MAX_RETRIES.value() == 3 and PREFECT_API_URL.value() == URL
    assert get_current_settings() is before


@pytest.mark.parametrize("changes", [{"no_such": 1}, {"client": {"no_such": 1}}])
def test_a_setting_that_prefect_does_not_have_is_our_fault(changes: dict[str, object]) -> None:
    with pytest.raises(AssertionError, match="no_such"), changed_settings(changes):
        pass
