"""The commands that look at versions and decide which one serves. None starts a Prefect server."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from flows.commands.arguments import Workspace
from tasks.terminal import console

Number = Annotated[int, typer.Argument(metavar="N", min=1, help="Number of the version.")]
First = Annotated[int, typer.Argument(metavar="A", min=1, help="Number of a version.")]
Second = Annotated[int, typer.Argument(metavar="B", min=1, help="Number of the version to compare with it.")]
out = console()


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
