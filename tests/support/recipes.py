"""The recipes of deploy/, as their programs read them: a compose file with its variables, and manifests."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"
# What deploy.env must have, beside what its example already says.
FILLED_IN = {"LOGIN": "deepfloyd:a$b/c", "POSTGRES_PASSWORD": "p@ss:w/rd%40x", "PROJECT": "/srv/project"}
_VARIABLE = re.compile(r"\$\{(\w+)(?:(:-|:\?)([^}]*))?\}")


def example_env() -> dict[str, str]:
    """The variables of example.env, as they are there."""
    lines = (DEPLOY / "example.env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def compose(environ: Mapping[str, str]) -> dict[str, Any]:
    """The compose file with its merges done and its variables replaced, as `docker compose config` prints it.

    Raises KeyError for a variable that must be set and is not.
    """
    text = (DEPLOY / "compose.yaml").read_text()
    found: dict[str, Any] = replaced(yaml.safe_load(text), environ)
    return found


def replaced(node: Any, environ: Mapping[str, str]) -> Any:
    """A part of it."""
    if isinstance(node, dict):
        return {key: replaced(value, environ) for key, value in node.items()}
    if isinstance(node, list):
        return [replaced(value, environ) for value in node]
    return _VARIABLE.sub(lambda match: _value(match, environ), node) if isinstance(node, str) else node


def _value(match: "re.Match[str]", environ: Mapping[str, str]) -> str:
    name, kind, other = match.groups()
    value = environ.get(name, "")
    if kind == ":?" and not value:
        raise KeyError(other)
    return value or (other if kind == ":-" else "")


def manifests() -> Iterator[tuple[str, dict[str, Any]]]:
    """Each Kubernetes resource, with the name of its file."""
    for file in sorted((DEPLOY / "kubernetes").glob("*.yaml")):
        if file.stem != "kustomization":
            for resource in yaml.safe_load_all(file.read_text()):
                yield file.name, resource


def pool(name: str) -> dict[str, Any]:
    """The base job template of a work pool."""
    template: dict[str, Any] = json.loads((DEPLOY / "kubernetes" / f"pool-{name}.json").read_text())
    return template


def environment(container: dict[str, Any]) -> dict[str, str]:
    """The plain values of a container's environment."""
    return {one["name"]: one["value"] for one in container.get("env", ()) if "value" in one}
