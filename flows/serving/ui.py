"""`deepfloyd ui`: a Prefect server, a process worker and the deployments of prefect.yaml, on loopback.

It watches what it started: a worker or a server that ends is started again, and runs whose process was killed get their
true state (`dead_runs`).
"""

import fcntl
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import UUID

from rich.console import Console

from deepfloyd_core.errors import ConfigError, DeepFloydError
from deepfloyd_core.store.file_faults import flock
from flows.serving.api import check_guarded
from flows.serving.home import PRIVATE, default_home, open_home
from flows.serving.profile import prefect_command
from flows.serving.proxies import past_proxy
from flows.serving.server import page_address, prefect_server
from flows.serving.worker import LOG, POOL, bound_worker, worker_name
from tasks.terminal import is_watched

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

log = logging.getLogger(__name__)

USUAL_PORT = 4200
WATCH_EVERY_S = 5.0
TOLD_AGAIN_S = 3600.0
SELDOM, RARELY = 6, 120  # of so many looks one costs several requests


def serve_ui(port: int | None, deploys_elsewhere: bool, out: Console) -> None:
    """Run until a signal ends it and everything that it started.

    deploys_elsewhere: also deploy to a server that PREFECT_API_URL names. Raises ConfigError when there is no
    prefect.yaml, this home has a `ui` already, or the server that is named lets anybody in; JobError when a part does
    not start.
    """
    home, project, own = default_home(), project_folder(), not os.environ.get("PREFECT_API_URL")
    before = past_proxy()
    open_home(home)
    with _the_only_one(home), prefect_server(home, port, USUAL_PORT) as url:
        check_guarded(url)
        from prefect.client.orchestration import get_client

        from flows.serving.deployments import deploy, make_pool
        from flows.serving.terminal_log import log_to_terminal

        log_to_terminal()
        # The folder `datasets` must not pass for Hugging Face's package in a flow's process.
        os.environ["PYTHONSAFEPATH"] = "1"
        with get_client(sync_client=True) as client:
            make_pool(client)
            if own or deploys_elsewhere:
                deploy(client, project, home)
            watch = _Watch(client, home, project, own)
            watch.look(datetime.now(UTC))  # before there is a worker
            with bound_worker(project, home) as worker:
                out.print(f"Prefect UI   {page_address(url, home, is_watched(out))}")
                out.print(f"Deployments  {project / 'prefect.yaml'}")
                out.print(f"In another terminal: {before}{prefect_command(home, url)} deployment run 'finetune/demo'")
                out.print(f"Worker's log {home / LOG}. Ctrl-C stops everything.")
                while True:
                    time.sleep(WATCH_EVERY_S)
                    worker.keep_up(watch.away_s < 2 * WATCH_EVERY_S)
                    watch.look(worker.since)


def project_folder(installed: Path = Path(__file__).parents[2]) -> Path:
    """The folder whose prefect.yaml is deployed: the current directory, else the folder that the package is installed
    from.
    """
    for folder in (Path.cwd(), installed):
        if (folder / "prefect.yaml").is_file():
            return folder
    raise ConfigError(
        f"There is no prefect.yaml in the current directory, {Path.cwd()}, nor in {installed}, where the package is. "
        "Run this from the project's directory."
    )


@contextmanager
def _the_only_one(home: Path) -> Iterator[None]:
    """Hold the home's lock of `ui`: of two workers each would take the other's runs for dead."""
    path = home / "ui.lock"
    with open(path, "a+", opener=PRIVATE) as lock:
        try:
            flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB, path, "Set PREFECT_HOME to a folder on a local disk")
        except BlockingIOError:
            lock.seek(0)
            pid = lock.read().strip() or "another process"
            raise ConfigError(
                f"`deepfloyd ui` of {home} is running already, as process {pid}. Use its pages, stop it first, or set "
                "PREFECT_HOME to another folder."
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


@dataclass
class _Watch:
    """What is looked at again and again: dead and missed runs, and the run files that deployments can name."""

    client: "SyncPrefectClient"
    home: Path
    project: Path
    own: bool  # the server is of this home, which then looks after all runs that no other worker has begun
    told: dict[str, float] = field(default_factory=dict)  # when each fault was told
    settled: set[UUID] = field(default_factory=set)  # crashed runs that need no further look
    looks: int = 0
    worker_since: datetime | None = None
    answered: float = field(default_factory=time.monotonic)

    @property
    def away_s(self) -> float:
        """Since when the server has not answered."""
        return time.monotonic() - self.answered

    def look(self, worker_since: datetime) -> None:
        """Settle what there is. What fails is told once, and tried again the next time; the other parts go on.

        worker_since: when this home's worker was started.
        """
        from prefect.settings import PREFECT_HOME

        from flows.runs.dead_runs import settle_ended, settle_lost, skip_missed
        from flows.runs.stuck import tell_stuck
        from flows.serving.deployments import offer_run_files
        from flows.serving.notifications import keep_notifications
        from tasks.events import tell_untold

        client, runs = self.client, Path(PREFECT_HOME.value())  # where the runs of the worker have their leases
        self._part(lambda: settle_ended(client, runs, again=True))
        if self.looks % SELDOM == 0 or worker_since != self.worker_since:
            self.worker_since, name = worker_since, worker_name(self.home)
            self._part(lambda: settle_lost(client, runs, POOL, name, self.own, self.settled, worker_since))
            self._part(lambda: tell_untold(client, runs))
        if self.own and self.looks % SELDOM == 0:
            self._part(lambda: offer_run_files(client, self.project))
            self._part(lambda: keep_notifications(client))
        if self.own and self.looks % RARELY == 0:
            self._part(lambda: tell_stuck(client, self.home))
        self._part(lambda: skip_missed(client, POOL))
        self.looks += 1

    def _part(self, look: Callable[[], list[str]]) -> None:
        import httpx
        from prefect.exceptions import PrefectException

        try:
            lines = look()
            self.answered = time.monotonic()
        except (httpx.HTTPError, PrefectException, DeepFloydError, OSError, ValueError) as error:
            if not isinstance(error, httpx.TransportError):
                self.answered = time.monotonic()
            lines = [f"the runs cannot be looked after: {type(error).__name__}: {error}".split("\n")[0]]
            now, told = time.monotonic(), self.told.get(lines[0])
            if told is not None and now - told < TOLD_AGAIN_S:
                return
            self.told[lines[0]] = now
        for line in lines:
            log.warning("%s", line)
