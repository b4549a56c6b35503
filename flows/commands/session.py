"""What the commands share that make things: the run file that they load, and their session with a Prefect server."""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.commands.stopping import Stopping
from tasks.terminal import console, is_watched, labelled

if TYPE_CHECKING:
    from deepfloyd_core.config.run import Run
    from deepfloyd_core.preflight.check import Goal

out, err = console(), console(stderr=True)
stopping = Stopping(err)


@dataclass(frozen=True)
class Loaded:
    """The run file that a command names, and the run that it holds. A flow is called with the file: it loads it itself."""

    config: Path
    overrides: list[str]
    run: "Run"


def load(config: Path, overrides: list[str] | None, goal: "Goal") -> Loaded:
    """Called once a command, because it opens every source of the run. Checks this machine only; the flow checks the
    rest as well.
    """
    from deepfloyd_core.preflight.check import check_run

    return Loaded(config, overrides or [], check_run(config, tuple(overrides or ()), goal, elsewhere=False))


def print_notes(notes: Iterable[str]) -> None:
    """Print notes for the user."""
    for note in notes:
        err.print(labelled("note", "yellow", note))


@contextmanager
def session(loaded: Loaded, flow: str) -> Iterator[Callable[..., Any]]:
    """Print the notes on the configuration, join a Prefect server, and yield a function that calls a flow.

    flow: as MODULE:NAME. It is imported, and Prefect with it, while a server starts.
    """
    from deepfloyd_core.processes.jobs import imported
    from deepfloyd_core.store.versions import damaged_records
    from flows.serving.api import server_needed, without_heartbeats
    from flows.serving.home import default_home
    from flows.serving.server import look_for_room, page_address, prefect_server
    from flows.serving.terminal_log import log_to_terminal

    workspace = loaded.run.workspace
    print_notes([*loaded.run.notes, *damaged_records(workspace)])
    stopping.kept = f"Finished work is kept in {workspace}; the same command resumes it."
    if err.is_terminal:  # else nothing is seen until the server answers: 6 s, on a busy machine 30
        err.print("Prefect: joining a server, or starting one, which takes some seconds")
    with prefect_server(default_home(), while_it_starts=lambda: imported(flow)) as url:
        for name in ("CONSOLE", "DEBUG"):
            os.environ[f"PREFECT_LOGGING_HANDLERS_{name}_LEVEL"] = "CRITICAL"  # for the workers that a run starts
        log_to_terminal()
        from flows.runs.dead_runs import settle_here

        print_notes(settle_here())

        def call(**parameters: Any) -> Any:
            err.print(f"Prefect: {page_address(url, default_home(), is_watched(err))}")
            with server_needed(url, lambda at: look_for_room(at, default_home())), without_heartbeats():
                return imported(flow)(config=str(loaded.config), overrides=loaded.overrides, **parameters)

        try:
            yield call
        finally:
            _flush_prefect()


def _flush_prefect() -> None:
    """Send the requests that Prefect has queued; without the server, the last task runs and log lines would be lost."""
    from prefect.events.worker import EventsWorker

    from tasks.outbox import send_what_waits

    patience_s = 1.0 if stopping.asked else 10.0
    send_what_waits(patience_s)
    EventsWorker.drain_all(timeout=patience_s)
