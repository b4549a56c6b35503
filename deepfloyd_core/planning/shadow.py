"""A workspace to look at a run from, in which nothing that is written stays: a plan changes nothing.

So a plan asks the very functions that the run will ask (the scan, the choice of held-out pictures, the index), and these
may write their notes as ever.
"""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from deepfloyd_core.config.run import Run
from deepfloyd_core.crops.eval_record import FOLDER as HELD_OUT
from deepfloyd_core.index.scan import NOTES_DIR
from deepfloyd_core.store.artifacts import FINGERPRINT
from deepfloyd_core.store.events import FOLDER as VERSIONS
from deepfloyd_core.store.manifest import MANIFEST
from deepfloyd_core.store.working_state import REQUEST


@contextmanager
def shadow(run: Run) -> Iterator[Run]:
    """The run in a temporary workspace that shows what its own one holds.

    Finished artifacts are links. Of unfinished ones there is the request alone, so that nobody works on them here; notes
    and records of versions are links as well, which are replaced and not written to, and the records of held-out pictures
    copies. What cannot be read is left out. Raises StorageError where the folder for temporary files has no room.
    """
    with tempfile.TemporaryDirectory(prefix="plan-") as name:
        place = Path(name)
        for artifact in run.workspace.glob("[!.]*/*"):
            if FINGERPRINT.fullmatch(artifact.name):
                with suppress(OSError):
                    _show(artifact, place / artifact.parent.name / artifact.name)
        for folder, put in ((NOTES_DIR, _link), (VERSIONS, _link), (HELD_OUT, shutil.copyfile)):
            for file in (run.workspace / folder).glob("*"):
                with suppress(OSError):
                    if file.is_file():
                        (place / folder).mkdir(exist_ok=True)
                        put(file, place / folder / file.name)
        yield replace(run, config=run.config.model_copy(update={"workspace": str(place)}))


def _show(artifact: Path, place: Path) -> None:
    if (artifact / MANIFEST).exists():
        place.parent.mkdir(exist_ok=True)
        _link(artifact, place)
    elif (artifact / REQUEST).exists():
        place.mkdir(parents=True)
        shutil.copyfile(artifact / REQUEST, place / REQUEST)


def _link(target: Path, place: Path) -> None:
    place.symlink_to(target.absolute())
