"""What happened to versions, for whoever waits for it: derived from the events on record, each told once.

`<workspace>/versions/told` has the number of the last event that was told. It is written after the telling, so that a
kill in between tells an event twice, with one id, and never loses it. Commands that reach no server leave theirs untold,
for the next who does: `<home>/workspaces/` of Prefect's home names the workspaces to look into. A workspace without a mark
may be new, or old and restored: of such a one only young events are told.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import NAMESPACE_URL, UUID, uuid5

from deepfloyd_core.errors import ArtifactError
from deepfloyd_core.files import read_sealed, write_bytes, write_sealed
from deepfloyd_core.hashing import digest
from deepfloyd_core.store.events import FOLDER, Event, Kind, LostEvent, Standing, fold, read_events
from deepfloyd_core.store.locks import locked

YOUNG = timedelta(days=3)  # as long as a Prefect server of ours keeps events
WORKSPACES = "workspaces"
_TOLD = "told"


@dataclass(frozen=True)
class Happening:
    """Something that a person or an automation may want to know."""

    kind: Kind
    version: int
    message: str  # a sentence
    when: str  # ISO 8601, UTC
    id: UUID  # the same each time that it is told


@dataclass(frozen=True)
class News:
    """What was not told yet."""

    happenings: tuple[Happening, ...]
    last: int  # the number of the last event


def untold(workspace: Path) -> News:
    """What happened since the last that was told.

    Without a mark: what is YOUNG. A mark that is damaged, or beyond the last event (an older backup has replaced the
    events), counts as if all had been told.
    """
    with locked(workspace, FOLDER):  # so that a verdict is on record with what follows from it
        events = read_events(workspace)
    if not events:
        return News((), 0)
    try:
        told: int | None = int(read_sealed(_mark(workspace), "It is written anew")["last"])
    except FileNotFoundError:
        told = _first_young(events)
    except (ArtifactError, KeyError, ValueError):
        told = None
    if told is None or told > len(events):
        told = len(events)
        mark_told(workspace, told)
    return News(tuple(_since(events, told)), len(events))


def mark_told(workspace: Path, last: int) -> None:
    """Record that everything up to an event was told."""
    write_sealed(_mark(workspace), {"last": last})


def remember(home: Path, workspace: Path) -> None:
    """Name a workspace in Prefect's home, so that what is untold of it is looked for."""
    place = str(workspace.absolute())
    file = home / WORKSPACES / digest(place)
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(file, place.encode())


def _first_young(events: Sequence[Event | LostEvent]) -> int | None:
    """The place of the first young event; None if all are older."""
    since = datetime.now(UTC) - YOUNG
    places = enumerate(events)
    return next((i for i, one in places if isinstance(one, Event) and datetime.fromisoformat(one.when) > since), None)


def _mark(workspace: Path) -> Path:
    return workspace / FOLDER / _TOLD


def _since(events: Sequence[Event | LostEvent], told: int) -> Iterator[Happening]:
    """Candidates that wait for a person, blocks, and each version that begins to serve: promoted, or after a rollback."""
    for place in range(told, len(events)):
        event = events[place]
        if isinstance(event, LostEvent):
            continue
        before, after = (fold(events[:end]) for end in (place, place + 1))
        serves, served = _champion(after), _champion(before)
        why = f": {event.reason}" if event.reason else ""
        now = "no version serves" if serves is None else f"version {serves} serves"
        if event.kind == "candidate" and not _is_decided(events[place + 1 :], event.version):
            yield _happening(event, event.kind, event.version, f"version {event.version} is a candidate{why}; {now}")
        elif event.kind == "blocked":
            sentence = f"version {event.version} is blocked{why}; {now}"
            yield _happening(event, event.kind, event.version, sentence)
            if serves is not None and serves != served:
                yield _happening(event, "promoted", serves, sentence)
        elif event.kind == "promoted" and serves != served:
            yield _happening(event, event.kind, event.version, f"version {event.version} is promoted and serves{why}")


def _is_decided(later: Sequence[Event | LostEvent], version: int) -> bool:
    """Whether a verdict was followed by what it leads to, so that nobody need decide."""
    return any(isinstance(one, Event) and one.version == version for one in later)


def _champion(standing: Standing) -> int | None:
    try:
        return standing.champion
    except ArtifactError:
        return None


def _happening(event: Event, kind: Kind, version: int, message: str) -> Happening:
    name = f"deepfloyd {event.number} {event.version} {event.when} {kind} {version} {event.by}"
    return Happening(kind, version, message, event.when, uuid5(NAMESPACE_URL, name))
