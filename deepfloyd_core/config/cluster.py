"""Checks a cluster before it is used: are its packages installed, is its address valid, does something answer there.

Does not import Ray or Dask: they take seconds, and most runs need neither.
"""

import socket
from urllib.parse import urlsplit

from deepfloyd_core.config.extras import missing_extra
from deepfloyd_core.errors import ConfigError

CONNECT_S = 10.0
_PACKAGES = {"ray": ("prefect_ray", "ray"), "dask": ("prefect_dask", "distributed")}
_SCHEMES = {"ray": ("", "ray"), "dask": ("", "tcp", "tls")}
_EXAMPLES = {"ray": "10.0.0.1:6379 or ray://10.0.0.1:10001", "dask": "tcp://10.0.0.1:8786"}


def cluster_fault(task_runner: str, address: str | None) -> str:
    """Why this task runner cannot make shards at this address, judged by the text of the address; empty when it can."""
    if task_runner not in _PACKAGES:
        if address is None:
            return ""
        return (
            f"task_runner_address is {address!r}, and {task_runner} run on this machine. Remove it, or use ray or dask"
        )
    if missing := missing_extra(_PACKAGES[task_runner], task_runner):
        return f"task_runner is {task_runner!r}, and {missing}"
    if address is not None and _place(task_runner, address) is None:
        return f"task_runner_address is {address!r}; {task_runner} takes for example {_EXAMPLES[task_runner]}"
    return ""


def reach(task_runner: str, address: str) -> None:
    """Connect once, because Ray takes a minute to give up. Raises ConfigError when nothing listens there."""
    place = _place(task_runner, address)
    assert place is not None  # the configuration was checked
    try:
        socket.create_connection(place, CONNECT_S).close()
    except OSError as error:
        raise ConfigError(
            f"task_runner_address is {address}, and no {task_runner.capitalize()} cluster can be reached there "
            f"({error.strerror or error}). Start it, or remove the key to use a cluster on this machine."
        ) from None


def _place(task_runner: str, address: str) -> tuple[str, int] | None:
    """Host and port of an address such as host:port or tcp://host:port; None for any other text."""
    try:
        parts = urlsplit(address if "://" in address else f"//{address}")
        host, port = parts.hostname, parts.port
    except ValueError:  # a port that is no number
        return None
    good = parts.scheme in _SCHEMES[task_runner] and host and port and not parts.path
    return (host, port) if good and host and port else None
