"""The commands that look at versions and decide which one serves. None starts a Prefect server."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from flows.commands.arguments import Workspace, user_path
from tasks.terminal import console

Number = Annotated[int, typer.Argument(metavar="N", min=1, help="Number of the version.")]
First = Annotated[int, typer.Argument(metavar="A", min=1, help="Number of a version.")]
Second = Annotated[int, typer.Argument(metavar="B", min=1, help="Number of the version to compare with it.")]
out, err = console(), console(stderr=True)


def history(workspace: Workspace) -> None:
    """List the versions: when, of which run file, which one serves, main figures, and why it is so."""
    from flows.commands.version_report import print_history

    print_history(out, workspace)


def diff(workspace: Workspace, first: First, second: Second) -> None:
    """Compare two versions: pictures, captions, settings, figures, and samples of the same seeds in one picture."""
    from flows.commands.version_report import print_difference

    print_difference(out, workspace, first, second)


def promote(workspace: Workspace, number: Number) -> None:
    """Make a version serve: `latest` and `generate` use it. Also one that is blocked."""
    from deepfloyd_core.store import registry

    _decide(workspace, lambda: registry.promote(workspace, number, "deepfloyd promote"))


def rollback(workspace: Workspace) -> None:
    """Block the version that serves, so that the one before it serves again."""
    from deepfloyd_core.store import registry

    _decide(workspace, lambda: registry.rollback(workspace, "deepfloyd rollback"))


def block(
    workspace: Workspace,
    number: Number,
    reason: Annotated[str, typer.Option(help="Why, for `deepfloyd history`.")],
) -> None:
    """Block a version: it does not serve, and its bundle is not published again until it is promoted."""
    from deepfloyd_core.store import registry

    _decide(workspace, lambda: registry.block(workspace, number, reason, "deepfloyd block"))


def _decide(workspace: Path, decide: Callable[[], str]) -> None:
    """Decide, say what was decided, and bring the reports up to date."""
    from deepfloyd_core.bundle.version_page import write_changed_reports
    from deepfloyd_core.store.events import standing
    from deepfloyd_core.store.happenings import remember
    from flows.serving.home import default_home

    before = standing(workspace)
    out.print(decide())
    if (home := default_home()).is_dir():  # `deepfloyd ui` of this home tells of it
        with suppress(OSError):  # what was decided holds also where the home cannot be written
            remember(home, workspace)
    write_changed_reports(workspace, before)


def publish(
    workspace: Workspace,
    version: Annotated[str, typer.Argument(metavar="VERSION", help="A number, or `champion`.")],
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET", help="A folder, s3://BUCKET/PREFIX, or hf://OWNER/NAME of the Hugging Face Hub."
        ),
    ],
    public: Annotated[
        bool, typer.Option("--public", help="A new repository of the Hub is public; else it is private.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list the files and their sizes.")] = False,
) -> None:
    """Copy a version's files to a folder, a bucket or the Hugging Face Hub; what is there already is not sent again."""
    from deepfloyd_core.bundle import publish as publication
    from deepfloyd_core.store.versions import find_version
    from flows.commands.version_report import print_publication

    if "://" not in target:
        target = str(user_path(target).absolute())
    plan = publication.planned_publication(workspace, find_version(workspace, version), target, public)
    print_publication(out, plan)
    if dry_run:
        return
    with err.status("publishing") as status:
        address = publication.publish(plan, lambda done, total, line: status.update(f"{done:,}/{total:,} {line}"))
    out.print(f"{plan.title}: {address}", soft_wrap=True)
