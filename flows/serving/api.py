"""Checks that an address is a Prefect API that our flows can use, before any flow, so that a fault is one sentence.

`/health` answers without authentication and does not give the version. So Prefect's own client checks the rest, with
the credentials that it takes from the environment or the profile.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

from deepfloyd_core.errors import ConfigError, DeepFloydError, JobError
from tasks.health import LOOPBACK, asked_once, health, healthy
from tasks.prefect_settings import changed_settings

EXAMPLE = "http://127.0.0.1:4200/api"


def check_api(url: str) -> None:
    """Raise ConfigError when our flows cannot use the API at this value of PREFECT_API_URL. Imports Prefect."""
    bare = _bare(url)
    here = f"PREFECT_API_URL is {bare or without_login(url)}"
    if not bare:
        raise ConfigError(f"{here}, which is no address such as {EXAMPLE}.")
    if without_login(url) != url:  # Prefect's events do not know it, so the history would be lost
        raise ConfigError(f"{here}, with a user in the address. Set PREFECT_API_AUTH_STRING=user:password instead.")
    status = health(bare)
    if status is None:
        raise ConfigError(f"{here}, and no Prefect server answers there. Start it, or unset it.")
    if status not in (200, 401, 403) and status < 500:
        parts = urlsplit(bare)
        api = f"{parts.scheme}://{parts.netloc}/api"
        advice = f"Set it to {api}, where one answers." if healthy(api) else "Correct it, or unset it."
        raise ConfigError(f"{here}, and the server there has no Prefect API. {advice}")
    check_access(bare)


@contextmanager
def server_needed(url: str, look: Callable[[str], None] = lambda url: None) -> Iterator[None]:
    """Around a flow: raise JobError if Prefect could not begin or end it, because the server is gone or lost the run.

    If the flow itself had failed before, its error is raised. look: raises a better one, if it knows why the server failed.
    """
    try:
        yield
    except Exception as error:
        if fault := _server_fault(error):
            if ours := _flows_error(error):
                raise ours from None
            look(url)
            raise JobError(f"The Prefect server at {url} {fault}") from error
        raise


@contextmanager
def without_heartbeats() -> Iterator[None]:
    """Around a flow: no heartbeats, by whose thread each flow ends up to a second late. A dead run is known by its lease."""
    with changed_settings({"flows": {"heartbeat_frequency": None}}):
        yield


def _flows_error(error: BaseException | None) -> DeepFloydError | None:
    """The exception that was being handled when this error was raised."""
    while error is not None and not isinstance(error, DeepFloydError):
        error = error.__cause__ or error.__context__
    return error


def _server_fault(error: Exception) -> str:
    """The server's fault, and what to do; empty for an error that does not come from the server."""
    import httpx
    from prefect.exceptions import ObjectNotFound

    kept, cause = "Finished work is kept:", error
    if type(error) is RuntimeError and isinstance(
        error.__cause__, httpx.HTTPError
    ):  # of a client that asks the version
        cause = error.__cause__
    if isinstance(cause, httpx.TransportError):
        return f"does not answer ({type(cause).__name__}). {kept} start the server, and run the same command again."
    if isinstance(cause, httpx.HTTPStatusError) and cause.response.status_code >= 500:
        return f"answers {cause.response.status_code}; its log tells why. {kept} run the same command again."
    if isinstance(cause, httpx.HTTPStatusError | ObjectNotFound):
        return (
            f"does not take this run ({type(cause).__name__}); perhaps it was restarted with another database. {kept} "
            "run the same command again."
        )
    return ""


def check_guarded(url: str) -> None:
    """Raise ConfigError when anybody who reaches the API at this address could start runs: it is not on this machine,
    and gives access without the credentials of the environment.
    """
    if urlsplit(url).hostname in LOOPBACK:
        return
    with changed_settings({"api": {"auth_string": None, "key": None}, "client": {"custom_headers": {}}}):
        open_to_all = healthy(url)
    if open_to_all:
        raise ConfigError(
            f"The Prefect server at {url} requires no password, so whoever reaches it could run programs here, as its "
            "worker does. Start that server with PREFECT_SERVER_API_AUTH_STRING=user:password, and set "
            "PREFECT_API_AUTH_STRING to the same here."
        )


def check_access(
    url: str, wrong_login: str = "refuses the user and password in PREFECT_API_AUTH_STRING. Correct them."
) -> None:
    """Raise ConfigError when the API at this address, the value of PREFECT_API_URL, refuses Prefect's client.

    wrong_login: what the message says where the API refuses the password.
    """
    if refusal := _refusal(wrong_login):
        raise ConfigError(f"The Prefect server at {url} {refusal}")


def _refusal(wrong_login: str) -> str:
    """How the API that the environment names refuses Prefect's client; empty when it gives access."""
    import httpx
    from packaging.version import InvalidVersion, Version
    from prefect.client.base import ServerType
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_AUTH_STRING

    try:
        with asked_once(), get_client(sync_client=True) as client:
            if client.server_type == ServerType.CLOUD:
                return ""
            server, ours = Version(client.api_version()), Version(client.client_version())
    except httpx.HTTPStatusError as error:
        if error.response.status_code != 401:
            return f"answers {error.response.status_code} when asked for its version."
        if PREFECT_API_AUTH_STRING.value() is None:
            return "requires authentication. Set PREFECT_API_AUTH_STRING to its user:password."
        return wrong_login
    except httpx.HTTPError as error:
        return f"stopped answering ({type(error).__name__})."
    except (ValueError, TypeError, InvalidVersion):
        return "has no version, so it is no Prefect server. Correct PREFECT_API_URL, or unset it."
    if server.major != ours.major:
        return f"is Prefect {server}, which Prefect {ours} cannot use. Upgrade it, or name another in PREFECT_API_URL."
    return ""


def without_login(url: str) -> str:
    """The address to print, edited as text: it may be no valid address, and a password can hold what ends a host."""
    scheme, mark, rest = url.partition("://")
    return f"{scheme}{mark}{rest.rpartition('@')[2]}" if mark else url.rpartition("@")[2]


def _bare(url: str) -> str:
    """The address without its user, password and last slash; empty when it is none."""
    try:
        parts = urlsplit(without_login(url))
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"
    except ValueError:  # a port that is no number
        pass
    return ""
