"""Keeps loopback out of proxies: httpx, urllib, requests, gRPC and curl follow `http_proxy` even to 127.0.0.1.

They do so unless `no_proxy` names it. Other hosts keep the user's proxy.
"""

from collections.abc import Mapping
from urllib.request import getproxies, proxy_bypass

from tasks.health import LOOPBACK

NAMES = ("no_proxy", "NO_PROXY")  # which of the two counts differs between libraries, so both say the same


def without_loopback(environ: Mapping[str, str]) -> dict[str, str]:
    """`no_proxy` in both spellings: the user's value from either, then loopback. `*`, which excludes every host, stays."""
    given = [entry.strip() for name in NAMES for entry in environ.get(name, "").split(",")]
    if "*" in given:
        return dict.fromkeys(NAMES, "*")
    entries = dict.fromkeys([*filter(None, given), *LOOPBACK])
    return dict.fromkeys(NAMES, ",".join(entries))


def loopback_is_proxied() -> bool:
    """Whether a user's command, such as `prefect`, would use a proxy for 127.0.0.1."""
    return bool(getproxies().keys() & {"http", "all"}) and not proxy_bypass("127.0.0.1")


def past_proxy() -> str:
    """The prefix for such a command that prevents it; empty if it is not needed."""
    # Small letters: Python takes NO_PROXY only where there is no `no_proxy`.
    return "no_proxy=127.0.0.1 " if loopback_is_proxied() else ""
