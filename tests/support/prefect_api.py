"""Requests to the API of a real Prefect server of ours, with its password."""

import json
import os
import time
import urllib.error
import urllib.request
from base64 import b64encode
from dataclasses import dataclass
from typing import Any

OPEN = ["SCHEDULED", "PENDING", "RUNNING", "CANCELLING"]


def post(url: str, path: str, body: dict[str, Any], login: str | None = None) -> Any:
    """The answer to a request. url: as PREFECT_API_URL; login: user:password, by default that of the environment."""
    return PrefectApi(url, login).post(path, body)


@dataclass(frozen=True)
class PrefectApi:
    """A server's API. login: as for `post`."""

    url: str
    login: str | None = None

    def get(self, path: str) -> Any:
        """The answer to GET."""
        return self._ask("GET", path, None)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The answer to POST."""
        return self._ask("POST", path, body)

    def patch(self, path: str, body: dict[str, Any]) -> Any:
        """The answer to PATCH."""
        return self._ask("PATCH", path, body)

    def deployment(self, name: str) -> Any:
        """A deployment, by FLOW/NAME."""
        return self.get(f"deployments/name/{name}")

    def run(self, deployment: str, parameters: dict[str, Any]) -> str:
        """Begin a run of a deployment, and return its id."""
        body = {"parameters": parameters, "state": {"type": "SCHEDULED"}}
        return str(self.post(f"deployments/{self.deployment(deployment)['id']}/create_flow_run", body)["id"])

    def state(self, run: str) -> str:
        """The type of a flow run's state."""
        return str(self.get(f"flow_runs/{run}")["state_type"])

    def cancel(self, run: str) -> None:
        """Ask for the end of a flow run."""
        self.post(f"flow_runs/{run}/set_state", {"state": {"type": "CANCELLING"}})

    def states_of(self, config: str) -> list[str]:
        """The types of the states of the flow runs of a run file, the oldest run first."""
        runs = self.post("flow_runs/filter", {"sort": "START_TIME_ASC"})
        return [run["state_type"] for run in runs if run["parameters"].get("config") == config]

    def create_webhook(self, name: str, url: str) -> None:
        """Create a block that sends notifications to an address."""
        kind = self.get("block_types/slug/webhook")["id"]
        (schema,) = self.post("block_schemas/filter", {"block_schemas": {"block_type_id": {"any_": [kind]}}})
        body = {"name": name, "data": {"url": url}, "block_type_id": kind, "block_schema_id": schema["id"]}
        self.post("block_documents/", body)

    def tagged(self, tag: str) -> list[str]:
        """The flow runs with a tag."""
        return [run["id"] for run in self.post("flow_runs/filter", {"flow_runs": {"tags": {"all_": [tag]}}})]

    def count(self, flow: str, state: str) -> int:
        """How many runs of a flow are in a state."""
        runs = {"flows": {"name": {"any_": [flow]}}, "flow_runs": {"state": {"type": {"any_": [state]}}}}
        return int(self.post("flow_runs/count", runs))

    def open_runs(self, flow: str) -> list[str]:
        """The names of a flow's runs that began and have not ended."""
        runs = {"flows": {"name": {"any_": [flow]}}, "flow_runs": {"state": {"type": {"any_": OPEN[1:]}}}}
        return [run["name"] for run in self.post("flow_runs/filter", runs)]

    def open_task_runs(self, run: str) -> list[str]:
        """The names of a flow run's tasks that have not ended."""
        tasks = {"flow_runs": {"id": {"any_": [run]}}, "task_runs": {"state": {"type": {"any_": OPEN}}}}
        return [task["name"] for task in self.post("task_runs/filter", tasks)]

    def _ask(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        login = os.environ.get("PREFECT_API_AUTH_STRING", "") if self.login is None else self.login
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", "Authorization": f"Basic {b64encode(login.encode()).decode()}"}
        request = urllib.request.Request(f"{self.url}/{path}", data, headers, method=method)
        while True:
            try:
                with urllib.request.urlopen(request, timeout=30) as answer:
                    text = answer.read()
                return json.loads(text) if text else None
            except urllib.error.HTTPError as error:
                if error.code != 503:  # SQLite is busy: Prefect's own clients try again too
                    raise
                time.sleep(0.5)
