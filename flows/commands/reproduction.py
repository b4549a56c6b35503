"""`deepfloyd reproduce`: what it says before and after the run that makes a version again."""

import shutil
from pathlib import Path

from rich.console import Console

from deepfloyd_core.bundle.recipe import Reproduction, check_reproduction, different_files, write_scratch
from deepfloyd_core.store.artifacts import Artifact
from deepfloyd_core.store.counts import many
from deepfloyd_core.store.mirror import mirror_of
from tasks.terminal import labelled


def announced(out: Console, workspace: Path, number: int) -> Reproduction:
    """Check that a version can be made again, and say what is there and what is not as it was."""
    found = check_reproduction(workspace, number)
    out.print(f"version {number}: its bundle, its settings and {many(found.pictures, 'file')} of its data are there")
    for note in found.notes:
        out.print(labelled("note", "yellow", note))
    return found


def prepared(workspace: Path, found: Reproduction, scratch: Path | None) -> tuple[Path, Path]:
    """Fill the scratch folder; returns it, and its run file."""
    beside = Path.cwd() if mirror_of(workspace) else workspace.parent
    folder = scratch or beside / f"{workspace.name}-version-{found.version.number}-again"
    return folder, write_scratch(workspace, found.version, folder)


def compared(out: Console, found: Reproduction, folder: Path, again: Artifact) -> bool:
    """Compare what was made with what was published, file by file, and say it. Removes the scratch folder if all is
    equal.
    """
    lines = different_files(found.bundle, again.path)
    for line in lines:
        out.print(labelled("different", "bold red", line))
    number, files = found.version.number, [file for file in found.bundle.rglob("*") if file.is_file()]
    if lines:
        out.print(f"version {number} is not what was made again in {again.path}")
        return False
    size = sum(file.stat().st_size for file in files)
    out.print(f"version {number} was made again, every byte equal: {many(len(files) - 1, 'file')}, {size:,} bytes")
    shutil.rmtree(folder)
    return True
