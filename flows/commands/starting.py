"""`deepfloyd init`: from a folder of pictures to a run file, a data file and a preview. Starts no Prefect server."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deepfloyd_core.errors import ConfigError, DataError, DeepFloydError, StorageError
from flows.commands.arguments import user_path
from flows.commands.session import err, out, print_notes

if TYPE_CHECKING:
    from deepfloyd_core.config.run import Run
    from deepfloyd_core.project.look import FolderLook

SHOWN, MOST_PIXELS = 12, 100_000_000  # pictures of the preview, and their pixels: HEIC takes 0.1 s a megapixel


def init(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", parser=user_path, help="The folder with your pictures.")],
) -> None:
    """Look at a folder of pictures, and write a run file and a data file for it, each value with its reason."""
    from deepfloyd_core.preflight.load import load_run
    from deepfloyd_core.project.choose import choose
    from deepfloyd_core.project.look import check_folder, look_at
    from deepfloyd_core.project.machine import asked_machine
    from deepfloyd_core.project.write import check_free, safe_name, write_project
    from flows.commands.starting_report import print_choices, print_look, print_next

    check_folder(folder)
    here, real = Path.cwd(), Path(os.path.realpath(folder))
    _check_here(here, real)
    name = safe_name(real.name)
    _check_workspace(here, real, name)
    check_free(name, here)
    machine = asked_machine()
    if err.is_terminal:
        err.print(f"Looking at {folder}, which takes some seconds")
    look = look_at(folder)
    print_look(out, look)
    choices = choose(look, machine(), name, _place(folder, here))
    run_file, data_file = write_project(choices, here)
    try:
        run = load_run(Path(run_file.name))
    except DeepFloydError:
        for file in (run_file, data_file):
            file.unlink()
        raise
    print_choices(out, choices, (run_file.name, data_file.name))
    print_notes(run.notes)
    _show(run, look)
    print_next(out, choices, run)


def _check_here(here: Path, folder: Path) -> None:
    """Raise for a current directory that cannot hold the files, before the pictures are looked at."""
    if Path(os.path.realpath(here)).is_relative_to(folder):
        raise ConfigError(
            f"The current directory, {here}, is in the folder of the pictures: what runs make there would be read as "
            "pictures. Start the command in a directory outside of it."
        )
    if not os.access(here, os.W_OK | os.X_OK):
        raise StorageError(
            f"The current directory, {here}, cannot be written, and the run file belongs there. Start the command in "
            "another directory."
        )


def _check_workspace(here: Path, folder: Path, name: str) -> None:
    """Raise where the workspace would be among the pictures."""
    workspace = Path(os.path.realpath(here / "workspace" / name))
    if workspace.is_relative_to(folder):
        raise ConfigError(
            f"What runs make in {here} is kept in {workspace}, which is in the folder of the pictures, {folder}. Start the "
            "command in another directory."
        )


def _place(folder: Path, here: Path) -> str:
    """The folder as a data file names it: from the current directory if it is below, so that both can be moved."""
    absolute = Path(os.path.normpath(here / folder))
    if not absolute.is_relative_to(here):
        return str(absolute)
    place = absolute.relative_to(here).as_posix()
    return f"./{place}" if place.startswith("~") else place  # which would be a home folder


def _show(run: "Run", look: "FolderLook") -> None:
    """Draw some of the pictures that were decoded, and so harm nobody, with their crops."""
    from deepfloyd_core.crops.preview import PREVIEW_FILE, save_preview
    from deepfloyd_core.index.scan import scan_some
    from deepfloyd_core.store.counts import many

    names, pixels = list[str](), 0
    for one in look.seen:
        pixels += one.width * one.height
        if one.decoded and (pixels <= MOST_PIXELS or len(names) < 4):
            names.append(one.source)
    path = run.workspace / PREVIEW_FILE
    try:
        shown, unusable = save_preview(run, SHOWN, path, scan_some(run, run.datasets[0], names))
    except DataError as error:  # the others of the folder may be usable
        print_notes([f"There is no preview. {error}"])
        return
    print_notes([unusable] if unusable else [])
    out.print(f"Preview: {many(shown, 'picture with its crop', 'pictures with their crops')}: {path}")
