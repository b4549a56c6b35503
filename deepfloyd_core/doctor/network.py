"""Proxies and the clock."""

import socket
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from importlib.util import find_spec
from urllib.parse import urlsplit

import httpx

from deepfloyd_core.doctor.finding import Finding
from deepfloyd_core.store.counts import duration

CONNECT_S = 2.0
MOST_SKEW_S = 60.0  # S3 refuses signatures from 15 minutes on, certificates of an hour ago are not valid yet
_SOCKS = "pip install 'socksio>=1,<2'"
_PORTS = {"http": 80, "https": 443, "socks5": 1080, "socks5h": 1080}


@dataclass(frozen=True)
class Proxy:
    """A variable of the environment that names a proxy."""

    variable: str
    address: str  # without user and password


def proxy_findings(proxies: tuple[Proxy, ...], without: str) -> list[Finding]:
    """Whether each proxy answers. without: the value of no_proxy; empty: there is none."""
    if not proxies:
        return [Finding("proxy", "fine", "none is set")]
    names: dict[str, list[str]] = {}
    for proxy in proxies:
        names.setdefault(proxy.address, []).append(proxy.variable)
    aside = f"; not for {without}" if without else ""
    return [_proxy_finding(address, variables, aside) for address, variables in names.items()]


def _proxy_finding(address: str, variables: list[str], aside: str) -> Finding:
    told = f"{' and '.join(variables)} {'is' if len(variables) == 1 else 'are'} {address}"
    unset = f"unset {' '.join(variables)}"
    place = _place(address)
    if place is None:
        return Finding("proxy", "fault", f"{told}, which is no address", unset)
    if address.startswith("socks") and find_spec("socksio") is None:
        return Finding("proxy", "fault", f"{told}, and socksio, which such a proxy takes, is not installed", _SOCKS)
    try:
        socket.create_connection(place, CONNECT_S).close()
    except OSError as error:
        return Finding("proxy", "fault", f"{told}, where nothing answers ({error.strerror or error})", unset)
    return Finding("proxy", "fine", f"{told}, which answers{aside}; addresses of this machine go past it")


def _place(address: str) -> tuple[str, int] | None:
    """Host and port of a proxy; None for a text that is no address."""
    try:
        parts = urlsplit(address if "://" in address else f"http://{address}")
        port = parts.port or _PORTS.get(parts.scheme, 80)
    except ValueError:
        return None
    return (parts.hostname, port) if parts.hostname else None


def server_ahead(address: str) -> float | None:
    """`ahead` of a server, whatever it answers; None: it does not."""
    with suppress(httpx.HTTPError, httpx.InvalidURL, ImportError):  # the last of a SOCKS proxy
        return ahead(httpx.head(address, timeout=CONNECT_S).headers.get("date"))
    return None


def ahead(date: str | None) -> float | None:
    """By how many seconds a server's clock is ahead of ours, by the Date of an answer that came just now; to a second."""
    with suppress(TypeError, ValueError):
        return (parsedate_to_datetime(date or "") - datetime.now(UTC)).total_seconds()
    return None


def clock_finding(ahead_s: float | None, whose: str) -> Finding:
    """Whether the clock agrees with a server's. ahead_s: how far that is ahead of ours; None: none answered."""
    if ahead_s is None:
        return Finding("clock", "note", "cannot be compared: no server answered")
    if abs(ahead_s) <= MOST_SKEW_S:
        return Finding("clock", "fine", f"agrees with {whose} to a minute")
    way = "behind" if ahead_s > 0 else "ahead of"
    text = f"is {duration(abs(ahead_s))} {way} {whose}: S3 and certificates refuse that"
    return Finding("clock", "fault", text, "sudo timedatectl set-ntp true")
