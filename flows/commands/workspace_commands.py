"""The commands that look at a workspace. None starts a Prefect server."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from deepfloyd_core.config import retention
from deepfloyd_core.config.base import parse_spec
from deepfloyd_core.errors import ConfigError
from flows.commands.arguments import Workspace, user_path
from tasks.terminal import console

out, err = console(), console(stderr=True)


def verify(workspace: Workspace) -> None:
    """Re-hash every artifact and version of a workspace, and all that a version needs; exit 1 on any fault."""
    from deepfloyd_core.bundle.verify import verify_workspace
    from flows.commands.report import print_verified

    found = verify_workspace(workspace)
    print_verified(out, found)
    if found.faults:
        raise typer.Exit(1)


def list_workspace(
    workspace: Workspace,
    every: Annotated[bool, typer.Option("--all", help="Lists each version and each artifact.")] = False,
) -> None:
    """List the versions of a workspace, how much it holds of each kind, and unfinished work."""
    from flows.commands.workspace_report import print_workspace

    print_workspace(out, workspace, every)


def show(
    workspace: Workspace,
    what: Annotated[
        str, typer.Argument(metavar="WHAT", help="A version (3, champion), or the first digits of a fingerprint.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="The whole record, as JSON.")] = False,
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", parser=user_path, help="Write the report on a version, as one HTML file."),
    ] = None,
) -> None:
    """Tell what a version or an artifact is: what it was made from, settings, figures, files."""
    if html is not None and html.is_dir():
        raise ConfigError(f"--html is {html}, a folder. Give the file that is to be written.")
    from deepfloyd_core.store.lookup import artifact_named, version_named
    from flows.commands.show import artifact_json, print_artifact, print_version_record, version_json

    if version := version_named(workspace, what):
        if html:
            from deepfloyd_core.bundle.version_page import write_report

            out.print(write_report(workspace, version, html).absolute())
        elif as_json:
            out.print_json(version_json(version))
        else:
            print_version_record(out, workspace, version)
        return
    if html:
        raise ConfigError(f"--html is for versions, and {what!r} names none of {workspace}.")
    known = artifact_named(workspace, what)
    if as_json:
        out.print_json(artifact_json(known))
    else:
        print_artifact(out, workspace, known)


def gc(
    workspace: Workspace,
    delete: Annotated[bool, typer.Option("--delete", help="Remove it. Otherwise only shows what would go.")] = False,
    keep_versions: Annotated[
        int, typer.Option(min=1, max=retention.MOST_VERSIONS, help=retention.VERSIONS_HELP)
    ] = retention.DEFAULT.keep_versions,
    keep_days: Annotated[
        float, typer.Option(min=0, max=retention.MOST_DAYS, help=retention.DAYS_HELP)
    ] = retention.DEFAULT.keep_days,
    every: Annotated[bool, typer.Option("--all", help="Lists each artifact that goes, not only each kind.")] = False,
) -> None:
    """Show what old versions, abandoned work and old pictures take up; remove it with --delete."""
    policy = parse_spec(retention.Policy, {"keep_versions": keep_versions, "keep_days": keep_days}, "gc")
    from deepfloyd_core.store.gc import collect, would_collect
    from flows.commands.workspace_report import print_collection

    now = datetime.now(UTC)
    if not delete:
        print_collection(out, would_collect(workspace, policy, now), deleted=False, every=every)
        return
    from flows.commands.session import stopping

    stopping.kept = "What was removed is gone; the same command removes the rest."
    with err.status("removing") as status:
        collection = collect(workspace, policy, now, lambda done, total, line: status.update(f"{done}/{total} {line}"))
    print_collection(out, collection, deleted=True, every=every)
