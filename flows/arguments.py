"""Arguments that several commands take."""

from pathlib import Path
from typing import Annotated

import typer

from deepfloyd_core.config.base import home_path
from deepfloyd_core.errors import ConfigError


def user_path(text: str) -> Path:
    """A path of the command line; the shell leaves `~` in quotes as it is."""
    return home_path(Path(text))


ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", parser=user_path, help="The run file (TOML or JSON).")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the run file; KEY= removes it."),
]
Workspace = Annotated[Path, typer.Argument(metavar="WORKSPACE", parser=user_path, help="Directory of the artifacts.")]


def need_workspace(workspace: Path) -> None:
    """Raise ConfigError unless a folder holds artifacts."""
    from deepfloyd_core.store.artifacts import is_workspace

    if not is_workspace(workspace):
        fault = "holds no artifacts" if workspace.is_dir() else "is no folder" if workspace.exists() else "is not there"
        raise ConfigError(f"{workspace} {fault}. Give the folder that `workspace` of the run file names.")
