"""What all flows have in common: a lease of the run, the wait for the server, and that a deployment's parameters stay
inside some folders.

Whoever may start a deployment's run may fill in its form. So there a path leads into the project's folder, or into one of
DEEPFLOYD_ROOTS of the worker's environment (`:` between them). A version is published there, or to a place in
DEEPFLOYD_TARGETS: else who may start a run could send models anywhere, with the worker's login. Who types a command may name
any path.
"""

import inspect
import os
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar, cast

from prefect.context import FlowRunContext

from deepfloyd_core.config.base import home_path
from deepfloyd_core.config.bucket_workspace import is_url
from deepfloyd_core.config.relative_paths import from_folder, paths_in
from deepfloyd_core.errors import ConfigError
from deepfloyd_core.models.hub import is_hub_id
from deepfloyd_core.preflight.versions import names_a_folder
from flows.runs.run_lease import with_run_lease
from flows.serving.ui import project_folder
from tasks.outbox import server_awaited

F = TypeVar("F", bound=Callable[..., Any])

ROOTS, TARGETS = "DEEPFLOYD_ROOTS", "DEEPFLOYD_TARGETS"
ADDRESSES = ("task_runner_address",)  # keys whose host gets what a run knows
# Parameters that are one path.
PATHS = ("config", "control", "from_picture", "image", "mask", "pictures", "prompt_file", "workspace")


def deployable(flow_body: F) -> F:
    """A flow's function with the lease of its run that waits for the server, with parameters checked in a deployment.

    There relative paths start at the project's folder. It raises ConfigError for a path outside of the folders.
    """
    signature = inspect.signature(flow_body)

    @wraps(flow_body)
    def body(*arguments: Any, **named: Any) -> Any:
        if not _is_deployed():
            return flow_body(*arguments, **named)
        bound = signature.bind(*arguments, **named)
        return flow_body(**confined(bound.arguments, allowed_folders()))

    return with_run_lease(server_awaited(cast(F, body)))


def _is_deployed() -> bool:
    context = FlowRunContext.get()
    return context is not None and context.flow_run is not None and context.flow_run.deployment_id is not None


def allowed_folders() -> tuple[Path, ...]:
    """The folders that a deployment's parameters may name; the project's is the first."""
    others = os.environ.get(ROOTS, "").split(os.pathsep)
    try:
        project = project_folder()
    except ConfigError:  # a worker on another machine, without the project: where its runs begin
        project = Path.cwd()
    return (project, *(Path(each) for each in others if each))


def confined(parameters: dict[str, Any], folders: tuple[Path, ...]) -> dict[str, Any]:
    """Parameters of a flow with paths from the first folder. Raises ConfigError for a path outside of all folders."""
    placed = dict(parameters)
    for name in PATHS:
        if name == "workspace" and is_url(str(placed.get(name))):
            _allowed(name, str(placed[name]))
        elif placed.get(name):
            placed[name] = str(_inside(name, str(placed[name]), folders))
    if placed.get("lora"):
        from deepfloyd_core.adapters.mixed import placed_lora

        placed["lora"] = [placed_lora(one, lambda source: _inside("lora", source, folders)) for one in placed["lora"]]
    if placed.get("version"):
        placed["version"] = _version("version", str(placed["version"]), folders)
    if placed.get("compare"):
        placed["compare"] = [_version("compare", str(one), folders) for one in placed["compare"]]
    if placed.get("target"):
        placed["target"] = _target(str(placed["target"]), folders)
    if placed.get("overrides"):
        placed["overrides"] = list(_overrides(placed["overrides"], folders))
    return placed


def _version(name: str, version: str, folders: tuple[Path, ...]) -> str:
    """What draws: a version of the workspace, a bundle's folder inside, or a repository of the Hub."""
    if not names_a_folder(version):
        return version
    placed = _inside(name, version, folders)
    return version if is_hub_id(version) and not placed.exists() else str(placed)


def _target(target: str, folders: tuple[Path, ...]) -> str:
    """Where to publish to: a folder inside, or a place that the worker's environment allows."""
    if "://" not in target:
        return str(_inside("target", target, folders))
    return _allowed("target", target)


def _allowed(name: str, target: str) -> str:
    """A place elsewhere, if the worker's environment allows it."""
    allowed = os.environ.get(TARGETS, "").split()
    if {"", ".", ".."} & set(target.partition("://")[2].rstrip("/").split("/")) or "%" in target or "::" in target:
        raise ConfigError(f"{name} is {target!r}, with a part that leads elsewhere. Give it without.")
    if not any(target == one or target.startswith(one.rstrip("/") + "/") for one in allowed):
        listed = ", ".join(allowed) or "none"
        raise ConfigError(
            f"{name} is {target!r}, and a deployment may write to {listed}. Add it to {TARGETS} in the environment of the "
            "worker, with spaces between several."
        )
    return target


def _overrides(overrides: list[str], folders: tuple[Path, ...]) -> Iterator[str]:
    for override in overrides:
        if override.partition("=")[0].strip() in ADDRESSES:
            raise ConfigError(
                f"{override.partition('=')[0].strip()} cannot be set in a deployment's parameters: the cluster gets the "
                "password of the Prefect server. Set it in the run file."
            )
        key = override.partition("=")[0].strip()
        for path in paths_in(override):
            if key == "workspace" and is_url(path):
                _allowed(key, path)
                continue
            _inside(f"the override of {override.partition('=')[0].strip()}", path, folders)
        yield from_folder(override, folders[0])


def _inside(name: str, text: str, folders: tuple[Path, ...]) -> Path:
    path = folders[0] / home_path(Path(text))
    if "\0" in text or not any(path.resolve().is_relative_to(folder.resolve()) for folder in folders):
        listed = ", ".join(map(str, folders))
        raise ConfigError(
            f"{name} is {text!r}, outside of the folders that a deployment may use ({listed}). Move it there, or add "
            f"its folder to {ROOTS} in the environment of the worker."
        )
    return path
