"""Arguments that several commands take."""

from pathlib import Path
from typing import Annotated

import typer

from deepfloyd_core.config.base import home_path


def user_path(text: str) -> Path:
    """A path of the command line; the shell leaves `~` in quotes as it is."""
    return home_path(Path(text))


ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", parser=user_path, help="The run file (TOML or JSON).")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the run file; KEY= removes it."),
]
Workspace = Annotated[Path, typer.Argument(metavar="WORKSPACE", parser=user_path, help="Directory of the artifacts.")]
