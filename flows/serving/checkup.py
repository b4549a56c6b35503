"""What `deepfloyd doctor` says of Prefect: the server that commands would use, its version, its services. Starts none."""

import json
import os
import urllib.error
import urllib.request
from base64 import b64encode
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from shlex import quote

from deepfloyd_core.doctor.finding import Finding, told
from deepfloyd_core.errors import ConfigError, StorageError
from deepfloyd_core.store.file_trials import try_locks
from flows.serving.api import check_api, without_login
from flows.serving.home import PASSWORD, password
from flows.serving.server import server_address
from flows.serving.server_log import errors_since_start
from tasks.health import ANSWER_S, healthy

_OWN_HOME = "export PREFECT_HOME=/a/folder/on/a/local/disk"


def prefect_findings(home: Path, api_url: str | None) -> list[Finding]:
    """Of the server at PREFECT_API_URL, or else of that of a home."""
    try:
        metadata.version("prefect")
    except metadata.PackageNotFoundError:
        return []  # the packages' finding says so
    here = server_address(home)
    if api_url and api_url.rstrip("/") != here:
        return [_configured(api_url)]
    return [_home(home), *([_own(home, here), *_services(home)] if here else [])]


def _configured(url: str) -> Finding:
    name = "Prefect server"
    try:
        check_api(url)
    except ConfigError as error:
        found = told(name, error)
        has_own = found.remedy and "unset it" not in found.remedy
        return found if has_own else replace(found, remedy="unset PREFECT_API_URL")
    return Finding(name, "fine", f"{without_login(url)} answers, in a version that Prefect {_installed()} can use")


def _home(home: Path) -> Finding:
    """Whether a server can be started or joined in a home, which is not created."""
    name = "Prefect home"
    if home.exists() and home.stat().st_uid != os.getuid():
        return Finding(name, "fault", f"{home} belongs to another user", _OWN_HOME)
    try:
        try_locks(home, "Set PREFECT_HOME to a folder on a local disk")
    except StorageError as error:
        return replace(told(name, error), remedy=_OWN_HOME)
    running = "" if server_address(home) else "; no server runs, each command starts one"
    return Finding(name, "fine", f"{home}{running}")


def _own(home: Path, url: str) -> Finding:
    name = "Prefect server"
    if not healthy(url):
        log = home / "server.log"
        return Finding(
            name, "fault", f"{url} runs, and does not answer; its log is {log}", f"tail -n 50 {quote(str(log))}"
        )
    version = _version(home, url)
    if version and version != _installed():
        text = f"{url} is Prefect {version}, and {_installed()} is installed: the server was started before"
        return Finding(name, "note", text, "end the commands that use it, `deepfloyd ui` among them, and start again")
    return Finding(name, "fine", f"{url} answers{f', Prefect {version}' if version else ''}")


def _services(home: Path) -> list[Finding]:
    """The errors of the background services of a home's server, which only its log tells."""
    name, log = "Prefect services", home / "server.log"
    found = [
        Finding(name, "fault", f"{error.service} fails: {error.error}", f"tail -n 50 {quote(str(log))}")
        for error in errors_since_start(log)
    ]
    return found or [Finding(name, "fine", "no errors since the server was started")]


def _version(home: Path, url: str) -> str:
    """The version of a home's server; empty if it does not tell us."""
    if not (home / PASSWORD).exists():  # else it would be made
        return ""
    try:
        login = b64encode(password(home).encode()).decode()
        request = urllib.request.Request(f"{url}/admin/version", headers={"Authorization": f"Basic {login}"})
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(request, timeout=ANSWER_S) as answer:
            return str(json.load(answer))
    except (OSError, ValueError, ConfigError):
        return ""


def _installed() -> str:
    return metadata.version("prefect")
