"""Deploys the flows of prefect.yaml, and keeps what the user has changed in the UI since.

`prefect deploy` replaces a deployment with what the file says: another schedule, other parameters or a pause would be lost.
So a deployment whose entry in the file is as it was is not deployed again; after an upgrade of this package it is, for its
form, and what the user had is put back. A pool or a queue that is there is left as it is. The parameter `config` becomes a
choice of the run files of the project.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from uuid import UUID

import yaml
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import DeploymentScheduleUpdate, DeploymentUpdate, WorkPoolCreate
from prefect.client.schemas.responses import DeploymentResponse
from prefect.exceptions import ObjectNotFound
from prefect.workers.process import ProcessWorker

from deepfloyd_core.errors import ConfigError, JobError
from deepfloyd_core.files import canonical_json, sha256_bytes, write_bytes
from tasks import VERSION

POOL = "deepfloyd"
TRAINING = "training"  # the queue of deployments that train: one run at a time
FOLDERS = (".", "flows/configs")  # of a project, where run files are looked for
LARGEST_RUN_FILE = 1 << 20  # bytes
RECORD = "deployed.json"  # in PREFECT_HOME: each entry as it was deployed, from where, and the code of the flows
KEPT = "deployments.kept.json"  # what the user had set, while a deployment is replaced


def make_pool(client: SyncPrefectClient) -> None:
    """Make the process pool and its queue for trainings, unless they are there. Its runs have no command of their own."""
    try:
        client.read_work_pool(POOL)
    except ObjectNotFound:
        template = ProcessWorker.get_default_base_job_template()
        template["job_configuration"]["command"] = None
        template["variables"]["properties"].pop("command", None)
        client.create_work_pool(WorkPoolCreate(name=POOL, type="process", base_job_template=template))
    try:
        client.read_work_queue_by_name(TRAINING, work_pool_name=POOL)
    except ObjectNotFound:
        client.create_work_queue(TRAINING, work_pool_name=POOL, concurrency_limit=1)


def deploy(client: SyncPrefectClient, project: Path, home: Path) -> None:
    """Deploy each flow of the project's prefect.yaml that is not deployed as it says.

    Raises ConfigError when the file cannot be read, JobError when Prefect refuses it.
    """
    _put_back(client, home)  # of a start that was killed
    where = {"code": _code(), "project": str(project)}
    planned = {key: {"entry": entry, **where} for key, entry in _planned(project).items()}
    known: dict[str, Any] = json.loads((home / RECORD).read_text()) if (home / RECORD).exists() else {}
    there = {_key(one.entrypoint, one.name): one for one in client.read_deployments()}
    stale = sorted(key for key in planned if key not in there or known.get(key) != planned[key])
    if not stale:
        return
    kept = {
        str(there[key].id): _settings(there[key], known[key]["project"]).model_dump(mode="json", exclude_unset=True)
        for key in stale
        if key in there and key in known and known[key]["entry"] == planned[key]["entry"]
    }
    write_bytes(home / KEPT, canonical_json(kept).encode())
    _prefect(project, "--no-prompt", "deploy", *(word for key in stale for word in ("--name", _name(key))))
    _put_back(client, home)
    for deployment in client.read_deployments():
        if _key(deployment.entrypoint, deployment.name) in stale:
            _complete(client, deployment, project)
    write_bytes(home / RECORD, canonical_json(known | planned).encode())


def offer_run_files(client: SyncPrefectClient, project: Path) -> list[str]:
    """Make `config` of each deployment of the project a choice of its run files, and of the one that it has.

    Returns no line: nobody needs to be told.
    """
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
    return []


def run_files(project: Path) -> list[str]:
    """The run files of a project, from its folder: TOML and JSON files with the key `workspace`."""
    found = []
    for folder in FOLDERS:
        for path in sorted((project / folder).glob("*")):
            if path.suffix in (".toml", ".json") and _names_a_workspace(path):
                found.append(path.relative_to(project).as_posix())
    return found


def _names_a_workspace(path: Path) -> bool:
    try:
        return path.stat().st_size <= LARGEST_RUN_FILE and b"workspace" in path.read_bytes()
    except OSError:  # a folder, a file that is gone or may not be read
        return False


def _planned(project: Path) -> dict[str, Any]:
    """Each entry of prefect.yaml, by its entrypoint and name."""
    path = project / "prefect.yaml"
    try:
        file = yaml.safe_load(path.read_text(encoding="utf-8"))
        entries = file.get("deployments") or ()
        common = {name: file.get(name) for name in ("build", "push", "pull")}
        return {_key(one.get("entrypoint"), one.get("name")): {**common, **one} for one in entries}
    except (yaml.YAMLError, AttributeError, UnicodeDecodeError) as error:
        told = " ".join(str(error).split()) if isinstance(error, yaml.YAMLError) else "it lists no deployments"
        raise ConfigError(f"{path} cannot be read: {told}.") from None


def _key(entrypoint: str | None, name: str | None) -> str:
    return f"{entrypoint}:{name}"


def _name(key: str) -> str:
    return key.rpartition(":")[2]


def _code() -> str:
    """A digest of the code of the flows, which decides their forms."""
    sources = sorted(Path(__file__).parents[1].rglob("*.py"))
    return sha256_bytes(VERSION.encode() + b"".join(path.read_bytes() for path in sources))


def _complete(client: SyncPrefectClient, deployment: DeploymentResponse, project: Path) -> None:
    """Label it with our version, and let its runs begin in the project's folder unless prefect.yaml says otherwise."""
    update = DeploymentUpdate(version=VERSION)
    if not deployment.pull_steps and "working_dir" not in deployment.job_variables:
        update.job_variables = deployment.job_variables | {"working_dir": str(project)}
    client.update_deployment(deployment.id, update)


def _settings(deployment: DeploymentResponse, project: str) -> DeploymentUpdate:
    """What a user can change of a deployment. project: the folder that it was deployed from."""
    schedules = [
        DeploymentScheduleUpdate(
            schedule=one.schedule, active=one.active, max_scheduled_runs=one.max_scheduled_runs,
            parameters=one.parameters, slug=one.slug,
        )
        for one in deployment.schedules
    ]  # fmt: skip
    own = {key: value for key, value in deployment.job_variables.items() if (key, value) != ("working_dir", project)}
    limit = deployment.global_concurrency_limit
    return DeploymentUpdate(
        schedules=schedules, paused=deployment.paused, parameters=deployment.parameters, tags=deployment.tags,
        job_variables=own, concurrency_limit=limit.limit if limit else None,
        work_queue_name=deployment.work_queue_name,
    )  # fmt: skip


def _put_back(client: SyncPrefectClient, home: Path) -> None:
    path = home / KEPT
    if path.exists():
        for deployment, settings in json.loads(path.read_text()).items():
            try:
                client.update_deployment(UUID(deployment), DeploymentUpdate.model_validate(settings))
            except ObjectNotFound:  # removed since
                continue
        path.unlink()


def _prefect(project: Path, *arguments: str) -> None:
    command = [sys.executable, "-P", "-m", "prefect", *arguments]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True)
    if done.returncode:
        raise JobError(f"`prefect {' '.join(arguments)}` failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
