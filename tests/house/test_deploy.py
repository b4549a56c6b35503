"""The recipes of deploy/ are what their programs take (image, compose file, manifests, scripts), and keep our promises."""

import asyncio
import copy
import importlib.util
import ipaddress
import json
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import sizing
import yaml
from recipes import DEPLOY, FILLED_IN, compose, environment, example_env, manifests, pool

from flows.serving.server import SETTINGS

ROOT = DEPLOY.parent
KUBERNETES = "1.33"
NEEDED = "not installed: make test-extras"
NO_CLIENT: Any = object()  # else Prefect starts a server to ask for blocks, of which there are none
PINNED = re.compile(r":v?\d+(\.\d+)+[\w.-]*$")


@pytest.fixture(scope="module")
def composed() -> dict[str, Any]:
    """The compose file with a filled-in deploy.env."""
    return compose(example_env() | FILLED_IN)


def _program(name: str) -> str:
    beside = [Path(folder) / "bin" for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]
    found = shutil.which(name, path=os.pathsep.join([*map(str, beside), os.environ["PATH"]]))
    if found is None:
        pytest.skip(f"{name} is {NEEDED}")
    return found


def test_the_tables_of_the_documentation_are_what_the_benchmark_prints() -> None:
    assert sizing.tables() in (ROOT / "docs" / "scale.md").read_text(), "run benchmarks/sizing.py"


def test_a_rate_whose_measurement_is_gone_is_named() -> None:
    with pytest.raises(SystemExit, match=r"no longer has the rows of: index of a JPEG$"):
        sizing.check((ROOT / "benchmarks/results.md").read_text().replace("| JPEG 4:2:0 | 9.81 ms", ""))


# ---- image ----------------------------------------------------------------------------------------------------------


def test_the_image_passes_hadolint() -> None:
    done = subprocess.run([_program("hadolint"), DEPLOY / "Dockerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_image_is_made_from_what_the_context_lets_in() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    copied = {word for line in re.findall(r"^COPY (?!--from)(.*)$", text, re.MULTILINE) for word in line.split()[:-1]}
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    allowed = {line[1:] for line in lines if line.startswith("!")}
    assert "*" in lines and {path.partition("/")[0] for path in copied} == allowed
    assert all((ROOT / path).exists() for path in copied)
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]["include"]
    assert {name.partition(".")[0] for name in packages} <= copied


def test_the_extras_of_the_image_exist_and_its_python_is_one_of_ours() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (extras,) = re.findall(r"^ARG EXTRAS=(\S+)$", text, re.MULTILINE)
    assert set(extras.split(",")) <= set(project["optional-dependencies"])
    (base,) = re.findall(r"^ARG BASE=(\S+)$", text, re.MULTILINE)
    assert PINNED.search(base) and base.startswith("python:3.11.")  # the one of constraints.txt


# ---- compose --------------------------------------------------------------------------------------------------------


def test_the_compose_file_keeps_to_its_specification(composed: dict[str, Any]) -> None:
    if importlib.util.find_spec("compose_spec") is None:
        pytest.skip(f"compose_spec is {NEEDED}")
    import compose_spec

    assert len(compose_spec.PyCompose.from_json(json.dumps(composed))) == len(composed["services"])


@pytest.mark.parametrize("name", sorted(FILLED_IN))
def test_a_variable_that_was_not_filled_in_is_named(name: str) -> None:
    environ = example_env() | FILLED_IN
    assert example_env()[name] == "", "no password, and no folder of ours, is shipped"
    with pytest.raises(KeyError, match=f"{name} is not set"):
        compose(environ | {name: ""})


def test_the_services_are_pinned_watched_started_again_and_on_loopback(composed: dict[str, Any]) -> None:
    services = composed["services"]
    for name, service in services.items():
        assert PINNED.search(service["image"]), name
        once = name == "setup"
        assert once or service["healthcheck"]["test"][0] == "CMD", name
        assert service["restart"] == ("no" if once else "unless-stopped"), name
        for port in service.get("ports", ()):
            assert ipaddress.ip_address(port.split(":")[0]).is_loopback, (name, port)
        for other, how in service.get("depends_on", {}).items():
            ends = other == "setup"
            assert how["condition"] == ("service_completed_successfully" if ends else "service_healthy"), (name, other)
        assert {one.split(":")[0] for one in service.get("volumes", ())} <= {*composed["volumes"], FILLED_IN["PROJECT"]}
    assert {name for name, one in services.items() if "ports" in one} == {"server"}
    assert composed["networks"]["database"]["internal"]
    assert {name for name, one in services.items() if "database" in one.get("networks", ())} == {"postgres", "server"}


def test_no_secret_lies_in_the_recipes_and_the_env_file_is_not_committed() -> None:
    plain = (DEPLOY / "compose.yaml").read_text()
    for key in ("AUTH_STRING", "PASSWORD", "HF_TOKEN"):
        assert all(value.strip().startswith("${") for value in re.findall(rf"{key}: (.*)", plain)), key
    for name, resource in manifests():
        for container in _containers(resource):
            assert not [key for key in environment(container) if re.search("AUTH_STRING$|PASSWORD|TOKEN", key)], name
    for ignored in (ROOT / ".gitignore", ROOT / ".dockerignore"):
        assert re.search(r"^/?deploy/(\*\.env|deploy\.env)$", ignored.read_text(), re.MULTILINE), ignored


# ---- servers of both ------------------------------------------------------------------------------------------------


def test_both_servers_keep_the_history_as_long_as_ours(composed: dict[str, Any]) -> None:
    (manifest,) = (one for _, one in manifests() if one["kind"] == "Deployment" and one["metadata"]["name"] == "server")
    for environ in (composed["services"]["server"]["environment"], environment(_containers(manifest)[0])):
        kept = {key: value for key, value in SETTINGS.items() if key.startswith("PREFECT_SERVER_")}
        kept.pop("PREFECT_SERVER_EPHEMERAL_ENABLED")  # of clients
        assert {key: environ.get(key) for key in kept} == kept


# ---- kubernetes -----------------------------------------------------------------------------------------------------


def _containers(resource: dict[str, Any]) -> list[dict[str, Any]]:
    pod = resource.get("spec", {}).get("template", {}).get("spec", {})
    containers: list[dict[str, Any]] = pod.get("containers", [])
    return containers


def _job(name: str, values: dict[str, Any]) -> dict[str, Any]:
    """The job of a run in a pool, as Prefect's worker fills in the template."""
    from prefect.workers.base import BaseJobConfiguration

    class Configuration(BaseJobConfiguration):
        job_manifest: dict[str, Any]

    configuration: Any = asyncio.run(Configuration.from_template_and_values(pool(name), values, client=NO_CLIENT))
    job: dict[str, Any] = copy.deepcopy(configuration.job_manifest)
    job["metadata"]["name"] = "lumpy-goat"  # the worker adds name, arguments and labels
    for key in ("parallelism", "completions"):  # Prefect's worker demands them there, Kubernetes ignores them
        assert job["spec"]["template"]["spec"].pop(key) == 1
    return job


def _all_resources() -> list[tuple[str, dict[str, Any]]]:
    gpus = _job("gpu", {"gpus": 4, "working_dir": "/project/birds"})
    assert _containers(gpus)[0]["resources"]["limits"]["nvidia.com/gpu"] == 4
    assert _containers(gpus)[0]["workingDir"] == "/project/birds"
    return [*manifests(), ("pool-data.json", _job("data", {})), ("pool-gpu.json", gpus)]


def test_the_manifests_and_the_jobs_of_both_pools_are_valid() -> None:
    if importlib.util.find_spec("kubernetes_validate") is None:
        pytest.skip(f"kubernetes_validate is {NEEDED}")
    import kubernetes_validate

    for name, resource in _all_resources():
        kubernetes_validate.validate(resource, KUBERNETES, strict=True)
        assert resource["kind"] == "Namespace" or resource["metadata"]["namespace"] == "deepfloyd", name


def test_every_pod_passes_the_restricted_standard_of_the_namespace() -> None:
    (space,) = (one for _, one in manifests() if one["kind"] == "Namespace")
    assert space["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    pods = [(name, one["spec"]["template"]["spec"]) for name, one in _all_resources() if _containers(one)]
    assert len(pods) == 7
    for name, pod in pods:
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] > 0, name
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        for container in pod["containers"]:
            held = container["securityContext"]
            assert held["allowPrivilegeEscalation"] is False and held["capabilities"] == {"drop": ["ALL"]}, name
            assert {one["name"] for one in container["volumeMounts"]} <= {
                *(one["name"] for one in pod.get("volumes", ())), *(["data"] if name == "postgres.yaml" else ()),
            }, name  # fmt: skip


def test_the_pools_differ_by_the_gpu_alone_and_name_every_variable() -> None:
    data, gpu = pool("data"), pool("gpu")
    for template in (data, gpu):
        named = set(re.findall(r"\{\{ (\w+) \}\}", json.dumps(template["job_configuration"])))
        assert named == set(template["variables"]["properties"])
    assert gpu["variables"]["properties"].pop("gpus")["default"] == 1
    gpu["variables"]["properties"]["memory"]["default"] = data["variables"]["properties"]["memory"]["default"]
    pod = gpu["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]
    assert pod.pop("tolerations")[0]["key"] == "nvidia.com/gpu"
    assert pod["containers"][0]["resources"]["limits"].pop("nvidia.com/gpu") == "{{ gpus }}"
    assert data == gpu


def test_one_image_is_named_everywhere() -> None:
    (image,) = yaml.safe_load((DEPLOY / "kubernetes/kustomization.yaml").read_text())["images"]
    named = f"{image['newName']}:{image['newTag']}"
    assert [pool(name)["variables"]["properties"]["image"]["default"] for name in ("data", "gpu")] == [named, named]
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert image["newTag"] == example_env()["TAG"] == version
    ours = {one["image"] for _, resource in manifests() for one in _containers(resource)}
    assert ours == {image["name"], compose(example_env() | FILLED_IN)["services"]["postgres"]["image"]}


# ---- scripts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["setup.sh", "slurm/run.sbatch", "slurm/worker.sbatch"])
def test_the_scripts_are_valid_and_say_what_they_miss(script: str) -> None:
    shell = "sh" if script.endswith(".sh") else "bash"
    assert subprocess.run([shell, "-n", DEPLOY / script]).returncode == 0
    bare = {"PATH": os.environ["PATH"]}
    done = subprocess.run([shell, DEPLOY / script], env=bare, capture_output=True, text=True)
    assert done.returncode != 0 and re.search("PREFECT_API_URL|DEEPFLOYD_BIN", done.stderr), done.stderr


def test_the_shipped_deployments_are_read_as_ours_are(tmp_path: Path) -> None:
    from flows.serving.deployments import _planned

    shutil.copy(DEPLOY / "prefect.yaml", tmp_path)
    pools = {key: entry["work_pool"]["name"] for key, entry in _planned(tmp_path).items()}
    assert {name for name, where in pools.items() if where == "data"} == {"flows.stages:prepare:data"}
    assert set(pools.values()) == {"data", "gpu"}
