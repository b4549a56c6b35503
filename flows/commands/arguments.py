"""Arguments that several commands take."""

from pathlib import Path
from typing import Annotated

import typer

from deepfloyd_core.config.base import home_path


def user_path(text: str) -> Path:
    """A path of the command line; the shell leaves `~` in quotes as it is."""
    return home_path(Path(text))


def workspace_path(text: str) -> Path:
    """A workspace of the command line. Raises ConfigError unless the folder holds artifacts."""
    # Not above: a command that is only asked for its help needs no artifacts.
    from deepfloyd_core.store.artifacts import need_workspace

    path = user_path(text)
    need_workspace(path)
    return path


ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", parser=user_path, help="The run file (TOML or JSON).")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the run file; KEY= removes it."),
]
Workspace = Annotated[
    Path, typer.Argument(metavar="WORKSPACE", parser=workspace_path, help="Directory of the artifacts.")
]
