"""Events of versions reach the server whoever decided, and whatever was killed in between."""

import inspect
from contextlib import nullcontext
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.settings import PREFECT_HOME, temporary_settings
from releases import Release, deepfloyd

from deepfloyd_core.errors import StorageError
from deepfloyd_core.store.happenings import remember
from flows.serving.ui import _Watch
from tasks import events, version_page
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

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    @property
    def client(self) -> SyncPrefectClient:
        return cast(SyncPrefectClient, self)

    @property
    def names(self) -> list[tuple[str, int]]:
        return [(one["event"].removeprefix("deepfloyd.version."), one["payload"]["version"]) for one in self.took]


@pytest.fixture(autouse=True)
def pages(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The descriptions of the versions' pages that were shown."""
    shown: list[str] = []
    monkeypatch.setattr(version_page, "create_markdown_artifact", lambda _, key, description: shown.append(description))
    return shown


@pytest.fixture
def release(tmp_path: Path) -> Release:
    return Release(tmp_path / "birds")


def test_a_run_that_is_killed_before_it_tells_and_a_command_without_a_server_are_told_by_who_comes_next(
    release: Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pages: list[str]
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
    assert pages == ["Version 1 of birds serves"]
    assert tell_untold(server.client, home) == [] and len(server.took) == 4 and len(pages) == 1


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
    on_record = {datetime.fromisoformat(one["payload"]["when"]) for one in server.took}
    assert {datetime.fromisoformat(one["occurred"]) for one in server.took} == on_record, "also where it is told late"


def test_a_workspace_that_is_away_stops_no_other(release: Release, tmp_path: Path) -> None:
    home, server = tmp_path / "home", Server()
    with temporary_settings({PREFECT_HOME: home}):
        for workspace in (tmp_path / "gone", tmp_path / "blocked", release.workspace):
            remember(home, workspace)
    (tmp_path / "blocked" / "versions").mkdir(parents=True)
    (tmp_path / "blocked" / ".locks").write_text("in the way")
    release.publish("old")
    with pytest.raises(StorageError):
        tell_untold(server.client, home)
    assert server.names == [("promoted", 1)] and not (tmp_path / "gone").exists()


def test_a_command_of_the_home_makes_known_a_workspace_that_was_moved(
    release: Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, server = tmp_path / "home", Server()
    monkeypatch.setenv("PREFECT_HOME", str(home))
    release.publish("old")
    assert deepfloyd("promote", str(release.workspace), "1").exit_code == 0 and not home.exists()
    home.mkdir()
    assert deepfloyd("block", str(release.workspace), "1", "--reason", "blurred").exit_code == 0
    tell_untold(server.client, home)
    assert ("blocked", 1) in server.names


@pytest.mark.parametrize("flow", ["retrain", "finetune"])
@pytest.mark.parametrize("fails", [False, True])
def test_a_run_that_publishes_nothing_tells_what_a_command_has_decided(
    release: Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flow: str, fails: bool
) -> None:
    server, module = Server(), import_module(f"flows.{flow}")
    release.publish("old")

    def decide_nothing(*_: object) -> Any:
        assert deepfloyd("block", str(release.workspace), "1", "--reason", "blurred").exit_code == 0
        if fails:
            raise StorageError("the disk is full")
        return SimpleNamespace(version=SimpleNamespace(number=1))

    for name, fake in {
        "check_run": lambda *_, **__: SimpleNamespace(workspace=release.workspace),
        "sole_run": lambda _: nullcontext(),
        "settings": lambda *_, **__: (),
        "image_index": lambda _, plans=False: None,
        "make_bundle": decide_nothing,
        "_retrain": decide_nothing,
        "rename_run": lambda *_: None,
        "ended": lambda *_: None,
    }.items():
        monkeypatch.setattr(module, name, fake, raising=False)
    monkeypatch.setattr(events, "show", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(events, "get_client", lambda **_: server)
    failure = pytest.raises(StorageError) if fails else nullcontext()
    with temporary_settings({PREFECT_HOME: tmp_path / "home"}), failure:
        inspect.unwrap(getattr(module, flow).fn)("run.toml")
    assert server.names == [("promoted", 1), ("blocked", 1)]


@pytest.mark.parametrize("own", [True, False])
def test_deepfloyd_ui_tells_what_is_untold_whose_server_it_may_be(
    release: Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: bool
) -> None:
    server, home = Server(), tmp_path / "home"
    release.publish("old")
    remember(home, release.workspace)
    looked_after = "dead_runs.settle_ended", "dead_runs.settle_lost", "dead_runs.skip_missed", "stuck.tell_stuck"
    for name in looked_after:
        monkeypatch.setattr(f"flows.runs.{name}", lambda *_, **__: [])
    for name in ("deployments.offer_run_files", "notifications.keep_notifications"):
        monkeypatch.setattr(f"flows.serving.{name}", lambda *_: [])
    with temporary_settings({PREFECT_HOME: home}):
        _Watch(server.client, home, tmp_path, own).look(datetime.now(UTC))
    assert server.names == [("promoted", 1)]
