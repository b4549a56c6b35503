"""The record of held-out pictures: `<workspace>/held_out/SEED.json` lists those of each data set, oldest first.

It is written with the choice, before anything is measured, and is only added to. A choice uses it first. So the choice
does not depend on which artifacts still exist, nor on the settings of the runs between; and data that returns to an
earlier state gets its earlier choice. If the record is lost, pictures are chosen again by hash. A picture costs 150
bytes; two runs take turns.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from deepfloyd_core.errors import ArtifactError
from deepfloyd_core.files import TMP_PREFIX, make_folder, read_sealed, write_sealed
from deepfloyd_core.store.locks import locked
from deepfloyd_core.store.mirror import write_record

FOLDER = "held_out"
_LOST = "Take it from a backup, or move it elsewhere: pictures are then held out by hash alone, and may have been trained on"


@dataclass(frozen=True)
class EvalRecord:
    """Held-out pictures of each data set and their copies, in the order in which they were held out: image_id ->
    subject, the picture that was measured on for it. Neither a place nor a subject ever changes.
    """

    sets: dict[str, dict[str, str]]
    is_closed: bool = False  # no other picture is held out: of a version that is made again

    def order_for(self, dataset_id: str) -> dict[str, str]:
        """The subject of each picture, in the order in which a data set holds them out: its own pictures, then those of
        others.
        """
        others = [pictures for name, pictures in sorted(self.sets.items()) if name != dataset_id]
        order: dict[str, str] = {}
        for pictures in (self.sets.get(dataset_id, {}), *others):
            for image_id, subject in pictures.items():
                order.setdefault(image_id, subject)
        return order

    def add(self, dataset_id: str, image_id: str, subject: str) -> None:
        """Append a picture to a data set's pictures, unless it is already one of them."""
        self.sets.setdefault(dataset_id, {}).setdefault(image_id, subject)


@contextmanager
def eval_record(workspace: Path, seed: int) -> Iterator[EvalRecord]:
    """The record of a seed. It is locked until the block ends, and then written if it grew.

    Raises ArtifactError when it is damaged.
    """
    path = workspace / FOLDER / f"{seed}.json"
    with locked(workspace, FOLDER):
        record = _read(path)
        before = sum(map(len, record.sets.values()))
        yield record
        if sum(map(len, record.sets.values())) > before:
            make_folder(path.parent)
            write_record(workspace, path, _content(record))


def copy_closed(workspace: Path, other: Path) -> None:
    """Give another workspace the records of this one, closed. Raises ArtifactError when one is damaged."""
    for path in _records(workspace):
        (other / FOLDER).mkdir(exist_ok=True)
        write_sealed(other / FOLDER / path.name, _content(_read(path)) | {"closed": True})


def damaged_records(workspace: Path) -> list[str]:
    """A line for each record that cannot be read."""
    faults = []
    for path in _records(workspace):
        try:
            _read(path)
        except ArtifactError as error:
            faults.append(str(error))
        except OSError as error:
            faults.append(f"{path} cannot be read: {error.strerror}")
    return faults


def _records(workspace: Path) -> list[Path]:
    """Those that are written, and not what a killed run has left of one."""
    files = (workspace / FOLDER).glob("*.json")
    return sorted(file for file in files if not file.name.startswith(TMP_PREFIX))


def _content(record: EvalRecord) -> dict[str, dict[str, list[tuple[str, str]]]]:
    return {"sets": {name: list(pictures.items()) for name, pictures in record.sets.items()}}


def _read(path: Path) -> EvalRecord:
    if not path.exists():
        return EvalRecord({})
    content = read_sealed(path, _LOST)
    try:
        sets = {name: dict(pictures) for name, pictures in content["sets"].items()}
    except (KeyError, AttributeError, TypeError, ValueError):
        raise ArtifactError(f"{path} is a sealed record, and not of held-out pictures. {_LOST}.") from None
    return EvalRecord(sets, content.get("closed", False))
