"""What happened to each version, and which one serves: an append-only list of sealed records, and a fold over them.

`<workspace>/versions/events/NNNNNN.json` is written once, under the lock of versions, and never rewritten. `promoted N`
pushes N and unblocks it, `blocked N` blocks it; the champion is the last pushed version that is not blocked. So a
rollback is the block of the champion: the one before serves again.

A record that is damaged or missing could have said anything. Nothing below it decides which version serves, so there is
no champion until a later record promotes one. Its number is not used again. Reading costs 0.1 ms a record.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from deepfloyd_core.errors import ArtifactError
from deepfloyd_core.files import make_folder, read_sealed
from deepfloyd_core.store.mirror import write_record
from deepfloyd_core.store.verdicts import GateReport

FOLDER = "versions"
SERVING = ("latest", "champion")  # what people call the version that serves
OF_FOLDER = "bundle "  # how the name of one begins that lies outside of its workspace
_EVENTS = "events"
_RECORD = re.compile(r"\d{6,}\.json")

Kind = Literal["candidate", "promoted", "blocked"]
State = Literal["candidate", "champion", "former", "blocked", "unknown"]


class Event(BaseModel):
    """Something that happened to a version."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    number: int
    version: int
    kind: Kind
    reason: str
    by: str  # the run file, or the command
    when: str  # ISO 8601, UTC
    report: GateReport | None = None  # the gate's, of a candidate


@dataclass(frozen=True)
class LostEvent:
    """A record that is damaged or missing."""

    number: int
    fault: str  # a sentence without its full stop
    is_unread: bool = False  # the disk failed, and may not the next time


@dataclass(frozen=True)
class Standing:
    """What the events come to. A version without any event is a candidate that was not judged."""

    pushed: tuple[int | LostEvent, ...]
    blocked: Mapping[int, Event]  # the last block of each version that is blocked
    candidates: Mapping[int, Event]  # the last verdict of each version that has one

    @property
    def champion(self) -> int | None:
        """The version that serves. Raises ArtifactError when a lost record might have changed it."""
        return self.champion_without(None)

    def champion_without(self, number: int | None) -> int | None:
        """The version that would serve if this one were blocked. Raises as `champion`."""
        for one in reversed(self.pushed):
            if isinstance(one, LostEvent):
                raise ArtifactError(
                    f"{one.fault}, so it is not known which version serves. `deepfloyd promote WORKSPACE N` settles it."
                )
            if one not in self.blocked and one != number:
                return one
        return None

    @property
    def served(self) -> tuple[int, ...]:
        """The champion, and the versions that would serve one after the other if it were rolled back. Raises as
        `champion`.
        """
        served: list[int] = []
        if self.champion is not None:
            for one in reversed(self.pushed):
                if isinstance(one, LostEvent):
                    break
                if one not in self.blocked and one not in served:
                    served.append(one)
        return tuple(served)

    def state_of(self, number: int) -> State:
        """The state of a version; `unknown` while it is not known which one serves, unless it is blocked."""
        if number in self.blocked:
            return "blocked"
        try:
            champion = self.champion
        except ArtifactError:
            return "unknown"
        if number == champion:
            return "champion"
        return "former" if number in self.pushed else "candidate"


def fold(events: Iterable[Event | LostEvent]) -> Standing:
    """The state after events, which are in their order."""
    pushed: list[int | LostEvent] = []
    blocked: dict[int, Event] = {}
    candidates: dict[int, Event] = {}
    for event in events:
        if isinstance(event, LostEvent):
            pushed.append(event)
        elif event.kind == "promoted":
            pushed.append(event.version)
            blocked.pop(event.version, None)
        elif event.kind == "blocked":
            blocked[event.version] = event
        else:
            candidates[event.version] = event
    return Standing(tuple(pushed), blocked, candidates)


def read_events(workspace: Path) -> list[Event | LostEvent]:
    """All events, oldest first; a LostEvent for each record that is damaged, or missing below the highest number."""
    return [_read(workspace, number) for number in range(1, _last(workspace) + 1)]


def standing(workspace: Path) -> Standing:
    """The state of the versions of a workspace."""
    return fold(read_events(workspace))


def append_event(
    workspace: Path, version: int, kind: Kind, reason: str, by: str, report: GateReport | None = None
) -> Event:  # fmt: skip
    """Append an event. The caller holds the lock of versions (`locked(workspace, FOLDER)`)."""
    number, when = _last(workspace) + 1, datetime.now(UTC).isoformat(timespec="seconds")
    event = Event(
        number=number, version=version, kind=kind, reason=" ".join(reason.split()), by=by, when=when, report=report
    )
    file = _record(workspace, number)
    make_folder(file.parent)
    write_record(workspace, file, event.model_dump(mode="json"), once=True)
    return event


def _record(workspace: Path, number: int) -> Path:
    return workspace / FOLDER / _EVENTS / f"{number:06d}.json"


def _last(workspace: Path) -> int:
    """The highest number of a record, damaged or not; 0 without any."""
    files = (workspace / FOLDER / _EVENTS).glob("*.json")
    return max((int(file.stem) for file in files if _RECORD.fullmatch(file.name)), default=0)


def _read(workspace: Path, number: int) -> Event | LostEvent:
    file = _record(workspace, number)
    try:
        event = Event.model_validate(read_sealed(file, "It tells what happened to a version"))
    except FileNotFoundError:
        return LostEvent(number, f"{file} is missing")
    except OSError as error:
        return LostEvent(number, f"{file} cannot be read: {error.strerror}", is_unread=True)
    except ValidationError:
        return LostEvent(number, f"{file} is a sealed record, and not of an event")
    except ArtifactError as error:
        return LostEvent(number, str(error).removesuffix(". It tells what happened to a version."))
    if event.number != number:
        return LostEvent(number, f"{file} is the record of event {event.number}")
    return event
