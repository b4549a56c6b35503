"""Sets a damaged artifact's files aside before it is built again, so that only what is damaged is made anew.

The files move to a folder of working state inside the artifact's directory, the manifest last: a kill in between leaves an
artifact with missing files, which is set aside further. With the manifest, a builder can read how its rows were laid out.
"""

from fnmatch import fnmatch
from pathlib import Path

from deepfloyd_core.errors import ArtifactError
from deepfloyd_core.files import sha256_file
from deepfloyd_core.store.damage import MARK
from deepfloyd_core.store.manifest import MANIFEST, read_manifest
from deepfloyd_core.store.parts import take_part

BEFORE = ".before"


def set_aside(folder: Path, parts: str | None) -> None:
    """Set the files of a finished artifact aside, and link those back as finished parts that fit the pattern `parts` and are
    as its manifest says. What cannot be trusted without a manifest, which may be damaged itself, is removed.
    """
    before = folder / BEFORE
    (folder / MARK).unlink(missing_ok=True)
    try:
        entries = read_manifest(folder).files
    except ArtifactError:
        entries = ()
    for file in [file for file in folder.rglob("*") if file.is_file() and before not in file.parents]:
        if file != folder / MANIFEST and entries and not file.name.startswith("."):
            target = before / file.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            file.replace(target)
        elif file != folder / MANIFEST:
            file.unlink()
    if not entries:
        (folder / MANIFEST).unlink()
        return
    before.mkdir(exist_ok=True)
    (folder / MANIFEST).replace(before / MANIFEST)
    for entry in entries:
        file = before / entry.path
        if parts and fnmatch(file.name, parts) and file.is_file() and sha256_file(file) == entry.sha256:
            take_part(file, entry.sha256, folder / entry.path)
