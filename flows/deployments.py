"""Deploys the flows of prefect.yaml, and keeps what the user has changed in the UI since the last time.

`prefect deploy` replaces a deployment: a paused schedule would be active again. So the schedules and the pause of a
deployment are put back, unless prefect.yaml has other schedules than when it was deployed last. A pool or a queue that
is there is left as it is. The parameter `config` becomes a choice of the run files of the project.
"""

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import DeploymentScheduleUpdate, DeploymentUpdate, WorkPoolCreate
from prefect.client.schemas.responses import DeploymentResponse
from prefect.exceptions import ObjectNotFound
from prefect.workers.process import ProcessWorker

from deepfloyd_core.errors import JobError
from deepfloyd_core.files import canonical_json, write_bytes
from tasks import VERSION

POOL = "deepfloyd"
TRAINING = "training"  # the queue of deployments that train: one run at a time
FOLDERS = (".", "flows/configs")  # of a project, where run files are looked for
RECORD = "deployed.json"  # in PREFECT_HOME: the schedules that prefect.yaml had


def make_pool(client: SyncPrefectClient) -> None:
    """Make the process pool and its queue for trainings, unless they are there."""
    try:
        client.read_work_pool(POOL)
    except ObjectNotFound:
        template = ProcessWorker.get_default_base_job_template()
        client.create_work_pool(WorkPoolCreate(name=POOL, type="process", base_job_template=template))
    try:
        client.read_work_queue_by_name(TRAINING, work_pool_name=POOL)
    except ObjectNotFound:
        client.create_work_queue(TRAINING, work_pool_name=POOL, concurrency_limit=1)


def deploy(client: SyncPrefectClient, project: Path, home: Path) -> None:
    """Deploy every flow of the project's prefect.yaml. Raises JobError when Prefect refuses it."""
    before = {one.id: one for one in client.read_deployments()}
    planned = _planned(project)
    record = home / RECORD
    known: dict[str, Any] = json.loads(record.read_text()) if record.exists() else {}
    _prefect(project, "--no-prompt", "deploy", "--all")
    for deployment in client.read_deployments():
        if deployment.id not in before or before[deployment.id].updated != deployment.updated:
            _complete(client, deployment, project)
        key = f"{deployment.entrypoint}:{deployment.name}"
        if (old := before.get(deployment.id)) and key in planned and known.get(key) == planned[key]:
            _put_back(client, old, deployment)
    write_bytes(record, canonical_json(known | planned).encode())


def offer_run_files(client: SyncPrefectClient, project: Path) -> None:
    """Make `config` of each deployment of the project a choice of its run files, and of the one that it has."""
    for deployment in client.read_deployments():
        schema = deployment.parameter_openapi_schema
        own = deployment.parameters.get("config")
        if schema is None or "config" not in schema.get("properties", {}):
            continue
        choice = sorted({*run_files(project), *([own] if own else [])})
        field = schema["properties"]["config"]
        if field.get("enum") != choice:
            field["enum"] = choice
            client.update_deployment(deployment.id, DeploymentUpdate(parameter_openapi_schema=schema))


def run_files(project: Path) -> list[str]:
    """The run files of a project, from its folder: TOML and JSON files with the key `workspace`."""
    found = []
    for folder in FOLDERS:
        for path in sorted((project / folder).glob("*")):
            if path.suffix in (".toml", ".json") and path.is_file() and b"workspace" in path.read_bytes():
                found.append(path.relative_to(project).as_posix())
    return found


def _planned(project: Path) -> dict[str, Any]:
    """The schedules of each deployment in prefect.yaml, by its entrypoint and name."""
    entries: Iterable[dict[str, Any]] = yaml.safe_load((project / "prefect.yaml").read_text()).get("deployments") or ()
    return {f"{one.get('entrypoint')}:{one.get('name')}": one.get("schedules") or [] for one in entries}


def _complete(client: SyncPrefectClient, deployment: DeploymentResponse, project: Path) -> None:
    """Label it with our version, and let its runs begin in the project's folder unless prefect.yaml says otherwise."""
    update = DeploymentUpdate(version=VERSION)
    if not deployment.pull_steps and "working_dir" not in deployment.job_variables:
        update.job_variables = deployment.job_variables | {"working_dir": str(project)}
    client.update_deployment(deployment.id, update)


def _put_back(client: SyncPrefectClient, old: DeploymentResponse, new: DeploymentResponse) -> None:
    kept = [(one.schedule, one.active) for one in old.schedules]
    if kept != [(one.schedule, one.active) for one in new.schedules] or old.paused != new.paused:
        schedules = [DeploymentScheduleUpdate(schedule=schedule, active=active) for schedule, active in kept]
        client.update_deployment(new.id, DeploymentUpdate(schedules=schedules, paused=old.paused))


def _prefect(project: Path, *arguments: str) -> None:
    command = [sys.executable, "-P", "-m", "prefect", *arguments]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True)
    if done.returncode:
        raise JobError(f"`prefect {' '.join(arguments)}` failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
