"""Events of versions reach the server whoever decided, and whatever was killed in between."""

from pathlib import Path
from typing import Any, cast

import httpx
import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.settings import PREFECT_HOME, temporary_settings
from releases import Release, deepfloyd

from deepfloyd_core.errors import StorageError
from tasks import events
from tasks.events import send_untold, tell_untold, versions_told


class Server:
    """Takes events, or fails."""

    def __init__(self) -> None:
        self.took, self.is_away = list[dict[str, Any]](), False

    def request(self, method: str, path: str, json: list[dict[str, Any]]) -> None:
        assert (method, path) == ("POST", "/events")
        if self.is_away:
            raise httpx.ConnectError("away")
        self.took += json

    @property
    def client(self) -> SyncPrefectClient:
        return cast(SyncPrefectClient, self)

    @property
    def names(self) -> list[tuple[str, int]]:
        return [(one["event"].removeprefix("deepfloyd.version."), one["payload"]["version"]) for one in self.took]


@pytest.fixture
def release(tmp_path: Path) -> Release:
    return Release(tmp_path / "birds")


def test_a_run_that_is_killed_before_it_tells_and_a_command_without_a_server_are_told_by_who_comes_next(
    release: Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "show", lambda *_: None)  # the outbox of a process that was killed
    server, home = Server(), tmp_path / "home"
    with temporary_settings({PREFECT_HOME: home}), versions_told(release.workspace):
        release.publish("old")
    release.publish("new")
    assert deepfloyd("rollback", str(release.workspace)).exit_code == 0
    server.is_away = True
    with pytest.raises(httpx.ConnectError):
        tell_untold(server.client, home)
    server.is_away = False
    lines = tell_untold(server.client, home)
    assert server.names == [("promoted", 1), ("promoted", 2), ("blocked", 2), ("promoted", 1)]
    assert lines[2] == "birds: version 2 is blocked: rolled back; version 1 serves"
    assert {one["resource"]["prefect.resource.id"] for one in server.took} == {"deepfloyd.workspace.birds"}
    assert tell_untold(server.client, home) == [] and len(server.took) == 4


def test_a_kill_between_the_telling_and_its_mark_tells_the_same_event_again(
    release: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    release.publish("old")
    server = Server()
    with monkeypatch.context() as killed:
        killed.setattr(events, "mark_told", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            send_untold(server.client, release.workspace)
    send_untold(server.client, release.workspace)
    assert server.names == [("promoted", 1)] * 2 and len({one["id"] for one in server.took}) == 1


def test_a_workspace_that_is_away_stops_no_other(release: Release, tmp_path: Path) -> None:
    home, server = tmp_path / "home", Server()
    with temporary_settings({PREFECT_HOME: home}):
        for workspace in (tmp_path / "gone", tmp_path / "blocked", release.workspace):
            events._remember(home, workspace)
    (tmp_path / "blocked" / "versions").mkdir(parents=True)
    (tmp_path / "blocked" / ".locks").write_text("in the way")
    release.publish("old")
    with pytest.raises(StorageError):
        tell_untold(server.client, home)
    assert server.names == [("promoted", 1)] and not (tmp_path / "gone").exists()
