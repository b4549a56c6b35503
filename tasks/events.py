"""Events of ours on the Prefect server, for automations: what happened to a version, and that the pictures changed.

The resource of each is the workspace, `deepfloyd.workspace.NAME`. What happened to versions follows from the workspace's
own records (`store/happenings.py`), so that a killed run and a command without a server lose none: the next `finetune` or
`retrain` of the workspace, or `deepfloyd ui`, sends it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.events import Event, emit_event
from prefect.settings import PREFECT_HOME

from deepfloyd_core.errors import DeepFloydError
from deepfloyd_core.store.happenings import WORKSPACES, Happening, mark_told, remember, untold
from deepfloyd_core.store.locks import locked
from tasks.outbox import show
from tasks.version_page import show_serving_version


@contextmanager
def versions_told(workspace: Path) -> Iterator[None]:
    """After the block, what is untold (`deepfloyd.version.candidate`, `.promoted`, `.blocked`) is sent, soon or by the next
    who can.
    """
    remember(Path(PREFECT_HOME.value()), workspace)
    try:
        yield
    finally:
        show(_send, workspace)


def tell_untold(client: SyncPrefectClient, home: Path) -> list[str]:
    """Send what is untold of the workspaces of a home, and show the version that serves then. Returns a line for each event.

    Raises Prefect's errors, and a workspace's after the others had their turn.
    """
    told, faults = list[str](), list[DeepFloydError | OSError]()
    for file in sorted((home / WORKSPACES).glob("*")):
        try:
            workspace = Path(file.read_text())
            if (workspace / "versions").is_dir():  # else its disk is away, or it was removed
                news = [f"{workspace.name}: {one.message}" for one in send_untold(client, workspace)]
                if news:
                    show_serving_version(workspace)
                told += news
        except (DeepFloydError, OSError) as error:
            faults.append(error)
    if faults:
        raise faults[0]
    return told


def send_untold(client: SyncPrefectClient, workspace: Path) -> tuple[Happening, ...]:
    """Send what is untold of a workspace, then record that. Raises Prefect's errors where the server does not take it."""
    with locked(workspace, "told"):
        news = untold(workspace)
        if news.happenings:
            events = [_event(workspace, one).model_dump(mode="json") for one in news.happenings]
            client.request("POST", "/events", json=events)
            mark_told(workspace, news.last)
    return news.happenings


def emit_data_changed(workspace: Path, lines: list[str]) -> None:
    """Emit `deepfloyd.data.changed`, with a line for each kind of change. Prefect keeps it while it cannot send it."""
    emit_event("deepfloyd.data.changed", _resource(workspace), payload={"message": "; ".join(lines)})


def _send(workspace: Path) -> None:
    with get_client(sync_client=True) as client:
        send_untold(client, workspace)


def _event(workspace: Path, one: Happening) -> Event:
    event = {
        "id": one.id,
        "event": f"deepfloyd.version.{one.kind}",
        "resource": _resource(workspace),
        "payload": {"version": one.version, "message": one.message, "when": one.when},
        "occurred": one.when,  # else an event that is told late looks new
    }
    return Event.model_validate(event)


def _resource(workspace: Path) -> dict[str, str]:
    return {
        "prefect.resource.id": f"deepfloyd.workspace.{workspace.name}",
        "prefect.resource.name": workspace.name,
        "deepfloyd.workspace": str(workspace.absolute()),
    }
