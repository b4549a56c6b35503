"""Reads a Prefect server's own log for errors of its background services, which neither the API nor the UI shows.

A scheduler that fails each minute leaves every schedule "active" and starts nothing. So a process that uses a server on
this machine reads the new lines of its log, and reports each error once.
"""

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from flows.serving.background import meanwhile

STARTED = b"-- the server is started\n"  # in the log before each server's own lines
LONGEST_TAIL = 1 << 18  # bytes of a log that are looked through for the newest start
READ_EVERY_S = 2.0
LONGEST_ERROR = 300  # characters
LONGEST_RECORD = 1 << 16  # of which the end is kept
_HEAD = re.compile(r"^\d\d:\d\d:\d\d\.\d+ \| (?P<level>[A-Z]+) *\| (?P<logger>\S+) - (?P<message>.*)$")
# SQLite refuses a worker's heartbeat now and then; the worker opens its channel again.
_REQUESTS = ("uvicorn", "prefect.server.utilities.worker_channel")
# A client sends its events again to a server that was restarted. If all of them are stored already, Prefect inserts an
# empty row, which SQLite refuses; nothing is lost.
_STORED_ALREADY = "NOT NULL constraint failed: events.occurred"
_TASK = re.compile(r"(\w+)\(.*\)\{\S*\}\s*$")  # how docket writes the service's function and its key
_VARYING = re.compile(r"0x[0-9a-f]+|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|\d+")


@dataclass(frozen=True)
class ServiceError:
    """An error of one of the server's background services."""

    service: str
    error: str

    @property
    def key(self) -> str:
        """Equal for the same error of two loops: without its numbers and identifiers."""
        return f"{self.service} {_VARYING.sub('#', self.error)}"


def service_error(record: str) -> ServiceError | None:
    """The error in a log record (its head line and the lines after it); None for any other record.

    Errors of requests do not count: the process that made the request gets the error, and tries again.
    """
    lines = record.rstrip().split("\n")
    head = _HEAD.match(lines[0])
    if head is None or head["level"] not in ("ERROR", "CRITICAL"):
        return None
    if head["logger"].startswith(_REQUESTS) or head["message"].startswith("Encountered "):
        return None
    if _STORED_ALREADY in record:
        return None
    named = _TASK.search(head["message"])
    return ServiceError(named[1] if named else head["logger"], (_raised(lines) or head["message"])[:LONGEST_ERROR])


def _raised(lines: list[str]) -> str:
    """The error of the last traceback: the first line below its frames. SQLAlchemy's errors continue with the SQL and a
    link.
    """
    for number in reversed(range(len(lines))):
        if lines[number].startswith("Traceback "):
            return next((line for line in lines[number + 1 :] if line and not line[0].isspace()), lines[-1]).strip()
    return lines[-1].strip() if len(lines) > 1 else ""


class LogReader:
    """Reads the new lines of a growing log. A record is returned when it is complete: another began, or time passed.

    before: so many bytes of what is there already are new to it as well.
    """

    def __init__(self, path: Path, before: int = 0) -> None:
        self.path = path
        self._offset = max(0, path.stat().st_size - before) if path.exists() else 0
        self._open = ""

    def errors(self, to_the_end: bool = False) -> list[ServiceError]:
        """The errors since the last call."""
        gained = self._gained()
        lines = (self._open + gained).split("\n")
        records, current = list[str](), list[str]()
        for line in lines:
            if current and _HEAD.match(line):
                records.append("\n".join(current))
                current = []
            current.append(line)
        self._open = "\n".join(current)[-LONGEST_RECORD:]
        if to_the_end or not gained:
            records.append(self._open)
            self._open = ""
        return [error for record in records if (error := service_error(record))]

    def _gained(self) -> str:
        try:
            with self.path.open("rb") as log:
                if log.seek(0, 2) < self._offset:
                    self._offset = 0  # somebody emptied it
                log.seek(self._offset)
                data = log.read()
        except OSError:  # not there yet, or no longer
            return ""
        self._offset += len(data)
        return data.decode(errors="replace")


def errors_since_start(path: Path) -> list[ServiceError]:
    """The errors in a log since the server was started last, each once."""
    with suppress(OSError), path.open("rb") as log:
        size = log.seek(0, 2)
        log.seek(max(0, size - LONGEST_TAIL))
        tail = log.read()
        reader = LogReader(path, before=len(tail) - max(0, tail.rfind(STARTED)))
        return list({error.key: error for error in reader.errors(to_the_end=True)}.values())
    return []


def put_aside(path: Path, largest: int) -> None:
    """Rename a log of more than so many bytes to NAME.1, in place of an older one."""
    if path.exists() and path.stat().st_size > largest:
        path.replace(path.with_name(f"{path.name}.1"))


@contextmanager
def errors_told(log: LogReader, tell: Callable[[str], None]) -> Iterator[None]:
    """In this block, report every service error that appears in the log in one line; each error once."""
    told = set[str]()

    def look(to_the_end: bool = False) -> None:
        for found in log.errors(to_the_end):
            if found.key not in told:
                told.add(found.key)
                tell(f"the Prefect server's service {found.service} fails: {found.error} (log: {log.path})")

    def loop(ended: threading.Event) -> None:
        while not ended.wait(READ_EVERY_S):
            look()

    try:
        with meanwhile("server-log", loop):
            yield
    finally:
        look(to_the_end=True)
