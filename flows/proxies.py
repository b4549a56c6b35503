"""Loopback never goes through a proxy: httpx, urllib, requests, gRPC and curl all follow `http_proxy` to 127.0.0.1 as well,
unless `no_proxy` names it. Other hosts keep the user's proxy."""

from collections.abc import Mapping
from urllib.request import getproxies, proxy_bypass

from tasks.health import LOOPBACK

NAMES = ("no_proxy", "NO_PROXY")  # which of the two counts differs between libraries, so both say the same


def without_loopback(environ: Mapping[str, str]) -> dict[str, str]:
    """`no_proxy` in both spellings: what the user wrote in either, then loopback. `*`, which excludes every host, stays."""
    given = [entry.strip() for name in NAMES for entry in environ.get(name, "").split(",")]
    if "*" in given:
        return dict.fromkeys(NAMES, "*")
    entries = dict.fromkeys([*filter(None, given), *LOOPBACK])
    return dict.fromkeys(NAMES, ",".join(entries))


def loopback_is_proxied() -> bool:
    """Whether a command of the user's, as `prefect`, would send what is for 127.0.0.1 to a proxy."""
    return bool(getproxies().keys() & {"http", "all"}) and not proxy_bypass("127.0.0.1")


def past_proxy() -> str:
    """What to write before such a command, so that it does not; empty where it does not anyway."""
    # Small letters: Python takes NO_PROXY only where there is no `no_proxy`.
    return "no_proxy=127.0.0.1 " if loopback_is_proxied() else ""
