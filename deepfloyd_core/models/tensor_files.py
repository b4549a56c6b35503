"""Writes safetensors files: the room for one is looked at first, and its name appears when its bytes are on the disk.

The library's own errors name neither the file nor an error number, and it flushes nothing.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from deepfloyd_core.files import atomic_path
from deepfloyd_core.store.file_faults import need_room, system_error

if TYPE_CHECKING:
    import torch

_ENTRY = 130  # bytes of a tensor in the header: its name, shape and place


def save_tensors(
    state: "Mapping[str, torch.Tensor]", file: Path, metadata: dict[str, str] | None = None, what: str = ""
) -> None:
    """Write contiguous tensors durably. what: the file, in a message. Raises as `tensors_written`."""
    from safetensors.torch import save_file

    with tensors_written(file, state, what), atomic_path(file) as tmp:
        save_file(dict(state), tmp, metadata)


@contextmanager
def tensors_written(file: Path, state: "Mapping[str, torch.Tensor]", what: str = "") -> Iterator[None]:
    """A block in which safetensors writes tensors to a file. what: as `save_tensors`.

    Raises StorageError before it, if the disk has not enough room; OSError, which names the file, for what the library
    raises in it.
    """
    needed = sum(tensor.nbytes + _ENTRY for tensor in state.values())
    need_room(file.parent, needed, f"{what or file.name} takes")
    try:
        yield
    except SafetensorError as error:
        refused = system_error(str(error))
        if refused is None:
            raise
        raise OSError(refused.errno, refused.strerror, str(file)) from error
