"""A workspace to look at a run from, in which nothing that is written stays: a plan changes nothing.

So a plan asks the very functions that the run will ask (the scan, the choice of held-out pictures, the index), and these
may write their notes as ever.
"""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from deepfloyd_core.config.run import Run
from deepfloyd_core.crops.eval_record import FOLDER as HELD_OUT
from deepfloyd_core.index.scan import NOTES_DIR
from deepfloyd_core.store.leases import FOLDER as LEASES
from deepfloyd_core.store.locks import LOCKS

_COPIED = (HELD_OUT,)  # written in place; all others are links
_OWN = (LOCKS, LEASES)


@contextmanager
def shadow(run: Run) -> Iterator[Run]:
    """The run in a temporary workspace with links to what its own one holds.

    Folders of the workspace are folders of the shadow, and what they hold is linked: so a new artifact, or new notes, are
    the shadow's own.
    """
    with tempfile.TemporaryDirectory(prefix="plan-") as name:
        place = Path(name)
        for folder in _folders(run.workspace):
            (place / folder.name).mkdir()
            for child in folder.iterdir():
                if folder.name in _COPIED:
                    shutil.copy2(child, place / folder.name / child.name)
                else:
                    (place / folder.name / child.name).symlink_to(child.absolute())
        for file in run.workspace.glob("*"):
            if file.is_file():
                (place / file.name).symlink_to(file.absolute())
        yield replace(run, config=run.config.model_copy(update={"workspace": str(place)}))


def _folders(workspace: Path) -> list[Path]:
    if not workspace.is_dir():
        return []
    hidden = [workspace / NOTES_DIR]
    return [path for path in [*workspace.glob("[!.]*"), *hidden] if path.is_dir() and path.name not in _OWN]
