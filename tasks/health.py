"""Checks that a Prefect API answers at an address. On loopback without proxies and without Prefect (1 s to import).

Elsewhere, and wherever a login or a certificate is needed, Prefect's client checks: it knows the user's
`PREFECT_API_...`.
"""

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

from tasks.prefect_settings import changed_settings

LOOPBACK = ("127.0.0.1", "localhost", "::1")
ANSWER_S = 5.0


def healthy(url: str) -> bool:
    """Whether a Prefect API answers at this address."""
    return health(url) == 200


def health(url: str) -> int | None:
    """The HTTP status of its answer, 404 if the answer is not JSON; None if nothing answers."""
    parts = urlsplit(url)
    near = parts.scheme == "http" and parts.hostname in LOOPBACK
    status = _health_alone(url) if near else 401
    return _health_for_prefect(url) if status in (401, 403) else status


def answers(url: str, patience_s: float) -> bool:
    """Whether a server on loopback answers anything within a time, be it an error."""
    return _health_alone(url, patience_s) is not None


@contextmanager
def asked_once(url: str | None = None) -> Iterator[None]:
    """In this block Prefect's clients ask the server, or the one at an address, without retries, and start no server.

    If no server is named, Prefect would start one of its own, which outlives this process.
    """
    once = {"client": {"max_retries": 0}, "server": {"ephemeral": {"enabled": False}}}
    with changed_settings(once | ({} if url is None else {"api": {"url": url}})):
        yield


def _health_alone(url: str, patience_s: float = ANSWER_S) -> int | None:
    try:
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(f"{url.rstrip('/')}/health", timeout=patience_s) as answer:
            json.loads(answer.read(1 << 16))
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except (OSError, http.client.HTTPException):
        return None
    except ValueError:
        return 404


def _health_for_prefect(url: str) -> int | None:
    """The status that Prefect's client gets when it asks for what every run needs. Prefect Cloud does not give its
    version.
    """
    import httpx
    from prefect.client.base import ServerType
    from prefect.client.orchestration import get_client

    try:
        with (
            asked_once(url),
            get_client(httpx_settings={"timeout": ANSWER_S}, sync_client=True) as client,  # not that of a flow
        ):
            if client.server_type == ServerType.CLOUD:
                client.read_flows(limit=1)
            else:
                client.api_version()
    except httpx.HTTPStatusError as error:
        return error.response.status_code
    except (OSError, httpx.HTTPError):  # OSError: the file of a certificate
        return None
    except ValueError:
        return 404
    return 200
