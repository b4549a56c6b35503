"""The runs of the year's deployment, as its server tells of them."""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any
from urllib.error import HTTPError

from prefect_api import PrefectApi
from year_records import State

DEPLOYMENT = "retrain/nightly"
LONGEST_S = 900.0  # of a night, until it is taken for a hang
AGAIN_S = 240.0  # how long a crashed run may wait for the run that replaces it
ENDED = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")


@dataclass(frozen=True)
class Told:
    """What a run that is over has told."""

    name: str
    state: str
    state_name: str
    message: str
    tags: tuple[str, ...]

    @property
    def is_final(self) -> bool:
        """Whether it is over."""
        return self.state in ENDED

    @property
    def is_skipped(self) -> bool:
        """Whether it made way for another."""
        return self.state_name == "Skipped"

    @property
    def is_last(self) -> bool:
        """Whether no other run stands for it."""
        return not self.is_skipped and "replaced" not in self.tags

    @property
    def outcome(self) -> str:
        """In a word or three."""
        if self.is_skipped:
            return "skipped"
        if self.state == "CRASHED":
            return "crashed, run again" if "replaced" in self.tags else "crashed"
        if self.state != "COMPLETED":
            return self.state.lower()
        if self.message.startswith("no change"):
            return "waited for more pictures" if "waiting" in self.message else "no change"
        return "published" if self.message.startswith("published") else "blocked"

    @property
    def words(self) -> str:
        """For the log."""
        return f"{self.state_name}: {self.message}" if self.message else self.state_name

    def is_honest(self, before: State, after: State, disk_full: bool) -> bool:
        """Whether the disk agrees."""
        numbers = [int(one) for one in re.findall(r"version (\d+)", self.message)]
        match self.outcome:
            case "no change" | "waited for more pictures":
                return f"version {after.champion} serves" in self.message
            case "published":
                return numbers[0] == after.champion and numbers[0] in after.numbers - before.numbers
            case "blocked":
                return numbers[0] in after.blocked and before.champion == after.champion
            case "failed":
                return disk_full and "space" in self.message
            case "skipped" | "crashed, run again" | "crashed":
                return True
        return False


@dataclass
class Runs:
    """The deployment's runs. A server that is away is asked again."""

    api: Callable[[], PrefectApi]
    seen: set[str] = field(default_factory=set)

    def tick(self, at: datetime) -> None:
        """Let the server schedule the run of one tick."""
        body = {"start_time": at.isoformat(), "end_time": (at + timedelta(seconds=1)).isoformat(), "max_runs": 1,
                "min_runs": 1, "min_time": 0.0}  # fmt: skip
        self._ask(lambda api: api.post(f"deployments/{api.deployment(DEPLOYMENT)['id']}/schedule", body))

    def settled(self, forget: bool = True) -> list[Told]:
        """The runs that are new, when they are over and no other run is to follow, or after LONGEST_S.

        forget: they are not new to the next call.
        """
        began, crashed = time.monotonic(), 0.0
        while time.monotonic() - began < LONGEST_S:
            new = self._new()
            is_over = bool(new) and all(run["state_type"] in ENDED for run in new)
            waits = [
                run for run in new if run["state_type"] == "CRASHED" and not {"replaced", "again"} & {*run["tags"]}
            ]
            crashed = crashed or time.monotonic() if is_over and waits else 0.0
            if is_over and (not waits or time.monotonic() - crashed > AGAIN_S):
                break
            time.sleep(0.5)
        self.seen |= {run["id"] for run in new} if forget else set()
        return [Told(run["name"], run["state_type"], run["state_name"], run["state"]["message"] or "", tuple(run["tags"]))
                for run in new]  # fmt: skip

    def pid(self) -> int | None:
        """The process of a new run that is under way."""
        for run in self._new():
            if run["state_type"] == "RUNNING" and run["infrastructure_pid"]:
                return int(str(run["infrastructure_pid"]).rpartition(":")[2])
        return None

    def are_over(self) -> bool:
        """Whether there are new runs, and all of them are over."""
        new = self._new()
        return bool(new) and all(run["state_type"] in ENDED for run in new)

    def ended(self, run: str) -> str:
        """The last state of a run, after its end or LONGEST_S."""
        began = time.monotonic()
        while (state := str(self._ask(lambda api: api.state(run)))) not in ENDED:
            if time.monotonic() - began > LONGEST_S:
                break
            time.sleep(0.5)
        return state

    def open_ones(self) -> list[str]:
        """The names of all runs, of any flow, that are not over."""
        states = {"state": {"type": {"any_": ["SCHEDULED", "PENDING", "RUNNING", "CANCELLING", "PAUSED"]}}}
        return [run["name"] for run in self._ask(lambda api: api.post("flow_runs/filter", {"flow_runs": states}))]

    def _new(self) -> list[dict[str, Any]]:
        flow, deployment = DEPLOYMENT.split("/")
        body = {"flows": {"name": {"any_": [flow]}}, "deployments": {"name": {"any_": [deployment]}},
                "flow_runs": {"id": {"not_any_": sorted(self.seen)}}, "limit": 200}  # fmt: skip
        runs: list[dict[str, Any]] = self._ask(lambda api: api.post("flow_runs/filter", body))
        return [run for run in runs if run["id"] not in self.seen]

    def _ask(self, question: Callable[[PrefectApi], Any]) -> Any:
        until = time.monotonic() + LONGEST_S
        while True:
            try:
                return question(self.api())
            except HTTPError as error:
                if error.code < 500 or time.monotonic() > until:
                    raise
            except OSError:
                if time.monotonic() > until:
                    raise
            time.sleep(0.3)
