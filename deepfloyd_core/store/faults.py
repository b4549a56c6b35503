"""What is wrong with the files of an artifact's directory, one line for each fault."""

from collections.abc import Callable, Iterator
from pathlib import Path

from deepfloyd_core.errors import ArtifactError
from deepfloyd_core.store.damage import MARK, is_marked
from deepfloyd_core.store.manifest import MANIFEST, FileEntry, Manifest, read_manifest
from deepfloyd_core.store.mirror_files import damage_there, is_elsewhere, is_held
from deepfloyd_core.store.working_state import own_paths


def faults_in(folder: Path, fault: Callable[[FileEntry, Path], str]) -> Iterator[str]:
    """A line for each file that `fault` finds one of, or for an invalid manifest. What is in the bucket only has none,
    unless a reader found damage: then it has to be brought.
    """
    try:
        entries = read_manifest(folder).files
    except ArtifactError as error:
        yield str(error)
        return
    held = is_held(folder) and not is_marked(folder)
    for entry in entries:
        if (found := fault(entry, folder)) and not (held and is_elsewhere(folder, entry)):
            yield found


def all_faults(folder: Path, record: Manifest) -> list[str]:
    """A line for each file with other bytes than its record says, here or, if it is not here, in the bucket; for each that
    cannot be read; and for each that is not in the record.
    """
    damage, held = [], is_held(folder)
    for entry in record.files:
        try:
            damage.append(damage_there(folder, entry) if held and is_elsewhere(folder, entry) else entry.damage(folder))
        except OSError as error:  # a disk that fails, or a file that may not be read
            damage.append(f"{folder / entry.path} cannot be read: {error.strerror}")
    known = {entry.path for entry in record.files} | {MANIFEST, MARK}
    others = [file for file in own_paths(folder) if str(file.relative_to(folder)) not in known]
    return [*filter(None, damage), *(f"{extra} is not in the manifest" for extra in sorted(others) if extra.is_file())]
