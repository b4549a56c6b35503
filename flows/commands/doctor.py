"""`deepfloyd doctor`: prints what this machine lacks, and what a run file needs of it."""

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from urllib.parse import unquote

import typer

from deepfloyd_core.store.counts import many
from flows.commands.arguments import Overrides, user_path
from flows.commands.session import err, out

if TYPE_CHECKING:
    from deepfloyd_core.doctor.examine import Surroundings
    from deepfloyd_core.doctor.finding import Finding

_PROXIES = ("http_proxy", "https_proxy", "all_proxy")
_LOGIN = re.compile(r"(?<=://)\S*@")
_SECRETS = re.compile(
    r"(?:^|_)TOKEN(?:_|$)|SECRET|PASSWORD|PASSWD|API_KEY|ACCESS_KEY|AUTH_STRING|CREDENTIAL", re.IGNORECASE
)
_LOGINS = re.compile(r"://(\S*)@")
_LEAST = 4  # characters of a secret; a shorter one is found in every word
_ORDER = {"fault": 0, "note": 1, "fine": 2}
_STYLES = {"fault": "bold red", "note": "yellow", "fine": "green"}
_SCHEMA = 1  # of the JSON


def doctor(
    config: Annotated[
        Path | None, typer.Argument(metavar="CONFIG", parser=user_path, help="A run file: also what that needs.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For a report on a bug, without secrets.")] = False,
    overrides: Overrides = None,
) -> None:
    """Look at this machine, and say what is missing and how to mend it; exit 1 on any fault."""
    if overrides and config is None:
        raise typer.BadParameter("--set changes keys of a run file; name it.")
    with err.status("looking at this machine"):
        found = _found(config, tuple(overrides or ()))
    hide = secrets_of(os.environ)
    shown = sorted((hidden(each, hide) for each in found), key=lambda each: _ORDER[each.state])
    if as_json:
        out.print_json(report_json(shown))
    else:
        print_findings(shown)
    if any(each.state == "fault" for each in shown):
        raise typer.Exit(1)


def _found(config: Path | None, overrides: tuple[str, ...]) -> "list[Finding]":
    """All findings; where a package is missing that the look itself takes, only that one."""
    # Not above: `--help` needs none of it.
    from deepfloyd_core.doctor.installed import package_finding, python_finding

    try:
        from deepfloyd_core.doctor.examine import examine
        from flows.serving.checkup import prefect_findings
        from flows.serving.home import default_home

        with ThreadPoolExecutor(1) as pool:
            prefect = pool.submit(prefect_findings, default_home(), os.environ.get("PREFECT_API_URL"))
            return [*examine(config, overrides, surroundings(os.environ)), *prefect.result()]
    except ModuleNotFoundError:
        packages = package_finding()
        if packages.state == "fine":
            raise
        return [packages, python_finding()]


def surroundings(environ: Mapping[str, str]) -> "Surroundings":
    """What the environment says of proxies and of a Prefect server elsewhere, without users and passwords."""
    from deepfloyd_core.doctor.examine import Surroundings
    from deepfloyd_core.doctor.network import Proxy
    from flows.serving.api import without_login

    named = [name for pair in _PROXIES for name in (pair, pair.upper()) if environ.get(name)]
    proxies = tuple(Proxy(name, without_login(environ[name])) for name in named)
    prefect = without_login(environ.get("PREFECT_API_URL", ""))
    return Surroundings(proxies, environ.get("no_proxy") or environ.get("NO_PROXY", ""), prefect)


def secrets_of(environ: Mapping[str, str]) -> list[str]:
    """Texts of the environment that nobody else may see, longest first: tokens, and users and passwords of addresses."""
    found = {value for name, value in environ.items() if _SECRETS.search(name)}
    for value in environ.values():
        for login in _LOGINS.findall(value):
            user, _, word = login.partition(":")
            found |= {login, word or user, unquote(word or user), *re.split(r"[/?#:]", word)}
    found -= {"true", "false", "True", "False", "none", "None"}
    return sorted((each for each in found if len(each) >= _LEAST), key=len, reverse=True)


def hidden(found: "Finding", secrets: Iterable[str]) -> "Finding":
    """A finding without secrets."""

    def told(text: str) -> str:
        for secret in secrets:
            text = text.replace(secret, "***")
        return _LOGIN.sub("", text)

    return replace(found, text=told(found.text), remedy=told(found.remedy) if found.remedy else None)


def report_json(found: "list[Finding]") -> str:
    """The findings, and the versions of Python and packages; `~` for the home folder, whose name is the user's."""
    import platform

    from deepfloyd_core.doctor.installed import versions

    return json.dumps({
        "schema": _SCHEMA, "python": platform.python_version(), "platform": platform.platform(), "packages": versions(),
        "findings": [asdict(_without_home(each)) for each in found],
    })  # fmt: skip


def _without_home(found: "Finding") -> "Finding":
    home = str(Path.home())
    if home == "/":
        return found
    remedy = found.remedy.replace(home, "~") if found.remedy else None
    return replace(found, text=found.text.replace(home, "~"), remedy=remedy)


def print_findings(found: "list[Finding]") -> None:
    """A line for each, its remedy below it, and how many there are."""
    from rich.text import Text

    width = max(len(each.name) for each in found)
    for each in found:
        text = " ".join(each.text.split())
        out.print(Text.assemble((f"{each.state:<5}", _STYLES[each.state]), f"  {each.name:<{width}}  {text}"))
        if each.remedy:
            out.print(Text.assemble(" " * (width + 9), (f"-> {each.remedy}", "bold")))
    count = Counter(each.state for each in found)
    faults = many(count["fault"], "fault") if count["fault"] else "no faults"
    out.print(f"{faults}, {many(count['note'], 'note')}, {count['fine']} fine")
