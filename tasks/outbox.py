"""Sends what is only shown (artifacts, progress, log records) to the Prefect server from a thread: no work waits.

No work fails because of it either. While the server is away, these calls wait here in order (of progress only the
newest), and are sent when the server answers again. Only flows need the server: Prefect cannot begin or end a flow
without it. So a flow waits for the server, up to PATIENCE_S; a failed flow up to IN_A_HURRY_S.
"""

import atexit
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable
from contextvars import Context, copy_context
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any, ParamSpec, TypeVar, cast

import httpx
from prefect import artifacts
from prefect.client.orchestration import get_client
from prefect.context import SettingsContext
from prefect.events import emit_event
from prefect.events.worker import EventsWorker
from prefect.logging.handlers import set_api_log_sink
from prefect.settings import PREFECT_API_URL

from deepfloyd_core.errors import JobError
from tasks.health import asked_once, healthy
from tasks.sentences import tell_in_sentences

log = logging.getLogger(__name__)

F = TypeVar("F", bound=Callable[..., Any])
_P = ParamSpec("_P")
_R = TypeVar("_R")

PATIENCE_S = 3600.0  # a flow's, with a server that is away
IN_A_HURRY_S = 5.0  # the same, for a flow that failed or was asked to stop, and when the process ends
ASK_EVERY_S = 2.0
GATHER_S = 1.0  # log records of this long are one request
LINES = 500  # of one request
MOST_LINES = 50_000  # kept while the server is away, the newest
TRIES = 3  # of a call that fails though the server answers


class ServerAwayError(JobError):
    """The Prefect server did not come back in time."""


@dataclass(frozen=True)
class Call:
    """A request to the server, made in its caller's context. slot: a newer call with the same one takes its place."""

    request: Callable[[], object]
    context: Context
    slot: Hashable | None = None


def show(function: Callable[..., object], *arguments: Any, **named: Any) -> None:
    """Call a function soon: after all earlier calls, when the server answers. Never raises."""
    process_outbox(os.getpid()).put(Call(partial(function, *arguments, **named), copy_context()))


def show_newest(slot: Hashable, function: Callable[..., object], *arguments: Any) -> None:
    """Like `show`, but it replaces a waiting call with the same slot."""
    process_outbox(os.getpid()).put(Call(partial(function, *arguments), copy_context(), slot))


def create_markdown_artifact(markdown: str, key: str, description: str) -> None:
    """Prefect's function of this name, called through `show`."""
    show(artifacts.create_markdown_artifact, markdown, key=key, description=description)


def server_awaited(flow_body: F) -> F:
    """A flow's function whose log records wait in the outbox, and that ends when everything is delivered.

    It raises JobError when the server does not come back within PATIENCE_S. A failed flow does not wait so long: if the
    server is away its error is reported at once, because Prefect then cannot end the flow and raises another error.
    """

    @wraps(flow_body)  # no `contextmanager`: Prefect pickles flows to send them to workers
    def body(*arguments: Any, **named: Any) -> Any:
        process_outbox(os.getpid()).flows_begun += 1
        take_records()
        tell_in_sentences()
        try:
            result = flow_body(*arguments, **named)
        except (ServerAwayError, httpx.HTTPError):  # of a server that did not come back
            raise
        except Exception as error:  # a flow that failed is recorded as well; one that was stopped does not wait
            process_outbox(os.getpid()).deliver_failed(error)
            raise
        await_server()
        return result

    return cast(F, body)


def take_records() -> None:
    """From now on the log records of this process also wait in the outbox."""
    set_api_log_sink(process_outbox(os.getpid()).put_line)


def await_server() -> None:
    """Deliver everything, and wait until the server answers: before a subflow (`call_subflow`), and at a flow's end.

    Raises ServerAwayError when it does not come back within PATIENCE_S.
    """
    if not process_outbox(os.getpid()).deliver(PATIENCE_S):
        raise ServerAwayError(
            f"The Prefect server at {_url()} has not answered for {PATIENCE_S / 60:.0f} minutes. Finished work is "
            "kept: start the server, and run the same command again."
        )


def call_subflow(flow: Callable[_P, _R], *arguments: _P.args, **named: _P.kwargs) -> _R:
    """Call a flow within a flow, when the server answers; once more if it went away just then, before the subflow began.

    Prefect begins a subflow with a new client, which does not try again where nobody listens: the run would fail.
    """
    await_server()
    before = process_outbox(os.getpid()).flows_begun
    try:
        return flow(*arguments, **named)
    except httpx.ConnectError:
        if process_outbox(os.getpid()).flows_begun != before:
            raise
        await_server()
        return flow(*arguments, **named)


def send_what_waits(patience_s: float) -> None:
    """Send what is waiting, before the process ends or its server is stopped; if the server is away, do not wait long."""
    process_outbox(os.getpid()).empty(patience_s)


def send_events() -> None:
    """Wait until Prefect has sent its events, but not if the server is away."""
    if not healthy(_url()):
        return
    waiting = threading.Thread(target=EventsWorker.instance().wait_until_empty, daemon=True)
    waiting.start()
    waiting.join(IN_A_HURRY_S)


class Outbox:
    """The queue and its thread, which starts with the first entry."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._calls: deque[Call] = deque()
        self._lines: deque[dict[str, Any]] = deque(maxlen=MOST_LINES)
        self._busy = self.away = self._hurry = False
        self._sent = 0
        self.flows_begun = 0  # in this process
        self._told: set[str] = set()
        self._context = copy_context()
        self._settings = SettingsContext.get()
        self._thread = threading.Thread(target=self._loop, name="outbox", daemon=True)

    def put(self, call: Call) -> None:
        """Queue a call."""
        with self._changed:
            waiting = [number for number, other in enumerate(self._calls) if other.slot == call.slot is not None]
            if waiting:
                self._calls[waiting[0]] = call
            else:
                self._calls.append(call)
            self._wake()

    def put_line(self, line: dict[str, Any]) -> None:
        """Queue a log record, as Prefect's handler prepares it."""
        with self._changed:
            self._settings = SettingsContext.get() or self._settings
            self._lines.append({key: value for key, value in line.items() if key != "__payload_size__"})
            self._wake()

    def empty(self, patience_s: float) -> bool:
        """Wait until nothing is queued; False when nothing was sent for patience_s."""
        with self._changed:
            self._hurry = True
            self._changed.notify_all()
            patient_until, sent = time.monotonic() + patience_s, self._sent
            while self._calls or self._lines or self._busy:
                self._changed.wait(ASK_EVERY_S)
                if self._sent > sent:
                    patient_until, sent = time.monotonic() + patience_s, self._sent
                elif time.monotonic() > patient_until:
                    break
            self._hurry = False
            return not (self._calls or self._lines or self._busy)

    def deliver(self, patience_s: float) -> bool:
        """Wait until nothing is queued and the server answers; False when it was away for patience_s."""
        return self.empty(patience_s) and self._back_within(patience_s)

    def deliver_failed(self, error: Exception) -> None:
        """Before a flow ends with this error. If the server is away, reports the error, once."""
        if not healthy(_url()):
            if str(error) in self._told:
                return
            self._told.add(str(error))
            log.error("%s", error)
        self.deliver(IN_A_HURRY_S)

    def _back_within(self, patience_s: float) -> bool:
        patient_until = time.monotonic() + patience_s
        while not healthy(_url()):
            self._note(away=True)
            if time.monotonic() > patient_until:
                return False
            time.sleep(ASK_EVERY_S)
        self._note(away=False)
        return True

    def _wake(self) -> None:
        """Called with the condition's lock."""
        if self._thread.ident is None:
            atexit.register(send_what_waits, IN_A_HURRY_S)
            self._thread.start()
        self._changed.notify_all()

    def _loop(self) -> None:
        while True:
            call = self._next()
            self._send(call)
            with self._changed:
                self._busy = False
                self._sent += 1
                self._changed.notify_all()

    def _next(self) -> Call:
        with self._changed:
            self._changed.wait_for(lambda: self._calls or self._lines)
            if not self._calls:
                self._changed.wait_for(lambda: self._calls or self._hurry, GATHER_S)
            self._busy = True
            if self._calls:
                return self._calls.popleft()
            lines = [self._lines.popleft() for _ in range(min(LINES, len(self._lines)))]
            return Call(partial(send_lines, lines), _settings_alone(self._settings))

    def _send(self, call: Call) -> None:
        """Until it is done, or of no use."""
        for _ in range(TRIES):
            try:
                call.context.run(_without_retries, call.request)
            except (httpx.TransportError, httpx.HTTPStatusError) as error:
                lost: Exception = error
                if isinstance(error, httpx.HTTPStatusError) and error.response.status_code < 500:
                    break
                time.sleep(ASK_EVERY_S)
                call.context.run(self._back_within, float("inf"))
            except Exception as error:  # whatever it is, it only showed something
                lost = error
                break
            else:
                return
        message = f"{type(lost).__name__}: {lost}".split("\n")[0]
        if message not in self._told:
            self._told.add(message)
            self._context.copy().run(log.warning, "an update of the Prefect UI failed: %s", message)

    def _note(self, *, away: bool) -> None:
        with self._changed:
            if self.away == away:
                return
            self.away = away
        own = self._context.copy()  # a flow's: the lines are in its log as well
        if away:
            message = "the Prefect server at %s does not answer; the run continues, and is shown there when it is back"
            own.run(log.warning, message, _url())
        else:
            own.run(log.info, "the Prefect server at %s answers again", _url())
            # Prefect keeps the events that it could not send, and sends them with its next one.
            own.run(emit_event, "deepfloyd.server-back", {"prefect.resource.id": "deepfloyd.outbox"})


_outboxes: dict[int, Outbox] = {}  # by process: no thread survives a fork


def process_outbox(process_id: int) -> Outbox:
    """The outbox of this process. Of two first callers one creates it; without a lock, which a fork would inherit locked."""
    return _outboxes.get(process_id) or _outboxes.setdefault(process_id, Outbox())


def _url() -> str:
    return str(PREFECT_API_URL.value())


def _without_retries(request: Callable[[], object]) -> None:
    with asked_once():
        request()


def _settings_alone(settings: SettingsContext | None) -> Context:
    """A context with a caller's settings, which in a worker elsewhere alone name the server; but without a flow's client,
    which ends with the flow."""
    context = Context()
    if settings is not None:
        context.run(SettingsContext.__var__.set, settings)
    return context


def send_lines(lines: list[dict[str, Any]]) -> None:
    with get_client(sync_client=True) as client:
        client.create_logs(lines)
